"""cluster_sums and cluster_broadcast, kernel and definition alike, and the rows of each cluster in order."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.ops.cluster_attention import cluster_broadcast, cluster_sums
from fastattn.ops.cluster_members import members
from fastattn.reference import cluster_attention as reference
from tests.accuracy import assert_as_accurate
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, needs_compiler

# batch, heads, length, width, clusters
SHAPES = [(2, 2, 60, 16, 7), (1, 3, 47, 40, 20), (2, 1, 1, 1, 3), (1, 1, 2500, 80, 150), (1, 2, 33, 96, 1)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# each build takes a second: all shapes in fp32, one in the others
RUNS = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], dtype) for dtype in DTYPES[1:]]


def draws(batch: int, heads: int, length: int, width: int, n_clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, H, N, F), values (B, H, C, F) and clusters (B, H, N), some of them -1 and some empty."""
    g = torch.Generator().manual_seed(0)
    x, values = (torch.randn(batch, heads, rows, width, generator=g) for rows in (length, n_clusters))
    clusters = torch.randint(-1, max(1, n_clusters - 1), (batch, heads, length), generator=g, dtype=torch.int32)
    return x, values, clusters


@needs_compiler
@pytest.mark.parametrize(("shape", "dtype"), RUNS, ids=str)
def test_sums_are_as_accurate_as_plain_ones(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, _, clusters = draws(*shape)  # type: ignore[arg-type]
    x = x.to(dtype)
    sums, counts = cluster_sums(x, clusters, shape[-1], impl="triton")
    plain, plain_counts = reference.cluster_sums(x, clusters, shape[-1])
    exact, _ = reference.cluster_sums(x.double(), clusters, shape[-1])
    assert_as_accurate(sums, plain, exact)
    assert torch.equal(counts, plain_counts) and counts.dtype == torch.int32


@needs_compiler
@pytest.mark.parametrize(("shape", "dtype"), RUNS, ids=str)
def test_broadcast_copies(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _, values, clusters = draws(*shape)  # type: ignore[arg-type]
    out = cluster_broadcast(values, clusters, dtype=dtype, impl="triton")
    assert torch.equal(out, reference.cluster_broadcast(values, clusters).to(dtype))


def test_the_definition_is_a_product_with_a_one_hot_matrix_and_its_transpose() -> None:
    x, values, clusters = draws(*SHAPES[0])
    member = (clusters.unsqueeze(-1) == torch.arange(7)).float()
    sums, counts = reference.cluster_sums(x, clusters, 7)
    torch.testing.assert_close(sums, member.mT @ x)
    assert torch.equal(counts, member.sum(2).int())
    torch.testing.assert_close(reference.cluster_broadcast(values, clusters), member @ values)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_a_one_hot_matrix_give_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here."""
    from fastattn.kernels import cluster_attention as kernels

    x, _, clusters = draws(2, 2, 300, 40, 20)
    x = torch.where(clusters.unsqueeze(-1) < 0, math.nan, x).to(dtype)
    tile = Config({"BLOCK_N": 32, "BLOCK_C": 16, "SCATTER": 0})
    monkeypatch.setattr(kernels, "heuristic", lambda *args: tile)
    monkeypatch.setattr(kernels, "chunks", lambda length, device_type: (3, 128))
    sums, counts = kernels.sums(x, clusters, 20, stamp="of this test")
    expected, expected_counts = reference.cluster_sums(x, clusters, 20)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-5)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: Callable[[Tensor], Tensor], impl: str) -> None:
    x, values, clusters = draws(*SHAPES[0])
    x, values = layout(x), layout(values)
    sums, _ = cluster_sums(x, clusters, 7, impl=impl)
    assert torch.equal(sums, cluster_sums(x.contiguous(), clusters, 7, impl=impl)[0])
    out = cluster_broadcast(values, clusters, impl=impl)
    assert torch.equal(out, cluster_broadcast(values.contiguous(), clusters, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_each_is_the_gradient_of_the_other_any_number_of_times(impl: str) -> None:
    x, values, clusters = (t.requires_grad_() if t.is_floating_point() else t for t in draws(*SHAPES[0]))
    sums, counts = cluster_sums(x, clusters, 7, impl=impl)
    assert not counts.requires_grad
    (dx,) = torch.autograd.grad(sums, x, values, create_graph=True)
    assert torch.equal(dx, cluster_broadcast(values, clusters, impl="reference"))
    (again,) = torch.autograd.grad(dx, values, x.detach())
    torch.testing.assert_close(again, sums.detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_no_cluster_have_no_effect_and_no_gradient(impl: str) -> None:
    x, values, clusters = draws(*SHAPES[0])
    expected, _ = cluster_sums(x, clusters, 7, impl=impl)
    x = torch.where(clusters.unsqueeze(-1) < 0, math.nan, x).requires_grad_()
    sums, _ = cluster_sums(x, clusters, 7, impl=impl)
    assert torch.equal(sums, expected)
    (dx,) = torch.autograd.grad(sums, x, values)
    assert dx.isfinite().all() and not dx[clusters < 0].any()
    assert not cluster_broadcast(values, clusters, impl=impl)[clusters < 0].any()


def test_definitions_in_fp64_have_right_gradients() -> None:
    x, values, clusters = (t.double() if t.is_floating_point() else t for t in draws(1, 2, 6, 3, 3))
    assert torch.autograd.gradcheck(lambda x: cluster_sums(x, clusters, 3, impl="reference")[0], (x.requires_grad_(),))
    assert torch.autograd.gradcheck(
        lambda v: cluster_broadcast(v, clusters, impl="reference"), (values.requires_grad_(),)
    )


def test_opcheck() -> None:
    x, values, clusters = draws(*SHAPES[0])
    for grad in (False, True):
        args = (x.requires_grad_(grad), clusters, 7, True)
        torch.library.opcheck(torch.ops.fastattn.cluster_sums.default, args)
        args = (values.requires_grad_(grad), clusters, torch.float32, True)
        torch.library.opcheck(torch.ops.fastattn.cluster_broadcast.default, args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_members_stand_in_order(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *_, clusters = draws(*shape)  # type: ignore[arg-type]
    order, offsets = members(clusters.to(dtype), shape[-1])
    expected_order, expected_offsets = reference.members(clusters, shape[-1])
    assert torch.equal(order, expected_order) and order.dtype == torch.int32
    assert torch.equal(offsets, expected_offsets) and offsets.dtype == torch.int32
    for own, rows, edges in zip(
        clusters.flatten(0, 1).tolist(), order.flatten(0, 1).tolist(), offsets.flatten(0, 1).tolist(), strict=True
    ):
        for c in range(shape[-1]):
            assert rows[edges[c] : edges[c + 1]] == [row for row, cluster in enumerate(own) if cluster == c]
        assert rows[edges[-1] :] == [row for row, cluster in enumerate(own) if cluster < 0]
