"""Rows to clusters and back, as torch ops: ``fastattn::cluster_sums`` and ``fastattn::cluster_broadcast``.

Each is linear and the other's transpose, so each is the other's gradient, any number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op
from fastattn.reference import cluster_attention as reference


def cluster_sums(x: Tensor, clusters: Tensor, n_clusters: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Sums and numbers of the members of each cluster.

    Args:
        x: (B, H, N, F); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        clusters: (B, H, N) int32, 0 to C - 1, or -1 for rows of no cluster, which may hold anything, NaN too.
        n_clusters: C.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        sums (B, H, C, F), fp32 (fp64 for fp64), and counts (B, H, C), int32, which carry no gradient.

    For methods: arguments are not checked. The order of additions does not depend on threads or devices' moods: same
    input, same device, same bits.
    """
    if impl == "reference":
        return reference.cluster_sums(x, clusters, n_clusters)
    return _SUMS(x, clusters, n_clusters, impl is None)


def cluster_broadcast(
    values: Tensor, clusters: Tensor, *, dtype: torch.dtype | None = None, impl: str | None = None
) -> Tensor:
    """The row of its cluster for each row: out[b, h, n] = values[b, h, clusters[b, h, n]], and 0 for rows of none.

    Args:
        values: (B, H, C, F), of any floating dtype.
        clusters: (B, H, N) int32, 0 to C - 1, or -1.
        dtype: of the result; None: that of ``values``.
        impl: as for :func:`cluster_sums`.

    Returns:
        (B, H, N, F). For methods: arguments are not checked.
    """
    dtype = values.dtype if dtype is None else dtype
    if impl == "reference":
        return reference.cluster_broadcast(values, clusters).to(dtype)
    return _BROADCAST(values, clusters, dtype, impl is None)


def _sums(x: Tensor, clusters: Tensor, n_clusters: int, fallback: bool) -> tuple[Tensor, Tensor]:
    def fused() -> tuple[Tensor, Tensor]:
        return kernel_room("cluster_attention").sums(x, clusters, n_clusters, lookup, stamp())

    return fused_or_defined(
        "cluster_sums", fused, lambda: reference.cluster_sums(x, clusters, n_clusters), fallback=fallback
    )


def _broadcast(values: Tensor, clusters: Tensor, dtype: torch.dtype, fallback: bool) -> Tensor:
    def fused() -> Tensor:
        return kernel_room("cluster_attention").broadcast(values, clusters, dtype, lookup, stamp())

    return fused_or_defined(
        "cluster_broadcast",
        fused,
        lambda: reference.cluster_broadcast(values, clusters).to(dtype),
        fallback=fallback,
    )


def _fake_sums(x: Tensor, clusters: Tensor, n_clusters: int, fallback: bool) -> tuple[Tensor, Tensor]:
    shape = (*clusters.shape[:2], n_clusters)
    return x.new_empty((*shape, x.shape[3]), dtype=torch.float32), clusters.new_empty(shape)


def _fake_broadcast(values: Tensor, clusters: Tensor, dtype: torch.dtype, fallback: bool) -> Tensor:
    return values.new_empty((*clusters.shape, values.shape[3]), dtype=dtype)


_SUMS = define_op(
    "cluster_sums(Tensor x, Tensor clusters, int n_clusters, bool fallback) -> (Tensor sums, Tensor counts)",
    _sums,
    fake=_fake_sums,
)
_BROADCAST = define_op(
    "cluster_broadcast(Tensor values, Tensor clusters, ScalarType dtype, bool fallback) -> Tensor",
    _broadcast,
    fake=_fake_broadcast,
)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
        x, clusters, _, fallback = args
        sums, counts = below(*args)
        ctx.save_for_backward(clusters)
        ctx.dtype, ctx.fallback = x.dtype, fallback
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (clusters,) = ctx.saved_tensors
        return None, _BROADCAST(grads[0], clusters, ctx.dtype, ctx.fallback), None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> Tensor:
        values, clusters, _, fallback = args
        ctx.save_for_backward(clusters)
        ctx.dtype, ctx.n_clusters, ctx.fallback = values.dtype, values.shape[2], fallback
        return below(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (clusters,) = ctx.saved_tensors
        sums, _ = _SUMS(grads[0], clusters, ctx.n_clusters, ctx.fallback)
        return None, sums.to(ctx.dtype), None, None, None


define_autograd(_SUMS, _Sums)
define_autograd(_BROADCAST, _Broadcast)
