"""Attention to each query's own largest keys: what methods that look for these keys are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.centroid_attention import logits


def exact_topk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int = 32,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax over the ``topk`` keys of largest logits of each query, as if there were no others.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), H a multiple of Hkv; fp16 and bf16 are computed in fp32.
    is_causal: only keys of rows up to the query's own. key_mask (B, S), True for keys that take part. With fewer keys
    than ``topk`` it is dense attention. Of keys of equal logits it is not said which are taken. Returns out
    (B, H, N, Dv) in q's dtype; a query that sees no key gives 0. Memory is O(N * S): this is no way to save any.
    """
    s = logits(q, k, key_mask=key_mask, scale=scale)  # [B, H, N, S]
    if is_causal:
        rows = torch.arange(s.shape[-2], device=s.device).unsqueeze(-1)
        s = s.masked_fill(torch.arange(s.shape[-1], device=s.device) > rows, -math.inf)
    chosen = s.topk(min(topk, s.shape[-1]), -1).indices
    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).scatter(-1, chosen, False), -math.inf)
    sees = (s != -math.inf).any(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(~sees, 0.0), -1).masked_fill(~sees, 0.0)
    v = v.to(p.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
    return (p @ v).to(q.dtype)
