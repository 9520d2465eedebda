"""What holds of smyrf_attention for any input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import smyrf_attention

D = 8
lengths = st.integers(1, 70)
seeds = st.integers(0, 2**31)
cluster_sizes = st.sampled_from([3, 8, 16])
# what needs as many keys as queries comes second
OPTIONS: list[dict[str, Any]] = [{}, {"correct_duplicates": True}]
SELF_OPTIONS: list[dict[str, Any]] = [
    *OPTIONS,
    {"is_causal": True},
    {"local_window": 5},
    {"is_causal": True, "correct_duplicates": True, "local_window": 7},
]
options, self_options = st.sampled_from(OPTIONS), st.sampled_from(SELF_OPTIONS)
# examples are drawn once for all, so that a run tests what the last one did
check = settings(max_examples=25, deadline=None, derandomize=True)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention; 0 for an example without keys, and for its masked queries."""
    mask = None if key_mask is None else key_mask[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    return out if key_mask is None else out.nan_to_num(0.0)


@check
@given(n=lengths, s=lengths, group=st.integers(1, 3), n_hashes=st.integers(1, 5), seed=seeds)
def test_one_cluster_is_dense_attention(n: int, s: int, group: int, n_hashes: int, seed: int) -> None:
    """With several rounds too: every key is then met as often."""
    q, k, v = normal(seed, (1, 2 * group, n, D), (1, 2, s, D), (1, 2, s, D))
    out = smyrf_attention(q, k, v, n_hashes=n_hashes, q_cluster_size=n, impl="reference")
    torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=5e-6)


@check
@given(n=lengths, seed=seeds)
def test_one_cluster_with_a_mask_is_dense_attention_over_the_rows_that_take_part(n: int, seed: int) -> None:
    q, k, v = normal(seed, *[(2, 2, n, D)] * 3)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.6
    out = smyrf_attention(q, k, v, n_hashes=2, q_cluster_size=n, key_mask=mask, impl="reference")
    real = mask[:, None, :, None]
    torch.testing.assert_close(out, dense(q, k, v, mask) * real, rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_error_falls_with_rounds(seed: int) -> None:
    """In the mean, and to no limit: without duplicate correction keys are weighted by how often they are met. For
    Gaussian data, which has no clusters, relative errors near 2.2, 1.1, 0.6, 0.4 for 1, 4, 16, 64 rounds are usual."""
    q, k, v = normal(seed, *[(2, 4, 128, 16)] * 3)
    exact = dense(q, k, v)
    errors = []
    for n_hashes in (1, 4, 16, 64):
        g = torch.Generator().manual_seed(seed)
        out = smyrf_attention(q, k, v, n_hashes=n_hashes, q_cluster_size=16, generator=g)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert all(later < 0.8 * earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.25 * errors[0]


@check
@given(n=lengths, s=lengths, same=st.booleans(), size=cluster_sizes, option=self_options, seed=seeds)
def test_what_masked_rows_hold_has_no_effect_on_any_bit(
    n: int, s: int, same: bool, size: int, option: dict[str, Any], seed: int
) -> None:
    same = same or option not in OPTIONS
    s = n if same else s
    q, k, v, query_draw, key_draw = normal(seed, (2, 2, n, D), (2, 2, s, D), (2, 2, s, D), (2, n), (2, s))
    key_mask, query_mask = key_draw < 0.5, None if same else query_draw < 0.5
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "key_mask": key_mask, "query_mask": query_mask}
    knobs |= option
    projections = normal(seed + 1, (D + 2, 3))[0]
    results = []
    for filler in (0.0, 1e9, math.nan, math.inf):
        k_, v_ = (torch.where(key_mask[:, None, :, None], x, filler) for x in (k, v))
        q_ = torch.where((key_mask if same else query_mask)[:, None, :, None], q, filler)  # type: ignore[index]
        x = [y.requires_grad_() for y in (q_, k_, v_)]
        out = smyrf_attention(*x, projections=projections, **knobs)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert all(torch.isfinite(x).all() for x in results[0])


@check
@given(n=lengths, size=cluster_sizes, option=self_options, seed=seeds)
def test_padding_is_ignored(n: int, size: int, option: dict[str, Any], seed: int) -> None:
    """To rounding: matrix products may round a row's hash otherwise in a longer batch. Wherever the padding stands."""
    total = n + seed % 40
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    x = normal(seed, *[(1, 2, n, D)] * 3)
    padded = [y.index_copy(2, places, z) for y, z in zip(normal(seed + 1, *[(1, 2, total, D)] * 3), x, strict=True)]
    mask = torch.zeros(1, total, dtype=torch.bool).index_fill(1, places, True)
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "projections": normal(seed + 2, (D + 2, 3))[0]}
    knobs |= option
    out, lse = smyrf_attention(*x, return_lse=True, **knobs)
    long, long_lse = smyrf_attention(*padded, key_mask=mask, return_lse=True, **knobs)
    torch.testing.assert_close(long[:, :, places], out, rtol=0, atol=1e-6)
    torch.testing.assert_close(long_lse[:, :, places], lse, rtol=0, atol=2e-6)
    assert not long[:, :, ~mask[0]].any()


