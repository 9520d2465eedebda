"""The bodies of ClusterSums and ClusterBroadcast in ONNX Runtime, against the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference import cluster_attention as reference
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
C = 6


def rows_and_clusters(n: int, dtype: Any) -> tuple[Tensor, Tensor]:
    """The last cluster has no members; rows of none hold NaN."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2, 3, n, 5, generator=g).to(dtype)
    clusters = torch.randint(-1, C - 1, (2, 3, n), generator=g, dtype=torch.int32)
    return x.masked_fill(clusters.unsqueeze(-1) < 0, float("nan")), clusters


@DTYPES
@pytest.mark.parametrize("n", [1, 37])
def test_sums_and_counts_of_members(run_node: RunNode, n: int, dtype: Any) -> None:
    x, clusters = rows_and_clusters(n, dtype)
    outputs = {"sums": (torch.float32, 4), "counts": (torch.int32, 3)}
    sums, counts = run_node("ClusterSums", {"x": x, "clusters": clusters}, outputs, n_clusters=C)
    (plain, expected), (exact, _) = (reference.cluster_sums(y, clusters, C) for y in (x, x.double()))
    assert_as_accurate(sums, plain, exact)
    assert torch.equal(counts, expected) and not sums[:, :, -1].any()


@DTYPES
@pytest.mark.parametrize("n", [1, 37])
def test_each_row_gets_its_clusters_row(run_node: RunNode, n: int, dtype: Any) -> None:
    _, clusters = rows_and_clusters(n, dtype)
    values = torch.randn(2, 3, C, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    (out,) = run_node("ClusterBroadcast", {"values": values, "clusters": clusters}, {"out": (dtype, 4)})
    assert torch.equal(out, reference.cluster_broadcast(values, clusters))
