"""What holds of improved_clustered_attention for any input."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import improved_clustered_attention
from fastattn.reference.clustered import clustered_attention
from fastattn.reference.exact_topk import exact_topk_attention
from fastattn.reference.improved_clustered import improved_clustered_weights
from tests.ops.cases import needs_compiler

D, C = 8, 4
lengths = st.integers(1, 60)
topks = st.integers(1, 12)
seeds = st.integers(0, 2**31)
# examples are drawn once for all, so that a run tests what the last one did
check = settings(max_examples=15, deadline=None, derandomize=True)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def assignment(seed: int, *shape: int) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def improved(q: Tensor, k: Tensor, v: Tensor, **knobs: Any) -> Tensor:
    return improved_clustered_attention(q, k, v, n_clusters=C, **{"impl": "reference", **knobs})


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class TestLimits:
    @check
    @given(n=lengths, s=lengths, group=st.integers(1, 3), seed=seeds)
    def test_with_all_keys_in_the_lists_it_is_dense_whatever_the_clusters(
        self, n: int, s: int, group: int, seed: int
    ) -> None:
        q, k, v = normal(seed, (1, 2 * group, n, D), (1, 2, s, D), (1, 2, s, D))
        out = improved(q, k, v, topk=s, clusters=assignment(seed, 1, 2 * group, n))
        torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=5e-6)

    @check
    @given(n=lengths, seed=seeds)
    def test_so_it_is_with_a_cluster_for_each_query(self, n: int, seed: int) -> None:
        q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
        alone = torch.arange(n, dtype=torch.int32).expand(1, 2, n)
        out = improved_clustered_attention(q, k, v, n_clusters=n, topk=3, clusters=alone, impl="reference")
        torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=5e-6)

    @check
    @given(n=lengths, seed=seeds)
    def test_causal_with_all_keys_in_the_lists_it_is_dense_and_causal(self, n: int, seed: int) -> None:
        q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
        out = improved(q, k, v, topk=n, is_causal=True, clusters=assignment(seed, 1, 2, n))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
        torch.testing.assert_close(exact_topk_attention(q, k, v, topk=n, is_causal=True), expected, rtol=0, atol=5e-6)

    @check
    @given(n=lengths, topk=topks, seed=seeds)
    def test_causal_with_a_cluster_for_each_query_it_is_the_visible_part_of_the_exact_top_k(
        self, n: int, topk: int, seed: int
    ) -> None:
        q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
        alone = torch.arange(n, dtype=torch.int32).expand(1, 2, n)
        out = improved_clustered_attention(
            q, k, v, n_clusters=n, topk=topk, clusters=alone, is_causal=True, impl="reference"
        )
        last = exact_topk_attention(q, k, v, topk=topk)[:, :, -1]
        torch.testing.assert_close(out[:, :, -1], last, rtol=0, atol=5e-6)  # the last query sees all of its list


class TestWeights:
    @check
    @given(n=lengths, s=lengths, topk=topks, seed=seeds)
    def test_sum_up_to_one(self, n: int, s: int, topk: int, seed: int) -> None:
        q, k = normal(seed, (2, 2, n, D), (2, 2, s, D))
        out = improved(q, k, torch.ones(2, 2, s, 1), topk=topk, clusters=assignment(seed, 2, 2, n))
        torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=2e-6)

    @check
    @given(n=lengths, s=lengths, topk=topks, seed=seeds)
    def test_are_never_further_from_dense_ones_than_those_of_clustered_attention(
        self, n: int, s: int, topk: int, seed: int
    ) -> None:
        """In the sum of absolute differences: theorem 2 of the paper."""
        q, k = (3 * x.double() for x in normal(seed, (1, 2, n, D), (1, 2, s, D)))
        clusters = assignment(seed, 1, 2, n)
        exact = torch.softmax(q @ k.mT / math.sqrt(D), -1)
        # with the unit vectors as values, outputs are weights
        coarse = clustered_attention(q, k, torch.eye(s).double().expand(1, 2, s, s), clusters, C)
        fine = improved(q, k, torch.eye(s).double().expand(1, 2, s, s), topk=topk, clusters=clusters)
        written_out = improved_clustered_weights(q, k, clusters, C, topk=topk)
        torch.testing.assert_close(fine, written_out, rtol=0, atol=1e-12)
        assert ((fine - exact).abs().sum(-1) <= (coarse - exact).abs().sum(-1) + 1e-12).all()

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_come_closer_to_dense_ones_with_longer_lists(self, seed: int) -> None:
        q, k, v = normal(seed, *[(2, 4, 200, 16)] * 3)
        exact = dense(q, k, v)
        errors = []
        for topk in (1, 4, 16, 64, 200):
            g = torch.Generator().manual_seed(seed)
            out = improved_clustered_attention(q, k, v, n_clusters=10, topk=topk, generator=g, impl="reference")
            errors.append(float((out - exact).norm() / exact.norm()))
        assert all(later < earlier for earlier, later in pairwise(errors)) and errors[3] < 0.7 * errors[0], errors
        assert errors[-1] < 1e-5


class TestMasks:
    @check
    @given(n=lengths, s=lengths, same=st.booleans(), causal=st.booleans(), topk=topks, seed=seeds)
    def test_what_masked_rows_hold_has_no_effect_on_any_bit(
        self, n: int, s: int, same: bool, causal: bool, topk: int, seed: int
    ) -> None:
        s = n if same or causal else s
        q, k, v, query_draw, key_draw = normal(seed, (2, 2, n, D), (2, 2, s, D), (2, 2, s, D), (2, n), (2, s))
        key_mask, query_mask = key_draw < 0.5, None if same else query_draw < 0.5
        taking_part = key_mask if same else query_draw < 0.5
        knobs: dict[str, Any] = {"key_mask": key_mask, "query_mask": query_mask, "topk": topk, "is_causal": causal}
        results = []
        for filler in (0.0, 1e9, math.nan, math.inf):
            k_, v_ = (torch.where(key_mask[:, None, :, None], x, filler) for x in (k, v))
            q_ = torch.where(taking_part[:, None, :, None], q, filler)
            x = [y.requires_grad_() for y in (q_, k_, v_)]
            out = improved(*x, **knobs, generator=torch.Generator().manual_seed(seed))
            results.append((out, *torch.autograd.grad(out.sum(), x)))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        assert all(torch.isfinite(x).all() for x in results[0])
        assert not results[0][0].transpose(1, 2)[~taking_part].any()

    @check
    @given(n=lengths, topk=topks, causal=st.booleans(), seed=seeds)
    def test_padding_is_ignored_also_where_a_list_is_longer_than_the_example(
        self, n: int, topk: int, causal: bool, seed: int
    ) -> None:
        total = n + seed % 40
        x = normal(seed, *[(1, 2, n, D)] * 3)
        padded = [torch.nn.functional.pad(y, (0, 0, 0, total - n), value=7.0) for y in x]
        clusters = assignment(seed, 1, 2, total)
        mask = torch.arange(total).unsqueeze(0) < n
        out = improved(*x, topk=topk, clusters=clusters[..., :n], is_causal=causal)
        long = improved(*padded, topk=topk, clusters=clusters, key_mask=mask, is_causal=causal)
        torch.testing.assert_close(long[:, :, :n], out, rtol=0, atol=2e-6)
        assert not long[:, :, n:].any()


@needs_compiler
class TestTheFuture:
    @check
    @given(n=st.integers(2, 60), topk=topks, seed=seeds)
    def test_has_no_gradient_and_no_value(self, n: int, topk: int, seed: int) -> None:
        x = [y.requires_grad_() for y in normal(seed, *[(1, 2, n, D)] * 3)]
        clusters, cut = assignment(seed, 1, 2, n), 1 + seed % (n - 1)
        out = improved(*x, topk=topk, clusters=clusters, is_causal=True, impl="triton")
        for gradient in torch.autograd.grad(out[:, :, :cut].sum(), x):
            assert not gradient[:, :, cut:].any()
        changed = torch.cat([x[2][:, :, :cut], torch.full_like(x[2][:, :, cut:], math.nan)], 2)
        same = improved(x[0], x[1], changed, topk=topk, clusters=clusters, is_causal=True, impl="reference")
        before = improved(*x, topk=topk, clusters=clusters, is_causal=True)
        assert torch.equal(same[:, :, :cut], before[:, :, :cut])

    @check
    @given(n=lengths, topk=topks, seed=seeds)
    def test_alone_gives_exactly_zero(self, n: int, topk: int, seed: int) -> None:
        q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
        clusters = assignment(seed, 1, 2, n)
        out = improved(q, k, v, topk=topk, clusters=clusters, is_causal=True, impl="triton")
        blind = ~improved_clustered_weights(q, k, clusters, C, topk=topk, is_causal=True).any(-1)
        assert not out[blind].any()


@check
@given(n=lengths, s=lengths, topk=topks, seed=seeds)
def test_examples_and_heads_are_independent(n: int, s: int, topk: int, seed: int) -> None:
    q, k, v, draw = normal(seed, (3, 2, n, D), (3, 2, s, D), (3, 2, s, D), (3, s))
    mask, clusters = draw < 0.7, assignment(seed, 3, 2, n)
    out = improved(q, k, v, key_mask=mask, query_mask=None, topk=topk, clusters=clusters)
    alone = improved(
        q[1:2, 1:], k[1:2, 1:], v[1:2, 1:], key_mask=mask[1:2], topk=topk, clusters=clusters[1:2, 1:]
    )  # fmt: skip
    torch.testing.assert_close(alone[0, 0], out[1, 1], rtol=0, atol=2e-6)


@check
@given(n=lengths, s=lengths, group=st.integers(2, 3), topk=topks, seed=seeds)
def test_grouped_heads_are_repeated_heads(n: int, s: int, group: int, topk: int, seed: int) -> None:
    q, k, v = normal(seed, (2, 2 * group, n, D), (2, 2, s, D), (2, 2, s, D))
    clusters = assignment(seed, 2, 2 * group, n)
    out = improved(q, k, v, topk=topk, clusters=clusters)
    repeated = improved(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), topk=topk, clusters=clusters)
    torch.testing.assert_close(out, repeated, rtol=0, atol=2e-6)


@check
@given(n=lengths, topk=topks, seed=seeds)
def test_order_of_queries_only_reorders_and_that_of_keys_has_no_effect(n: int, topk: int, seed: int) -> None:
    q, k, v = normal(seed, *[(1, 2, n, D)] * 3)
    clusters = assignment(seed, 1, 2, n)
    g = torch.Generator().manual_seed(seed)
    rows, keys = torch.randperm(n, generator=g), torch.randperm(n, generator=g)
    out = improved(q, k, v, topk=topk, clusters=clusters)
    moved = improved(q[:, :, rows], k[:, :, keys], v[:, :, keys], topk=topk, clusters=clusters[..., rows])
    torch.testing.assert_close(moved, out[:, :, rows], rtol=0, atol=5e-6)


@needs_compiler
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_same_draws_give_same_bits_forward_and_backward(is_causal: bool) -> None:
    def run() -> tuple[Tensor, ...]:
        x = [y.requires_grad_() for y in normal(0, *[(2, 2, 60, D)] * 3)]
        knobs: dict[str, Any] = {"topk": 6, "dropout_p": 0.3, "is_causal": is_causal, "impl": "triton"}
        out = improved(*x, **knobs, generator=torch.Generator().manual_seed(3))
        return out, *torch.autograd.grad(out.sum(), x)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
