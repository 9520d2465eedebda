"""One token of causal linear attention by definition (Katharopoulos et al. 2020, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.linear_attention import phi


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor, *, feature_map: str = "elu", eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, new S, new Z): S' = S + phi(k) v^T, Z' = Z + phi(k), out = phi(q) S' / (phi(q) . Z' + eps).

    q (B, H, 1, F), k (B, Hkv, 1, F), v (B, Hkv, 1, Dv), S (B, H, F, Dv), Z (B, H, F). Differentiable by plain autograd.
    fp16 and bf16 are computed in fp32. Where the denominator is 0, out is.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    x, y, values = phi(q.to(dtype), feature_map), phi(k.to(dtype), feature_map), v.to(dtype)
    if group > 1:
        y, values = y.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    s, z = torch.addcmul(s, y.mT, values), z + y.squeeze(2)
    den = x @ z.unsqueeze(-1) + eps
    empty = den == 0
    out = torch.where(empty, 0.0, (x @ s) / torch.where(empty, 1.0, den))
    return out.to(v.dtype), s, z
