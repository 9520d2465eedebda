"""Dense attention of a few queries, and the keys that each of them weighs most, by definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.dropout import kept


def centroid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse); see :func:`fastattn.ops.centroid_attention.centroid_attention` for the arguments. Both are in fp32
    (fp64 for fp64), and differentiable any number of times. Memory is O(C * S)."""
    v = _repeated(v, q, key_mask)
    s = logits(q, k, key_mask=key_mask, scale=scale)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))  # [B, H, C, S]
    if dropout_p:
        p = p * _dropped(p, dropout_p, seed)
    return p @ v, lse


def centroid_attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), in the inputs' dtypes, from the gradients of out and lse and what :func:`centroid_attention`
    returned."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    s = logits(q, k, key_mask=key_mask, scale=scale)
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    dropped = _dropped(p, dropout_p, seed) if dropout_p else 1.0
    dp = (dout @ _repeated(v, q, key_mask).mT) * dropped
    ds = p * (dp - ((dout * out).sum(-1) - dlse).unsqueeze(-1)) * scale
    dq = ds @ _repeated(k, q, key_mask)
    dk, dv = ds.mT @ q.to(ds.dtype), (p * dropped).mT @ dout
    dk, dv = (x.unflatten(1, (y.shape[1], -1)).sum(2).to(y.dtype) for x, y in ((dk, k), (dv, v)))
    return dq.to(q.dtype), dk, dv


@torch.no_grad()
def topk_keys(
    q: Tensor, k: Tensor, top_k: int, *, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """(B, H, C, min(top_k, S)), int32: the keys of the largest logits, -1 where fewer keys take part."""
    best, index = logits(q, k, key_mask=key_mask, scale=scale).topk(min(top_k, k.shape[2]), sorted=False)
    return index.masked_fill(best == -math.inf, -1).int()


def logits(q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """scale * q . k, (B, H, C, S), in fp32 (fp64 for fp64); -inf for keys that take no part."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k = _repeated(k, q, key_mask)
    s = q.to(k.dtype) @ k.mT * scale
    return s if key_mask is None else s.masked_fill(~key_mask[:, None, None], -math.inf)


def _repeated(x: Tensor, q: Tensor, key_mask: Tensor | None) -> Tensor:
    """x (B, Hkv, S, F) for each of q's heads, in fp32 (fp64 for fp64), with zeros in rows that take no part: what these
    hold, even NaN, has no effect."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).repeat_interleave(q.shape[1] // x.shape[1], 1)
    return x if key_mask is None else x.masked_fill(~key_mask[:, None, :, None], 0.0)


def _dropped(p: Tensor, dropout_p: float, seed: int | Tensor) -> Tensor:
    """What dropout makes of each probability 1: 0, or 1 / (1 - dropout_p)."""
    batch, heads, n_queries, n_keys = p.shape
    head = torch.arange(batch * heads, device=p.device).view(batch, heads, 1, 1)
    query = torch.arange(n_queries, device=p.device).unsqueeze(-1)
    stays = kept(dropout_p, seed, head, 0, query, torch.arange(n_keys, device=p.device))
    return stays.to(p.dtype) / (1 - dropout_p)
