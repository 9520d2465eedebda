"""One token of causal linear attention as a torch op: ``fastattn::linear_attention_step``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_op, refuse_gradient
from fastattn.reference import linear_attention_step as reference


def step_linear(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, *, feature_map: str = "identity", eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, new S, new Z) of one token, for methods, which have checked their arguments and cast them already.

    q (B, H, 1, F), k (B, Hkv, 1, F), v (B, Hkv, 1, Dv); S (B, H, F, Dv) and Z (B, H, F) in fp32. One launch: half
    of the time of the definition's operations on a CPU, and those are ten launches on a GPU. Where a gradient is asked
    for, they run all the same.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, s, z)):
        with no_autocast(q.device.type):
            return reference.linear_attention_step(q, k, v, s, z, feature_map=feature_map, eps=eps)
    return _OP(q, k, v, s, z, feature_map, eps)


def _step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, feature_map: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def fused() -> tuple[Tensor, Tensor, Tensor]:
        return kernel_room("linear_attention_step").forward(q, k, v, s, z, feature_map, eps, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        with no_autocast(q.device.type):
            return reference.linear_attention_step(q, k, v, s, z, feature_map=feature_map, eps=eps)

    return fused_or_defined("a step of linear attention", fused, defined, fallback=True)


def _fake_step(q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty((*q.shape[:3], v.shape[3])), s.new_empty(s.shape), z.new_empty(z.shape)


_OP = define_op(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor s, Tensor z, str feature_map, float eps)"
    " -> (Tensor out, Tensor new_s, Tensor new_z)",
    _step,
    fake=_fake_step,
)
refuse_gradient(_OP, "fastattn::linear_attention_step is for inference; fastattn.linear_attention_step has gradients")
