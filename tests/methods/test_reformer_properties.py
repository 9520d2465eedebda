"""What holds of lsh_attention for any input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import lsh_attention
from fastattn.reference.reformer import shared_qk_attention
from tests.ops.cases import needs_compiler

D, ROUNDS = 8, 3
lengths = st.integers(1, 60)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([3, 8, 16])
booleans = st.booleans()
# examples are drawn once for all, so that a run tests what the last one did
check = settings(max_examples=12, deadline=None, derandomize=True)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def knobs_for(seed: int, size: int, **more: Any) -> dict[str, Any]:
    rotations = normal(seed + 1, (1, D, ROUNDS, 4))[0]
    return {"n_hashes": ROUNDS, "bucket_size": size, "rotations": rotations} | more


@check
@given(n=lengths, is_causal=booleans, masked=booleans, seed=seeds)
def test_one_block_is_shared_qk_attention(n: int, is_causal: bool, masked: bool, seed: int) -> None:
    """With several rounds too: every key is then met as often. And so is what runs below the threshold."""
    qk, v, draw = normal(seed, (2, 2, n, D), (2, 1, n, D), (2, n))
    key_mask = draw < 0.5 if masked else None
    exact = shared_qk_attention(qk, v, is_causal=is_causal, key_mask=key_mask)
    for threshold in (0, n):
        knobs = knobs_for(seed, n, is_causal=is_causal, key_mask=key_mask, dense_threshold=threshold)
        out = lsh_attention(qk, v, impl="reference", **knobs)
        torch.testing.assert_close(out, exact, rtol=0, atol=5e-6)


@needs_compiler  # the definition takes minutes for 64 rounds
@pytest.mark.parametrize("is_causal", [False, True], ids=["both ways", "causal"])
def test_error_falls_with_rounds_and_to_nothing_where_duplicates_count_once(is_causal: bool) -> None:
    """A model that was trained with few rounds may be evaluated with more: nothing else changes."""
    qk, v = normal(0, *[(2, 4, 128, 16)] * 2)
    exact = shared_qk_attention(3 * qk, v, is_causal=is_causal)
    errors: dict[bool, list[float]] = {False: [], True: []}
    for correct, found in errors.items():
        for n_hashes in (1, 4, 16, 64):
            out = lsh_attention(
                3 * qk, v, n_hashes=n_hashes, bucket_size=16, look_ahead=1, is_causal=is_causal,
                correct_duplicates=correct, generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            found.append(float((out - exact).norm() / exact.norm()))
    for found in errors.values():
        assert all(later < 0.8 * earlier for earlier, later in pairwise(found)), errors
    assert errors[True][-1] < 0.05 * errors[True][0], errors
    assert all(once <= many for once, many in zip(errors[True], errors[False], strict=True)), errors


@check
@given(n=lengths, is_causal=booleans, correct=booleans, window=st.sampled_from([0, 5]), size=sizes, seed=seeds)
def test_what_masked_rows_hold_has_no_effect_on_any_bit(
    n: int, is_causal: bool, correct: bool, window: int, size: int, seed: int
) -> None:
    qk, v, draw = normal(seed, (2, 2, n, D), (2, 2, n, D), (2, n))
    mask = draw < 0.5
    knobs = knobs_for(seed, size, is_causal=is_causal, correct_duplicates=correct, local_window=window, key_mask=mask)
    results = []
    for filler in (0.0, 1e9, math.nan, math.inf):
        x = [torch.where(mask[:, None, :, None], y, filler).requires_grad_() for y in (qk, v)]
        out = lsh_attention(*x, impl="reference", **knobs)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for tensor in results[0]:
        assert torch.isfinite(tensor).all() and not tensor[~mask.unsqueeze(1).expand(-1, 2, -1)].any()


KNOBS = {
    "is_causal": booleans, "look_back": st.integers(0, 3), "look_ahead": st.integers(0, 2), "wrap": booleans,
    "correct_duplicates": booleans, "across_buckets": booleans, "local_window": st.sampled_from([0, 5]),
    "dense_threshold": st.sampled_from([None, 0, 3]), "n_hashes": st.integers(1, ROUNDS),
}  # fmt: skip


@settings(check, max_examples=16)
@given(
    ns=st.tuples(lengths, lengths), more=st.integers(0, 40), size=sizes, knobs=st.fixed_dictionaries(KNOBS), seed=seeds
)
def test_padding_is_ignored(ns: tuple[int, int], more: int, size: int, knobs: dict[str, Any], seed: int) -> None:
    """To rounding, wherever it stands and whatever stands beside it, forward and backward: each example of a batch has
    what its rows have without the others."""
    total = max(ns) + more
    x = [y.requires_grad_() for y in normal(seed, *[(2, 2, total, D)] * 2)]
    dout, draw = normal(seed + 1, (2, 2, total, D), (2, total))
    places = [row.argsort()[:n].sort().values for row, n in zip(draw, ns, strict=True)]
    mask = torch.stack([torch.zeros(total, dtype=torch.bool).index_fill(0, own, True) for own in places])
    knobs |= {"bucket_size": size, "rotations": normal(seed + 2, (1, D, knobs["n_hashes"], 4))[0], "impl": "reference"}
    out = lsh_attention(*x, key_mask=mask, **knobs)
    long = [out, *torch.autograd.grad(out, x, dout)]
    for b, own in enumerate(places):
        y = [z[b : b + 1, :, own].detach().requires_grad_() for z in x]
        alone = lsh_attention(*y, **knobs)
        wanted = [alone, *torch.autograd.grad(alone, y, dout[b : b + 1, :, own])]
        for name, padded, exact in zip(("out", "dqk", "dv"), long, wanted, strict=True):
            torch.testing.assert_close(padded[b : b + 1, :, own], exact, rtol=0, atol=2e-5, msg=name)
    assert not any(z.transpose(1, 2)[~mask].any() for z in long)


@check
@given(n=st.integers(2, 60), correct=booleans, window=st.sampled_from([0, 5]), size=sizes, seed=seeds)
def test_no_gradient_reaches_the_future_when_causal(n: int, correct: bool, window: int, size: int, seed: int) -> None:
    x = [y.requires_grad_() for y in normal(seed, *[(1, 2, n, D)] * 2)]
    knobs = knobs_for(seed, size, is_causal=True, correct_duplicates=correct, local_window=window)
    now = seed % (n - 1)
    out = lsh_attention(*x, impl="reference", **knobs)
    for gradient in torch.autograd.grad(out[:, :, : now + 1].sum(), x):
        assert not gradient[:, :, now + 1 :].any()


def test_no_gradient_reaches_the_future_through_the_kernels() -> None:
    x = [y.requires_grad_() for y in normal(0, *[(1, 2, 75, D)] * 2)]
    out = lsh_attention(*x, **knobs_for(0, 16, is_causal=True))
    for gradient in torch.autograd.grad(out[:, :, :31].sum(), x):
        assert not gradient[:, :, 31:].any() and gradient[:, :, :31].any()


@check
@given(n=lengths, is_causal=booleans, size=sizes, seed=seeds)
def test_examples_and_heads_are_independent(n: int, is_causal: bool, size: int, seed: int) -> None:
    qk, v, draw = normal(seed, (3, 2, n, D), (3, 2, n, D), (3, n))
    knobs = knobs_for(seed, size, is_causal=is_causal)
    out = lsh_attention(qk, v, key_mask=draw < 0.7, impl="reference", **knobs)
    alone = lsh_attention(qk[1:2, 1:], v[1:2, 1:], key_mask=draw[1:2] < 0.7, impl="reference", **knobs)
    torch.testing.assert_close(alone[0, 0], out[1, 1], rtol=0, atol=1e-6)


@check
@given(n=lengths, group=st.integers(2, 3), size=sizes, seed=seeds)
def test_grouped_values_are_repeated_values(n: int, group: int, size: int, seed: int) -> None:
    qk, v = normal(seed, (2, 2 * group, n, D), (2, 2, n, D))
    x = [y.requires_grad_() for y in (qk, v)]
    knobs = knobs_for(seed, size)
    out = lsh_attention(qk, v, impl="reference", **knobs)
    expected = lsh_attention(qk, v.repeat_interleave(group, 1), impl="reference", **knobs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), x)
    for a, b in zip(torch.autograd.grad(out.sum(), x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@check
@given(n=lengths, is_causal=booleans, size=sizes, seed=seeds)
def test_the_length_of_a_row_does_not_move_it(n: int, is_causal: bool, size: int, seed: int) -> None:
    """As a key and in the hash rows count by their direction alone: longer ones attend more sharply, no more."""
    qk, v = normal(seed, (1, 2, n, D), (1, 2, n, D))
    knobs = knobs_for(seed, size, is_causal=is_causal)
    out = lsh_attention(qk, v, impl="reference", scale=1.0, **knobs)
    torch.testing.assert_close(
        lsh_attention(4.0 * qk, v, impl="reference", scale=0.25, **knobs), out, rtol=0, atol=2e-6
    )
