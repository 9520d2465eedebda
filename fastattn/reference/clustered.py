"""Clustered attention by definition (Vyas et al. 2020, "Fast Transformers with Clustered Attention", section 3.2).

All queries of a cluster get the attention of their mean. Memory is O(N * C + C * S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    n_clusters: int,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """out (B, H, N, Dv); the arguments as in :func:`fastattn.clustered_attention`, with the clusters (B, H, N) given,
    -1 for queries that take no part: these give 0, as do queries that see no key."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    q = q.masked_fill((clusters < 0).unsqueeze(-1), 0.0)  # masked rows may hold anything, NaN too
    member = (clusters.unsqueeze(-1) == torch.arange(n_clusters, device=q.device)).to(q.dtype)  # [B, H, N, C]
    means = member.mT @ q / member.sum(-2).clamp_min(1).unsqueeze(-1)
    if key_mask is None:
        return member @ (torch.softmax(means @ k.mT * scale, -1) @ v)
    real = key_mask[:, None, :, None]
    k, v = k.masked_fill(~real, 0.0), v.masked_fill(~real, 0.0)
    s = (means @ k.mT * scale).masked_fill(~real.mT, -math.inf)
    seen = real.any(2, keepdim=True)
    return member @ (torch.softmax(s.masked_fill(~seen, 0.0), -1) @ v)