@check
@given(n=lengths, s=lengths, size=cluster_sizes, option=options, seed=seeds)
def test_order_of_keys_has_no_effect(n: int, s: int, size: int, option: dict[str, Any], seed: int) -> None:
    """But for ties, which random keys do not have."""
    q, k, v = normal(seed, (1, 2, n, D), (1, 2, s, D), (1, 2, s, D))
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "projections": normal(seed + 1, (D + 2, 3))[0]}
    knobs |= option
    out = smyrf_attention(q, k, v, **knobs)
    torch.testing.assert_close(smyrf_attention(q, k[:, :, order], v[:, :, order], **knobs), out, rtol=0, atol=5e-6)


@check
@given(n=lengths, size=cluster_sizes, option=options, seed=seeds)
def test_order_of_queries_only_reorders_the_output(n: int, size: int, option: dict[str, Any], seed: int) -> None:
    q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "projections": normal(seed + 1, (D + 2, 3))[0]}
    knobs |= option
    out = smyrf_attention(q, k, v, **knobs)
    torch.testing.assert_close(smyrf_attention(q[:, :, order], k, v, **knobs), out[:, :, order], rtol=0, atol=5e-6)


@check
@given(
    n=lengths, s=lengths, group=st.integers(2, 3), masked=st.booleans(), size=cluster_sizes, option=self_options,
    seed=seeds,
)  # fmt: skip
def test_grouped_heads_are_repeated_heads(
    n: int, s: int, group: int, masked: bool, size: int, option: dict[str, Any], seed: int
) -> None:
    s = s if option in OPTIONS else n
    q, k, v, draw = normal(seed, (2, 2 * group, n, D), (2, 2, s, D), (2, 2, s, D), (2, s))
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "key_mask": draw < 0.5 if masked else None}
    knobs |= option
    projections = normal(seed + 1, (D + 2, 3))[0]
    x = [y.requires_grad_() for y in (q, k, v)]
    repeated = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    out, expected = (smyrf_attention(*y, projections=projections, **knobs) for y in (x, repeated))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), x, retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@check
@given(n=lengths, s=lengths, size=cluster_sizes, option=self_options, seed=seeds)
def test_examples_and_heads_are_independent(n: int, s: int, size: int, option: dict[str, Any], seed: int) -> None:
    s = s if option in OPTIONS else n
    q, k, v, draw = normal(seed, (3, 2, n, D), (3, 2, s, D), (3, 2, s, D), (3, s))
    mask = draw < 0.7
    knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": size, "projections": normal(seed + 1, (D + 2, 3))[0]}
    knobs |= option
    out = smyrf_attention(q, k, v, key_mask=mask, **knobs)
    alone = smyrf_attention(q[1:2, 1:], k[1:2, 1:], v[1:2, 1:], key_mask=mask[1:2], **knobs)
    torch.testing.assert_close(alone[0, 0], out[1, 1], rtol=0, atol=1e-6)
