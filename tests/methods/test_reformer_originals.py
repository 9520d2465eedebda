"""lsh_attention against reformer-pytorch, trax, Hugging Face's Reformer and fast-transformers.

The originals let a row attend to itself by a logit of -5e4 (reformer-pytorch) or -1e5 (trax, Hugging Face), where fp32
has steps of 0.004 or 0.008. Rows whose only key is their own are off by that much there, where they meet it several
times: those rows are left out, and ours must be their own value exactly. In causal attention the first row is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import lsh_attention
from fastattn.ops.hash_argmax import hash_argmax
from fastattn.reference import reformer as definition
from tests.accuracy import original
from tests.ops.cases import IMPLS

SIZE = 8  # of the fixtures' blocks


def has_another_key(buckets: Tensor, is_causal: bool, across_buckets: bool = True, look_ahead: int = 0) -> Tensor:
    """Rows (B, H, N) that meet another key than their own."""
    taking_part = torch.ones_like(buckets[:, 0, 0], dtype=torch.bool)
    count = definition.meeting_counts(
        buckets, taking_part, SIZE, look_ahead=look_ahead, across_buckets=across_buckets
    ).sum(2)
    count = count.tril() if is_causal else count
    return (count - torch.diag_embed(count.diagonal(dim1=-2, dim2=-1))).any(-1)


class TestReformerPytorch:
    """Its rows are (batch * heads, N, D): here heads of one example, which may have one rotation or one each."""

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        ("name", "knobs"),
        [
            ("lsh_rp_bidir", {}),
            ("lsh_rp_causal", {"is_causal": True}),
            ("lsh_rp_within_bucket", {"is_causal": True, "across_buckets": False}),
            # duplicates across rounds: the original weighs pairs that meet in wraps alone by 1e9. In this fixture there
            # are none, for buckets of different rounds do not mix
            ("lsh_rp_nodup_within", {"is_causal": True, "across_buckets": False, "correct_duplicates": True}),
        ],
    )
    def test_equals_it_forward_and_backward(self, name: str, knobs: dict[str, Any], impl: str) -> None:
        f = original(name)
        qk, v = (f[x].unsqueeze(0).requires_grad_() for x in ("qk", "v"))
        out = lsh_attention(qk, v, n_hashes=4, bucket_size=SIZE, rotations=f["rotations"], impl=impl, **knobs)
        buckets = hash_argmax(qk, f["rotations"], 8)
        met = has_another_key(buckets, knobs.get("is_causal", False), knobs.get("across_buckets", True))[0]
        assert met.float().mean() > 0.9
        torch.testing.assert_close(out[0][met], f["out"][met], rtol=0, atol=2e-6)
        assert torch.equal(out[0][~met], f["v"][~met])
        dqk, dv = torch.autograd.grad(out, (qk, v), f["w"].unsqueeze(0))
        torch.testing.assert_close(dqk[0], f["dqk"], rtol=0, atol=2e-6)
        # such a row is its own value's gradient too, off in the original by a step of its logits
        torch.testing.assert_close(dv[0][met], f["dv"][met], rtol=0, atol=2e-6)
        torch.testing.assert_close(dv[0], f["dv"], rtol=0, atol=5e-3)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_equals_it_with_a_mask(self, impl: str) -> None:
        """At the rows that take part: a padded one attends to itself in the original, and gives 0 here. There padding
        is sorted by its own hash."""
        f = original("lsh_rp_mask")
        mask = f["input_mask"]
        qk, v = (f[x].unsqueeze(1).requires_grad_() for x in ("qk", "v"))
        knobs: dict[str, Any] = {"key_mask": mask, "padding": "hashed", "rotations": f["rotations"], "impl": impl}
        out = lsh_attention(qk, v, n_hashes=4, bucket_size=SIZE, **knobs)
        dqk, dv = torch.autograd.grad(out, (qk, v), f["w"].unsqueeze(1))
        for ours, theirs in ((out, "out"), (dqk, "dqk"), (dv, "dv")):
            torch.testing.assert_close(ours[:, 0][mask], f[theirs][mask], rtol=0, atol=2e-6)
            assert not ours[:, 0][~mask].any()

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("is_causal", [False, True], ids=["both ways", "causal"])
    def test_equals_its_dense_attention_below_the_threshold(self, is_causal: bool, impl: str) -> None:
        f = original(f"fullqk_rp_{'causal' if is_causal else 'bidir'}")
        qk, v = (f[x].unsqueeze(0).requires_grad_() for x in ("qk", "v"))
        out = lsh_attention(qk, v, bucket_size=SIZE, dense_threshold=24, is_causal=is_causal, impl=impl)
        dqk, dv = torch.autograd.grad(out, (qk, v), f["w"].unsqueeze(0))
        for ours, theirs in ((out, "out"), (dqk, "dqk"), (dv, "dv")):
            torch.testing.assert_close(ours[0], f[theirs], rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["lsh_hf_bidir_after1", "lsh_hf_causal"])
def test_equals_hugging_faces_forward_and_backward(name: str, impl: str) -> None:
    """Its keys are q / sqrt(mean(q^2) + 1e-6) / sqrt(d): ours to 1e-5, with no further scale.

    Gradients sum over all rows, so that in the causal one those of the values, of which a row without another key is
    the mean of copies, carry the step of that row's logits: 0.008 of them. dW_qk has nothing of it.
    """
    f = original(name)
    is_causal = bool(f["causal"])
    x, w_qk, w_v = (f[y].requires_grad_() for y in ("x", "W_qk", "W_v"))
    qk, v = ((x @ w.T).unflatten(-1, (2, 8)).transpose(1, 2) for w in (w_qk, w_v))
    knobs: dict[str, Any] = {"scale": 1.0, "look_ahead": int(f["after"]), "is_causal": is_causal, "impl": impl}
    knobs |= {"n_hashes": 3, "bucket_size": SIZE, "n_buckets": int(f["num_buckets"]), "rotations": f["rotations"]}
    out = lsh_attention(qk, v, **knobs)
    met = has_another_key(hash_argmax(qk, f["rotations"], 8), is_causal, look_ahead=int(f["after"]))
    theirs = f["out"].unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(out[met], theirs[met], rtol=0, atol=1e-5)
    assert torch.equal(out[~met], v[~met]) and met.float().mean() > 0.9
    gradients = torch.autograd.grad(out.transpose(1, 2).flatten(2), (x, w_qk, w_v), f["w"])
    tolerance = 3e-2 if is_causal else 5e-5
    for ours, theirs_name, atol in zip(gradients, ("dx", "dW_qk", "dW_v"), (tolerance, 1e-4, tolerance), strict=True):
        torch.testing.assert_close(ours, f[theirs_name], rtol=0, atol=atol)


class TestTrax:
    """One head, forward."""

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        ("name", "knobs"),
        [
            ("lsh_trax_bidir_after1", {"n_buckets": 8, "look_ahead": 1}),
            ("lsh_trax_factored", {"n_buckets": (4, 4), "is_causal": True}),
        ],
    )
    def test_equals_it(self, name: str, knobs: dict[str, Any], impl: str) -> None:
        f = original(name)
        qk, v = ((f["x"] @ f[w])[None, None] for w in ("w_q", "w_v"))
        rotations = f["rotations"].unsqueeze(0)
        knobs |= {"n_hashes": 3, "bucket_size": SIZE, "rotations": rotations, "scale": 1.0}
        out = lsh_attention(qk, v, impl=impl, **knobs)[0, 0] @ f["w_o"]
        buckets = hash_argmax(qk, rotations, knobs["n_buckets"])
        met = has_another_key(buckets, knobs.get("is_causal", False), look_ahead=knobs.get("look_ahead", 0))[0, 0]
        assert met.float().mean() > 0.9
        torch.testing.assert_close(out[met], f["out"][met], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_equals_it_with_a_mask_where_it_keeps_to_the_mask(self, impl: str) -> None:
        """It marks padded keys by the sign of their position, and adds 1 first, so that rows 0 and 1, which this mask
        leaves out, stay keys. Rows that meet one of the two are left out; padded rows too, which give 0 here."""
        f = original("lsh_trax_masked")
        qk, v = ((f["x"] @ f[w])[None, None] for w in ("w_q", "w_v"))
        mask, rotations = f["mask"].unsqueeze(0), f["rotations"].unsqueeze(0)
        assert not mask[0, :2].any()
        out = lsh_attention(
            qk, v, n_hashes=3, bucket_size=SIZE, n_buckets=8, rotations=rotations, scale=1.0, key_mask=mask, impl=impl
        )
        buckets = hash_argmax(qk, rotations, 8).masked_fill(~mask, 8)  # where padding stands in the sort
        count = definition.meeting_counts(buckets, torch.ones_like(mask), SIZE).sum(2)[0, 0]
        right = mask[0] & ~count[:, :2].any(-1)
        assert right.sum() > 30
        torch.testing.assert_close((out[0, 0] @ f["w_o"])[right], f["out"][right], rtol=0, atol=1e-5)
        assert not out[0, 0][~mask[0]].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["lsh_ft_bidir", "lsh_ft_causal"])
def test_mean_of_rounds_equals_fast_transformers_forward_and_backward(name: str, impl: str) -> None:
    """Its sort keeps no order within a bucket: the places that it gave the rows are a fixture of
    their own, and stand for buckets here."""
    f = original(name)
    ranks = original(f"{name}_ranks")["ranks"]
    q, v = (f[x].transpose(1, 2).requires_grad_() for x in "qv")
    buckets = hash_argmax(q, f["planes"].permute(2, 0, 1).unsqueeze(0), 8)
    in_order = torch.empty_like(buckets).scatter_(-1, ranks.long(), buckets)
    assert (in_order.diff(dim=-1) >= 0).all()  # the places are those of a sort by our buckets
    out = lsh_attention(
        q, v, n_hashes=3, bucket_size=SIZE, buckets=ranks, merge="mean", is_causal=bool(f["causal"]), impl=impl
    )
    dq, dv = torch.autograd.grad(out, (q, v), f["w"].transpose(1, 2))
    for ours, theirs in ((out, "out"), (dq, "dq"), (dv, "dv")):
        torch.testing.assert_close(ours.transpose(1, 2), f[theirs], rtol=0, atol=2e-6)
