"""Attention of clusters' means to all keys, and the keys that each weighs most: ``fastattn::centroid_attention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op, refuse_gradient
from fastattn.reference import centroid_attention as reference


def centroid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    top_k: int = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention of a few queries, such as clusters' means, to many keys.

    Args:
        q: (B, H, C, D), k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv), of one dtype; H is a multiple of Hkv.
        key_mask: (B, S) bool, True for keys that take part.
        top_k: how many of its largest logits' keys to find for each query.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p, seed: as for :func:`fastattn.ops.topk_attention.topk_attention`, with the number of the query as its
            row.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`. The definition
            takes memory O(C * S).

    Returns:
        out (B, H, C, Dv) and lse (B, H, C), the logarithm of the softmax's denominator, both in fp32 (fp64 for fp64)
        and differentiable; 0 and -inf where no key takes part. topk_index (B, H, C, min(top_k, S)), int32: the keys of
        the largest logits, in no order, -1 where fewer keys take part.

    For methods: arguments are not checked. Extra memory is O(C * S / 16).
    """
    options, seed_tensor = _options(q, top_k, scale, dropout_p, seed)
    if impl != "reference":
        return _FORWARD(q, k, v, key_mask, seed_tensor, *options, impl is None)
    with no_autocast(q.device.type):
        return _define(q, k, v, key_mask, seed_tensor, *options)


def topk_keys(
    q: Tensor, k: Tensor, top_k: int, *, key_mask: Tensor | None = None, scale: float | None = None,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The topk_index of :func:`centroid_attention` alone, without the work that values take."""
    options, seed = _options(q, top_k, scale, 0.0, 0)
    if impl != "reference":
        return _FORWARD(q.detach(), k.detach(), None, key_mask, seed, *options, impl is None)[2]
    with no_autocast(q.device.type):
        return reference.topk_keys(q, k, top_k, key_mask=key_mask, scale=options[1])


def _options(
    q: Tensor, top_k: int, scale: float | None, dropout_p: float, seed: int | Tensor
) -> tuple[tuple[int, float, float], Tensor]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    draw = seed if isinstance(seed, Tensor) else q.new_full((), seed, dtype=torch.int64)
    return (top_k, scale, float(dropout_p)), draw


def _define(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, seed: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    top_k, scale, dropout_p = options
    index = reference.topk_keys(q, k, top_k, key_mask=key_mask, scale=scale)
    if v is None:
        out = q.new_empty((*q.shape[:3], 0), dtype=torch.promote_types(q.dtype, torch.float32))
        return out, out.new_empty((*q.shape[:2], 0)), index
    out, lse = reference.centroid_attention(q, k, v, key_mask=key_mask, scale=scale, dropout_p=dropout_p, seed=seed)
    return out, lse, index


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, seed: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *values, fallback = options

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        return kernel_room("centroid_attention").forward(q, k, v, key_mask, seed, *values, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(q.device.type):
            return _define(q, k, v, key_mask, seed, *values)

    return fused_or_defined("centroid attention", fused, defined, fallback=fallback)


def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (dout, dlse, q, k, v)

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        room = kernel_room("centroid_attention")
        return room.backward(*tensors, key_mask, seed, out, lse, scale, dropout_p, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(q.device.type):
            return reference.centroid_attention_backward(
                *tensors, out, lse, key_mask=key_mask, scale=scale, dropout_p=dropout_p, seed=seed
            )

    return fused_or_defined("centroid attention", fused, defined, fallback=fallback)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor | None, key_mask: Tensor | None, seed: Tensor, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    lead = q.shape[:3]
    out = q.new_empty((*lead, 0 if v is None else v.shape[3]), dtype=dtype)
    lse = q.new_empty(lead if v is not None else (*lead[:2], 0), dtype=dtype)
    return out, lse, q.new_empty((*lead, min(top_k, k.shape[2])), dtype=torch.int32)


def _fake_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_FORWARD = define_op(
    "centroid_attention(Tensor q, Tensor k, Tensor? v, Tensor? key_mask, Tensor seed, int top_k, float scale,"
    " float dropout_p, bool fallback) -> (Tensor out, Tensor lse, Tensor topk_index)",
    _forward,
    fake=_fake_forward,
)
_BACKWARD = define_op(
    "centroid_attention_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor seed,"
    " Tensor out, Tensor lse, float scale, float dropout_p, bool fallback) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    fake=_fake_backward,
)


class _CentroidAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, index = below(*args)
        ctx.save_for_backward(*args[:5], out, lse)
        ctx.options = args[6:]  # scale, dropout_p, fallback
        ctx.mark_non_differentiable(index)
        return out, lse, index

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dq, dk, dv = _BACKWARD(grads[0], grads[1], *ctx.saved_tensors, *ctx.options)
        return None, dq, dk, dv, *(None for _ in range(6))


define_autograd(_FORWARD, _CentroidAttention)
refuse_gradient(
    _BACKWARD, "centroid_attention has no second derivative; impl='reference' has one (slower, memory O(C * S))"
)
