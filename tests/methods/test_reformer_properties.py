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


@check
@given(n=lengths, is_causal=booleans, wrap=booleans, window=st.sampled_from([0, 5]), size=sizes, seed=seeds)
def test_padding_is_ignored(n: int, is_causal: bool, wrap: bool, window: int, size: int, seed: int) -> None:
    """To rounding, wherever it stands; with wrap, as long as it adds no block, to which a first block would look."""
    most = -n % size if wrap else 40
    total = n + seed % (most + 1)
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    x = normal(seed, *[(1, 2, n, D)] * 2)
    padded = [y.index_copy(2, places, z) for y, z in zip(normal(seed + 1, *[(1, 2, total, D)] * 2), x, strict=True)]
    mask = torch.zeros(1, total, dtype=torch.bool).index_fill(1, places, True)
    knobs = knobs_for(seed, size, is_causal=is_causal, wrap=wrap, local_window=window, dense_threshold=0)
    out = lsh_attention(*x, impl="reference", **knobs)
    long = lsh_attention(*padded, key_mask=mask, impl="reference", **knobs)
    torch.testing.assert_close(long[:, :, places], out, rtol=0, atol=2e-6)
    assert not long[:, :, ~mask[0]].any()


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
