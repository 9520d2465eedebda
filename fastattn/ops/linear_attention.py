"""Linear attention as a torch op: ``fastattn::linear_attention`` and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op, refuse_gradient
from fastattn.reference import linear_attention as reference

FEATURE_MAPS = ("elu", "relu", "relu2", "identity")


def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "identity",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    initial: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, state) of linear attention, for methods, which have checked their arguments and cast them already.

    q (B, H, N, F), k (B, Hkv, S, F) and v (B, Hkv, S, Dv) of one dtype, or q and k in fp32 beside any v: features that
    were made before. feature_map: one of :data:`FEATURE_MAPS`, applied here. initial: (B, H, F * (Dv + 1)) fp32, the
    state to begin with: S (F, Dv), then Z (F), flattened; the returned one has this form too, and both carry gradients.
    eps is added to the denominator. impl: see :func:`fastattn.methods.linear.linear_attention`.
    """
    if impl != "reference":
        out, _, state = _FORWARD(q, k, v, key_mask, initial, feature_map, is_causal, eps, impl is None)
        return out, state
    with no_autocast(q.device.type):
        out, _, state = reference.linear_attention(
            q, k, v, feature_map=feature_map, is_causal=is_causal, key_mask=key_mask, eps=eps, initial=initial
        )
    return out, state


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    initial: Tensor | None,
    feature_map: str,
    is_causal: bool,
    eps: float,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def fused() -> tuple[Tensor, Tensor, Tensor]:
        room = kernel_room("linear_attention")
        given = (_contiguous(key_mask), _contiguous(initial))
        return room.forward(q, k, v, *given, feature_map, is_causal, eps, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(q.device.type):
            return reference.linear_attention(
                q, k, v, feature_map=feature_map, is_causal=is_causal, key_mask=key_mask, eps=eps, initial=initial
            )

    return fused_or_defined("linear attention", fused, defined, fallback=fallback)


def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    initial: Tensor | None,
    out: Tensor,
    den: Tensor,
    state: Tensor,
    feature_map: str,
    is_causal: bool,
    fallback: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def fused() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        room = kernel_room("linear_attention")
        given = (_contiguous(key_mask), _contiguous(initial), out.contiguous(), den.contiguous(), state.contiguous())
        return room.backward(
            dout, _contiguous(dstate), q, k, v, *given, feature_map, is_causal, lookup, stamp()
        )  # fmt: skip

    def defined() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with no_autocast(q.device.type):
            return reference.linear_attention_backward(
                dout, dstate, q, k, v, out, den,
                feature_map=feature_map, is_causal=is_causal, key_mask=key_mask, initial=initial,
            )  # fmt: skip

    return fused_or_defined("linear attention", fused, defined, fallback=fallback)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n_queries, features = q.shape
    value_dim = v.shape[3]
    out = v.new_empty((batch, heads, n_queries, value_dim))
    den = q.new_empty((batch, heads, n_queries), dtype=torch.float32)
    return out, den, q.new_empty((batch, heads, features * (value_dim + 1)), dtype=torch.float32)


def _fake_backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = q.shape[3] * (v.shape[3] + 1)
    dinitial = q.new_empty((*q.shape[:2], size), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dinitial


_FORWARD = define_op(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? initial, str feature_map, bool is_causal,"
    " float eps, bool fallback) -> (Tensor out, Tensor den, Tensor state)",
    _forward,
    fake=_fake_forward,
)
_BACKWARD = define_op(
    "linear_attention_backward(Tensor dout, Tensor? dstate, Tensor q, Tensor k, Tensor v, Tensor? key_mask,"
    " Tensor? initial, Tensor out, Tensor den, Tensor state, str feature_map, bool is_causal, bool fallback)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dinitial)",
    _backward,
    fake=_fake_backward,
)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, den, state = below(*args)
        ctx.save_for_backward(*args[:5], out, den, state)
        ctx.feature_map, ctx.is_causal, _, ctx.fallback = args[5:]
        ctx.mark_non_differentiable(den)
        ctx.set_materialize_grads(False)
        return out, den, state

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, key_mask, initial, out, den, state = ctx.saved_tensors
        dout = torch.zeros_like(out) if grads[0] is None else grads[0]
        dq, dk, dv, dinitial = _BACKWARD(
            dout, grads[2], q, k, v, key_mask, initial, out, den, state, ctx.feature_map, ctx.is_causal, ctx.fallback
        )
        return None, dq, dk, dv, None, None if initial is None else dinitial, None, None, None, None


define_autograd(_FORWARD, _LinearAttention)
refuse_gradient(
    _BACKWARD, "linear_attention has no second derivative; impl='reference' has one (slower, and it keeps more memory)"
)
