"""Attention to the key list of a query's cluster as a torch op: ``fastattn::topk_attention`` and its backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.kernels.rows import check_rows
from fastattn.ops import checks
from fastattn.ops.autocast import cast_inputs, no_autocast
from fastattn.ops.block_attention import check_dropout
from fastattn.ops.cluster_members import members
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op, refuse_gradient
from fastattn.reference import topk_attention as reference


def topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    topk_index: Tensor,
    mass: Tensor | None = None,
    rest: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each query attends to the keys that the list of its cluster names.

    This is the fine part of improved clustered attention (Vyas et al. 2020, section 3.3): the keys of a cluster's list
    are weighted anew for each of its queries, and the weights of all of them together are the cluster's mass.

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16, any strides.
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv), in q's dtype; H is a multiple of Hkv, and query head h reads key head
            h // (H / Hkv).
        clusters: (B, H, N) int32: the cluster of each query, 0 to C - 1, or -1 for queries that take no part.
        topk_index: (B, H, C, K) int32: the key rows of each cluster, -1 for none. A key may stand in many lists; twice
            in one, it counts twice. Values of S and more, or below -1, raise before anything is read: ValueError on the
            CPU, a failed device-side assertion elsewhere, where looking at them would make the host wait.
        mass: (B, H, C), any floating dtype: what the weights of a query of that cluster sum up to; None is 1.
        rest: (B, H, C, Dv), any floating dtype: added to the result of each query of that cluster; None is 0.
        is_causal: a query attends only to keys whose row is not after its own.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: the probability of a weight to be dropped, after the softmax; kept ones are divided by 1 - dropout_p.
        seed: of dropout, from 0 to 2^63 - 1, or such a number in an int64 tensor without dimensions. What is dropped is
            a function of it, batch, head, query row and key row (see :mod:`fastattn.reference.dropout`).
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`. The definition
            takes memory O(N * K * D).

    Returns:
        out (B, H, N, Dv) in q's dtype and lse (B, H, N), the logarithm of the softmax's denominator, in fp32 (fp64 for
        fp64). A query that met no key has lse -inf, and out is the rest of its cluster; one of no cluster has 0. Both
        are differentiable, in q, k, v, mass and rest.

    Under autocast q, k and v are cast to its dtype, as by ``scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(q=q, k=k, v=v, clusters=clusters, topk_index=topk_index)
    checks.check_choice("impl", impl, checks.IMPLS)
    q, k, v = cast_inputs(q, k, v)
    checks.check_qkv(q, k, v, impl)
    for name, index in (("clusters", clusters), ("topk_index", topk_index)):
        if index.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {index.dtype}")
        checks.check_device(name, index, q.device)
    if clusters.shape != q.shape[:3]:
        raise ValueError(
            f"clusters must have shape (batch, heads, length) = {tuple(q.shape[:3])}, got {tuple(clusters.shape)}"
        )
    if topk_index.dim() != 4 or topk_index.shape[:2] != q.shape[:2] or 0 in topk_index.shape:
        raise ValueError(
            f"topk_index must have shape (batch, heads, clusters, keys) = ({q.shape[0]}, {q.shape[1]}, ...), not "
            f"empty, got {tuple(topk_index.shape)}"
        )
    lists = topk_index.shape[:3]
    _check_of_cluster("mass", mass, lists, q.device)
    _check_of_cluster("rest", rest, (*lists, v.shape[3]), q.device)
    checks.check_bool("is_causal", is_causal)
    checks.check_scale(scale)
    check_dropout(dropout_p, seed, q.device)
    check_rows("clusters", clusters, topk_index.shape[2], "numbers")
    order, offsets = members(clusters, topk_index.shape[2])
    return attend_lists(
        q,
        k,
        v,
        order,
        offsets,
        topk_index,
        mass,
        rest,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        impl=impl,
    )


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_index: Tensor,
    mass: Tensor | None = None,
    rest: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`topk_attention` for methods, which have checked their arguments and cast them already.

    order, offsets: the clusters, as :func:`~fastattn.ops.cluster_members.members` gives them.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lists = topk_index.shape[:3]
    mass = q.new_ones(lists, dtype=dtype) if mass is None else mass.to(dtype)
    rest = q.new_zeros((*lists, v.shape[3]), dtype=dtype) if rest is None else rest.to(dtype)
    draw = seed if isinstance(seed, Tensor) else order.new_full((), seed, dtype=torch.int64)
    options = (draw, is_causal, scale, float(dropout_p))
    if impl != "reference":
        return _FORWARD(q, k, v, order, offsets, topk_index, mass, rest, *options, impl is None)
    check_rows("topk_index", topk_index, k.shape[2])
    with no_autocast(q.device.type):
        out, lse = reference.topk_attention(
            q, k, v, _clusters(order, offsets), topk_index, mass, rest, **_reference_options(options)
        )
    return out, lse


def _check_of_cluster(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    if value is None:
        return
    checks.check_tensors(**{name: value})
    if not value.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, as topk_index and v have it, got {tuple(value.shape)}"
        )
    checks.check_device(name, value, device)


def _clusters(order: Tensor, offsets: Tensor) -> Tensor:
    """The cluster of each query (B, H, N), from how they are sorted; -1 for queries of none."""
    places = torch.arange(order.shape[2], device=order.device, dtype=torch.int32).expand_as(order).contiguous()
    # the last cluster to begin at the place or before, so that empty ones, which begin where another does, have none
    number = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    number = number.masked_fill(number >= offsets.shape[2] - 1, -1)
    return torch.empty_like(number).scatter_(2, order.long(), number).int()


def _reference_options(options: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("seed", "is_causal", "scale", "dropout_p"), options, strict=True))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_index: Tensor,
    mass: Tensor,
    rest: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *values, fallback = options

    def fused() -> tuple[Tensor, Tensor]:
        lists = (order.contiguous(), offsets.contiguous(), topk_index.contiguous())
        return kernel_room("topk_attention").forward(q, k, v, *lists, mass, rest, *values, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor]:
        check_rows("topk_index", topk_index, k.shape[2])
        named = _reference_options(tuple(values))
        with no_autocast(q.device.type):
            return reference.topk_attention(q, k, v, _clusters(order, offsets), topk_index, mass, rest, **named)

    return fused_or_defined("top-k attention", fused, defined, fallback=fallback)


def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    topk_index: Tensor,
    mass: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *values, fallback = options

    def fused() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        lists = (order.contiguous(), offsets.contiguous(), topk_index.contiguous())
        return kernel_room("topk_attention").backward(dout, dlse, q, k, v, *lists, mass, lse, *values, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        check_rows("topk_index", topk_index, k.shape[2])
        tensors = (dout, dlse, q, k, v, _clusters(order, offsets), topk_index, mass, lse)
        with no_autocast(q.device.type):
            return reference.topk_attention_backward(*tensors, **_reference_options(tuple(values)))

    return fused_or_defined("top-k attention", fused, defined, fallback=fallback)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n_queries, _ = q.shape
    out = q.new_empty((batch, heads, n_queries, v.shape[3]))
    return out, q.new_empty((batch, heads, n_queries), dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, order: Tensor, offsets: Tensor, topk_index: Tensor,
    mass: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    drest = mass.new_empty((*mass.shape, v.shape[3]))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), mass.new_empty(mass.shape), drest


# as _reference_options, fallback
_OPTIONS = "Tensor seed, bool is_causal, float scale, float dropout_p, bool fallback"
_FORWARD = define_op(
    "topk_attention(Tensor q, Tensor k, Tensor v, Tensor order, Tensor offsets, Tensor topk_index, Tensor mass,"
    f" Tensor rest, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    _forward,
    fake=_fake_forward,
)
_BACKWARD = define_op(
    "topk_attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor order, Tensor offsets,"
    f" Tensor topk_index, Tensor mass, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmass, Tensor drest)",
    _backward,
    fake=_fake_backward,
)


class _TopkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = below(*args)
        ctx.save_for_backward(*args[:7], lse, args[8])
        ctx.options = args[9:]
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dq, dk, dv, dmass, drest = _BACKWARD(*grads, *ctx.saved_tensors, *ctx.options)
        return None, dq, dk, dv, None, None, None, dmass, drest, None, *(None for _ in ctx.options)


define_autograd(_FORWARD, _TopkAttention)
refuse_gradient(
    _BACKWARD, "topk_attention has no second derivative; impl='reference' has one (slower, memory O(N * K * D))"
)
