"""What holds of clustered_attention for any input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import clustered_attention
from fastattn.methods.clustered import assign_clusters
from tests.methods.test_smyrf_properties import dense, normal

D, BITS, C = 8, 24, 6
lengths = st.integers(1, 60)
seeds = st.integers(0, 2**31)
check = settings(max_examples=15, deadline=None, derandomize=True)


def draws(seed: int, n: int, n_clusters: int = C) -> dict[str, Any]:
    """Planes and first centroids, and a generator for what else is drawn."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(n, (n_clusters,), generator=g)
    planes = torch.randn(BITS, D + 1, generator=g)
    return {"planes": planes, "n_bits": BITS, "n_clusters": n_clusters, "initial_centroids": rows, "generator": g}


@check
@given(n=lengths, s=lengths, group=st.integers(1, 3), copies=st.integers(1, 3), seed=seeds)
def test_as_many_clusters_as_distinct_queries_is_dense_attention(
    n: int, s: int, group: int, copies: int, seed: int
) -> None:
    """If their codes differ: each distinct query is a first centroid here, at distance 0 from its copies alone."""
    q, k, v = normal(seed, (1, 2 * group, n, D), (1, 2, s, D), (1, 2, s, D))
    q = q.repeat(1, 1, copies, 1)
    knobs = draws(seed, n) | {"n_clusters": n, "initial_centroids": torch.arange(n), "n_bits": 63}
    knobs["planes"] = normal(seed + 1, (63, D + 1))[0]
    clusters = assign_clusters(q, n_iterations=10, query_mask=None, clusters=None, **knobs)
    out = clustered_attention(q, k, v, n_clusters=n, clusters=clusters)
    # where two of them share a code, they share a cluster too
    alone = [torch.unique(row[:n]).numel() == n for row in clusters[0]]
    expected = dense(q, k, v)
    torch.testing.assert_close(out[:, alone], expected[:, alone], rtol=0, atol=5e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_error_falls_with_clusters(seed: int) -> None:
    q, k, v = normal(seed, *[(1, 8, 256, 16)] * 3)
    exact, errors = dense(q, k, v), []
    for n_clusters in (1, 16, 64, 256):
        g = torch.Generator().manual_seed(seed)
        out = clustered_attention(q, k, v, n_clusters=n_clusters, generator=g)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert all(later < earlier for earlier, later in pairwise(errors)), errors
    assert errors[-1] < 0.4 * errors[0]


@check
@given(n=st.integers(2, 60), s=lengths, scale=st.floats(0.05, 1.0), seed=seeds)
def test_attention_is_off_by_no_more_than_the_distance_to_the_mean_allows(
    n: int, s: int, scale: float, seed: int
) -> None:
    """Theorem 1 of the paper: attention weights of two queries differ by at most scale * distance * |K|, in norms of 2.
    With the unit matrix as values, what comes out is the weights themselves."""
    q, k = normal(seed, (1, 1, n, D), (1, 1, s, D))
    v = torch.eye(s)[None, None]
    knobs = draws(seed, n)
    clusters = assign_clusters(q, n_iterations=10, query_mask=None, clusters=None, **knobs)
    out = clustered_attention(q, k, v, n_clusters=C, clusters=clusters, scale=scale)
    exact = torch.softmax(q @ k.mT * scale, -1)
    member = (clusters.unsqueeze(-1) == torch.arange(C)).float()
    mean = member @ (member.mT @ q / member.sum(2).clamp_min(1).unsqueeze(-1))
    bound = scale * (q - mean).norm(dim=-1) * torch.linalg.matrix_norm(k[0, 0], 2)
    assert ((out - exact).norm(dim=-1) <= bound + 1e-5).all()


@check
@given(n=lengths, s=lengths, same=st.booleans(), seed=seeds)
def test_what_masked_rows_hold_has_no_effect_on_any_bit(n: int, s: int, same: bool, seed: int) -> None:
    s = n if same else s
    q, k, v, query_draw, key_draw = normal(seed, (2, 2, n, D), (2, 2, s, D), (2, 2, s, D), (2, n), (2, s))
    key_mask, query_mask = key_draw < 0.5, None if same else query_draw < 0.5
    results = []
    for filler in (0.0, 1e9, math.nan, math.inf):
        k_, v_ = (torch.where(key_mask[:, None, :, None], x, filler) for x in (k, v))
        q_ = torch.where((key_mask if query_mask is None else query_mask)[:, None, :, None], q, filler)
        x = [y.requires_grad_() for y in (q_, k_, v_)]
        knobs = draws(seed, n) | {"initial_centroids": None}  # a given one might be padding
        out = clustered_attention(*x, key_mask=key_mask, query_mask=query_mask, **knobs)
        results.append((out, *torch.autograd.grad(out.sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert all(torch.isfinite(x).all() for x in results[0])


@check
@given(n=lengths, s=lengths, seed=seeds)
def test_padding_is_ignored(n: int, s: int, seed: int) -> None:
    """To rounding, wherever it stands, given the same planes and first centroids."""
    total = n + seed % 40
    places = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].sort().values
    q, k, v, filler = normal(seed, (1, 2, n, D), (1, 2, s, D), (1, 2, s, D), (1, 2, total, D))
    padded = filler.index_copy(2, places, q)
    mask = torch.zeros(1, total, dtype=torch.bool).index_fill(1, places, True)
    out = clustered_attention(q, k, v, **draws(seed, n))
    knobs = draws(seed, n)
    knobs["initial_centroids"] = places[knobs["initial_centroids"]]
    long = clustered_attention(padded, k, v, query_mask=mask, **knobs)
    torch.testing.assert_close(long[:, :, places], out, rtol=0, atol=2e-6)
    assert not long[:, :, ~mask[0]].any()


@check
@given(n=lengths, s=lengths, seed=seeds)
def test_order_of_keys_has_no_effect(n: int, s: int, seed: int) -> None:
    q, k, v = normal(seed, (1, 2, n, D), (1, 2, s, D), (1, 2, s, D))
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    out, turned = (clustered_attention(q, *kv, **draws(seed, n)) for kv in ((k, v), (k[:, :, order], v[:, :, order])))
    torch.testing.assert_close(turned, out, rtol=0, atol=5e-6)


@check
@given(n=lengths, s=lengths, seed=seeds)
def test_order_of_queries_only_reorders_the_output(n: int, s: int, seed: int) -> None:
    q, k, v = normal(seed, (1, 2, n, D), (1, 2, s, D), (1, 2, s, D))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    out = clustered_attention(q, k, v, **draws(seed, n))
    knobs = draws(seed, n)
    knobs["initial_centroids"] = order.argsort()[knobs["initial_centroids"]]
    turned = clustered_attention(q[:, :, order], k, v, **knobs)
    torch.testing.assert_close(turned, out[:, :, order], rtol=0, atol=5e-6)


@check
@given(n=lengths, s=lengths, group=st.integers(2, 3), seed=seeds)
def test_grouped_heads_are_repeated_heads(n: int, s: int, group: int, seed: int) -> None:
    x = [y.requires_grad_() for y in normal(seed, (2, 2 * group, n, D), (2, 2, s, D), (2, 2, s, D))]
    repeated = (x[0], *(y.repeat_interleave(group, 1) for y in x[1:]))
    out, expected = (clustered_attention(*y, **draws(seed, n)) for y in (x, repeated))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), x)
    for a, b in zip(torch.autograd.grad(out.sum(), x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@check
@given(n=lengths, s=lengths, seed=seeds)
def test_examples_and_heads_are_independent(n: int, s: int, seed: int) -> None:
    q, k, v, draw = normal(seed, (3, 2, n, D), (3, 2, s, D), (3, 2, s, D), (3, n))
    mask = draw < 0.7

    def attend(*x: Tensor, mask: Tensor) -> Tensor:
        knobs = draws(seed, n) | {"initial_centroids": None}
        return clustered_attention(*x, query_mask=mask, **knobs)

    out = attend(q, k, v, mask=mask)
    alone = attend(q[1:2, 1:], k[1:2, 1:], v[1:2, 1:], mask=mask[1:2])
    torch.testing.assert_close(alone[0, 0], out[1, 1], rtol=0, atol=1e-6)
