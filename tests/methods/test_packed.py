"""Packed sequences give what a call for each of them gives."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import attend
from fastattn.methods import packed
from tests.methods.test_smyrf import D, draws
from tests.ops.cases import needs_compiler

LENGTHS = [5, 0, 17, 33, 30, 1, 29, 64, 12]
KEY_LENGTHS = [5, 4, 20, 33, 28, 0, 31, 64, 40]
HEADS, KV_HEADS = 4, 2
SMYRF: dict[str, Any] = {"method": "smyrf", "n_hashes": 3, "q_cluster_size": 8, "impl": "reference"}
OWN = {"projections": draws()}
PLANES = {"n_clusters": 5, "n_bits": 20, "planes": torch.randn(20, D + 1, generator=torch.Generator().manual_seed(0))}
CALLS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "smyrf": {**SMYRF, **OWN},
    "smyrf, key clusters": {**SMYRF, **OWN, "correct_duplicates": True},
    "smyrf, principal": {**SMYRF, "directions": "principal"},
    "linear": {"method": "linear", "impl": "reference"},
    "clustered": {"method": "clustered", "impl": "reference", "n_iterations": 1, **PLANES},
    "improved clustered": {"method": "improved_clustered", "impl": "reference", "topk": 4, "n_iterations": 1, **PLANES},
}
LSH: dict[str, Any] = {
    "method": "lsh", "n_hashes": 3, "bucket_size": 8, "impl": "reference",
    "rotations": torch.randn(1, D, 3, 3, generator=torch.Generator().manual_seed(0)),
}  # fmt: skip
SHARED: dict[str, dict[str, Any]] = {  # queries and keys
    "lsh": LSH,
    "lsh, both ways, duplicates once": {**LSH, "look_ahead": 1, "correct_duplicates": True},
    "lsh, causal, window": {**LSH, "is_causal": True, "local_window": 4},
    "lsh, own bucket only": {**LSH, "across_buckets": False},
    "lsh, dense up to 30": {**LSH, "dense_threshold": 30},
}
CAUSAL: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "is_causal": True},
    "smyrf": {**SMYRF, **OWN, "is_causal": True, "local_window": 4, "correct_duplicates": True},
    "linear": {"method": "linear", "is_causal": True, "impl": "reference"},
}


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_inputs(lengths: list[int], key_lengths: list[int], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(lengths), HEADS, D, generator=g)
    k, v = (torch.randn(sum(key_lengths), KV_HEADS, D, generator=g) for _ in "kv")
    return [x.requires_grad_() for x in (q, k, v)]


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int], **knobs: Any) -> Tensor:
    outs = [q[:0]]
    for own in zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
        own_q, own_k, _ = own
        if len(own_q) and len(own_k):
            x = [y.transpose(0, 1).unsqueeze(0) for y in own]
            if k is q:
                x[1] = x[0]
            outs.append(attend(*x, **knobs).squeeze(0).transpose(0, 1))
        else:
            outs.append(torch.zeros_like(own_q))
    return torch.cat(outs)


def check(lengths: list[int], key_lengths: list[int] | None, call: dict[str, Any]) -> None:
    x = packed_inputs(lengths, key_lengths or lengths)
    if call["method"] == "lsh":
        x[1] = x[0]
    of_k = None if key_lengths is None else cu_seqlens(key_lengths)
    # clustering draws its first centroids: from the same seed here as there
    of_call = {"generator": torch.Generator().manual_seed(3)} if "planes" in call else {}
    out = attend(*x, cu_seqlens=cu_seqlens(lengths), cu_seqlens_k=of_k, **call, **of_call)
    with pytest.MonkeyPatch.context() as patch:
        if of_call:
            seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(3))) // 2
            drawn = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(seed))
            patch.setattr("fastattn.methods.common.draw_seed", lambda generator, device: drawn)
        expected = one_by_one(*x, lengths, key_lengths or lengths, **call)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, x, weight, allow_unused=True, materialize_grads=True)
    for a, b in zip(torch.autograd.grad(out, x, weight), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_self_attention_is_that_of_each_sequence(call: dict[str, Any]) -> None:
    check(LENGTHS, None, call)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_cross_attention_is_that_of_each_pair(call: dict[str, Any]) -> None:
    check(LENGTHS, KEY_LENGTHS, call)


@pytest.mark.parametrize("call", CAUSAL.values(), ids=CAUSAL.keys())
def test_causal_attention_is_that_of_each_sequence(call: dict[str, Any]) -> None:
    check(LENGTHS, None, call)


@pytest.mark.parametrize("call", SHARED.values(), ids=SHARED.keys())
def test_attention_with_shared_queries_and_keys_is_that_of_each_sequence(call: dict[str, Any]) -> None:
    check(LENGTHS, None, call)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6), size=st.sampled_from([1, 4, 9]))
def test_any_lengths_are_fine(pairs: list[tuple[int, int]], size: int) -> None:
    lengths, key_lengths = [n for n, _ in pairs], [s for _, s in pairs]
    check(lengths, key_lengths, {**SMYRF, **OWN, "q_cluster_size": size})


def test_key_clusters_of_a_given_size_are_those_of_each_pair() -> None:
    check([8, 16, 16, 7], [4, 8, 7, 4], {**SMYRF, **OWN, "k_cluster_size": 4})


@pytest.mark.parametrize("call", [{"method": "dense"}, SMYRF, {"method": "clustered", **PLANES}])
def test_a_few_padded_batches_hold_all_sequences_and_little_padding(call: dict[str, Any]) -> None:
    lengths = torch.randint(16, 1025, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = packed._groups(lengths, lengths, call["method"], call)
    assert sorted(i for group in groups for i in group) == list(range(500))
    assert len(groups) <= 16
    for group in groups:
        assert min(lengths[i] for i in group) >= 0.75 * max(lengths[i] for i in group)


def test_sequences_share_the_draws_and_a_generator_fixes_them() -> None:
    lengths = [30, 7, 30]
    q, k, v = packed_inputs(lengths, lengths)
    first = slice(0, 30)
    twice = [torch.cat([x[first], x[30:37], x[first]]) for x in (q, k, v)]

    def out(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return attend(*twice, cu_seqlens=cu_seqlens(lengths), **SMYRF, generator=generator)

    assert torch.equal(out(0)[:30], out(0)[37:]) and torch.equal(out(0), out(0)) and not torch.equal(out(0), out(1))


@needs_compiler
@pytest.mark.parametrize("rotations", [None, LSH["rotations"]], ids=["drawn", "given"])
def test_lsh_gives_a_sequence_the_same_bits_in_any_company(rotations: Tensor | None) -> None:
    """Alone in its group, or beside others; and where rotations are given, in a batch of its own."""
    lengths = [30, 33, 7, 29, 64]
    q, _, v = packed_inputs(lengths, lengths)
    call: dict[str, Any] = {**LSH, "rotations": rotations, "is_causal": True, "impl": "triton"}

    def out(keep: list[int]) -> list[Tensor]:
        own_q, own_v = (torch.cat([x.split(lengths)[i] for i in keep]) for x in (q, v))
        kept, generator = [lengths[i] for i in keep], torch.Generator().manual_seed(0)
        return list(attend(own_q, own_q, own_v, cu_seqlens=cu_seqlens(kept), generator=generator, **call).split(kept))

    for i, (together, alone) in enumerate(zip(out([0, 1, 2, 3, 4]), [out([i])[0] for i in range(5)], strict=True)):
        assert torch.equal(together, alone)
        if rotations is not None:
            x, y = (z.split(lengths)[i].transpose(0, 1).unsqueeze(0) for z in (q, v))
            assert torch.equal(attend(x, x, y, **call).squeeze(0).transpose(0, 1), alone)


def test_dropout_differs_from_sequence_to_sequence() -> None:
    lengths = [30, 7, 30, 12, 7]
    parts = [packed_inputs([n], [n], seed=n) for n in lengths]
    q, k, v = (torch.cat([part[i] for part in parts]) for i in range(3))
    knobs: dict[str, Any] = {**SMYRF, **OWN, "dropout_p": 0.5, "seed": 1}
    out, again = (attend(q, k, v, cu_seqlens=cu_seqlens(lengths), **knobs) for _ in "ab")
    assert torch.equal(out, again)
    assert not torch.equal(out[:30], out[37:67]) and not torch.equal(out[30:37], out[79:])


GOOD: dict[str, Any] = {"cu_seqlens": cu_seqlens([3, 4])}
BAD: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "^cu_seqlens must be a", {"cu_seqlens": [0, 3, 7]}),
    (TypeError, "^cu_seqlens must be torch.int32, got torch.int64", {"cu_seqlens": torch.tensor([0, 3, 7])}),
    (ValueError, r"^cu_seqlens must have shape", {"cu_seqlens": cu_seqlens([3, 4]).unsqueeze(0)}),
    (ValueError, r"^cu_seqlens must have shape", {"cu_seqlens": cu_seqlens([])[:0]}),
    (ValueError, r"^cu_seqlens must start with 0, .* got \[1, 7\]", {"cu_seqlens": cu_seqlens([1, 6])[1:]}),
    (ValueError, r"^cu_seqlens .* length of q, 7, .* got \[0, 3, 6\]", {"cu_seqlens": cu_seqlens([3, 3])}),
    (ValueError, r"^cu_seqlens .* never fall; got \[0, 9, 7\]", {"cu_seqlens": cu_seqlens([9, -2])}),
    (
        ValueError,
        "^cu_seqlens_k must have as many sequences as cu_seqlens, 2, got 1",
        {"cu_seqlens_k": cu_seqlens([7])},
    ),
    (ValueError, "^is_causal needs as many keys", {"cu_seqlens_k": cu_seqlens([4, 3]), "is_causal": True}),
    (ValueError, "^local_window needs as many keys", {"cu_seqlens_k": cu_seqlens([4, 3]), "local_window": 2}),
    (ValueError, "^key_mask can't be given", {"key_mask": torch.ones(2, 4, dtype=torch.bool)}),
    (ValueError, "^return_lse can't be given", {"return_lse": True}),
    (ValueError, "^k must be q itself with method='lsh'", {"method": "lsh"}),
    (ValueError, "^unknown knob 'topk'", {"topk": 3}),
    (ValueError, "^q_cluster_size", {"q_cluster_size": 0}),
    (TypeError, "^k_cluster_size", {"k_cluster_size": 2.0}),
]


@pytest.mark.parametrize(("error", "words", "change"), BAD, ids=[words for _, words, _ in BAD])
def test_bad_input_is_named(error: type[Exception], words: str, change: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        attend(*packed_inputs([7], [7]), **(GOOD | change))


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "^cu_seqlens_k must be None with method='lsh'", {"cu_seqlens_k": cu_seqlens([3, 4])}),
        (ValueError, "^padding must be 'last' .* got 'hashed'", {"padding": "hashed"}),
        (ValueError, "^buckets can't be given", {"buckets": torch.zeros(1, HEADS, 3, 7, dtype=torch.int32)}),
        (ValueError, "^bucket_size must be at least 1", {"bucket_size": 0}),
        (TypeError, "^dense_threshold must be an int", {"dense_threshold": 8.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_of_lsh_is_named(error: type[Exception], words: str, change: dict[str, Any]) -> None:
    q, _, v = packed_inputs([7], [7])
    with pytest.raises(error, match=words):
        attend(q, q, v, **(GOOD | {"method": "lsh"} | change))


def test_tensors_of_another_rank_are_named() -> None:
    q, k, v = packed_inputs([7], [7])
    for name, x in (("q", (q.unsqueeze(0), k, v)), ("k", (q, k.unsqueeze(0), v)), ("v", (q, k, v[:, 0]))):
        with pytest.raises(ValueError, match=f"^{name} must have 3 dimensions"):
            attend(*x, **GOOD)
    with pytest.raises(ValueError, match=r"^v must have k's length 7"):
        attend(q, k, v[:5], **GOOD)


def test_nothing_in_gives_nothing_out() -> None:
    q, k, v = packed_inputs([0], [0])
    for edges in (cu_seqlens([]), cu_seqlens([0, 0])):
        out = attend(q, k, v, cu_seqlens=edges)
        assert out.shape == (0, HEADS, D)
        out.sum().backward()
