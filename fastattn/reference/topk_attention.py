"""Attention to the key list of a query's cluster by definition: out = mass * softmax(scale * q . k) v + rest, over the
keys of the list.

:func:`topk_attention` is differentiable by plain autograd, any number of times. :func:`topk_attention_backward` is the
same gradient written out. Both take memory O(N * K * D): each query has its keys for itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.reference.dropout import kept


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
) -> tuple[Tensor, Tensor]:
    """(out, lse); see :func:`fastattn.ops.topk_attention.topk_attention` for the arguments.

    fp16 and bf16 are computed in fp32. out (B, H, N, Dv) has q's dtype; lse (B, H, N) is fp32 (fp64 for fp64). A query
    that meets no key has lse -inf, out ``rest`` or 0, and no gradient by its keys.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    lists = _Lists(q, k, v, clusters, topk_index, is_causal)
    s = lists.scores(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    lse = torch.logsumexp(s, -1)  # [B, H, N]
    met = lists.keep.any(-1)
    p = torch.exp(s - torch.where(met, lse, 0.0).unsqueeze(-1))  # [B, H, N, K]
    if dropout_p:
        p = p * lists.dropped(dropout_p, seed)
    out = (p.unsqueeze(-2) @ lists.v).squeeze(-2)
    if mass is not None:
        out = out * _of_cluster(mass.to(dtype), clusters).unsqueeze(-1)
    if rest is not None:
        out = out + _of_cluster(rest.to(dtype), clusters)
    return out.to(q.dtype), lse


def topk_attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    topk_index: Tensor,
    mass: Tensor,
    lse: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmass, drest) from the gradients of out and lse, and the lse of :func:`topk_attention`.

    dmass (B, H, C) and drest (B, H, C, Dv) are fp32 (fp64 for fp64), the others have the inputs' dtypes."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    lists = _Lists(q, k, v, clusters, topk_index, is_causal)
    dout = dout.to(dtype).masked_fill((clusters < 0).unsqueeze(-1), 0.0)
    p = torch.exp(lists.scores(scale) - torch.where(lists.keep.any(-1), lse.to(dtype), 0.0).unsqueeze(-1))
    dp = (lists.v @ dout.unsqueeze(-1)).squeeze(-1)  # [B, H, N, K]
    kept_p = p
    if dropout_p:
        dropped = lists.dropped(dropout_p, seed)
        dp, kept_p = dp * dropped, p * dropped
    delta = (p * dp).sum(-1)  # [B, H, N]
    weight = _of_cluster(mass.to(dtype), clusters).unsqueeze(-1)
    ds = p * (weight * (dp - delta.unsqueeze(-1)) + dlse.to(dtype).unsqueeze(-1)) * scale
    dq = (ds.unsqueeze(-2) @ lists.k).squeeze(-2)
    dk = lists.sum_keys(ds.unsqueeze(-1) * lists.q.unsqueeze(-2), k)
    dv = lists.sum_keys((kept_p * weight).unsqueeze(-1) * dout.unsqueeze(-2), v)
    dmass = _sum_of_cluster(delta.unsqueeze(-1), clusters, mass.shape[2]).squeeze(-1)
    drest = _sum_of_cluster(dout, clusters, mass.shape[2])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmass, drest


class _Lists:
    """What each query meets: q (B, H, N, D), its keys k (B, H, N, K, D) and v, and which of them there are, keep."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, clusters: Tensor, topk_index: Tensor, is_causal: bool) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.rows = _of_cluster(topk_index + 1, clusters) - 1  # [B, H, N, K], -1 for no key
        self.keep = self.rows >= 0
        if is_causal:
            self.keep &= self.rows <= torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
        # nothing that rows hold which take no part, not even NaN, gets into a result or a gradient
        self.q = q.to(dtype).masked_fill((clusters < 0).unsqueeze(-1), 0.0)
        self.k, self.v = (self._gather(x.to(dtype)) for x in (k, v))

    def _gather(self, x: Tensor) -> Tensor:
        batch, heads, length, _ = x.shape
        rows = self._flat_rows(batch, heads, length)
        return x.reshape(-1, x.shape[-1])[rows].masked_fill(~self.keep.unsqueeze(-1), 0.0)

    def _flat_rows(self, batch: int, heads: int, length: int) -> Tensor:
        head = torch.arange(self.rows.shape[1], device=self.rows.device) // (self.rows.shape[1] // heads)
        first = (torch.arange(batch, device=self.rows.device).unsqueeze(-1) * heads + head) * length  # [B, H]
        return self.rows.clamp_min(0) + first[..., None, None]

    def scores(self, scale: float) -> Tensor:
        return ((self.k @ self.q.unsqueeze(-1)).squeeze(-1) * scale).masked_fill(~self.keep, -math.inf)

    def dropped(self, dropout_p: float, seed: int | Tensor) -> Tensor:
        """What dropout makes of each probability 1: 0, or 1 / (1 - dropout_p)."""
        batch, heads, n_queries, _ = self.rows.shape
        head = torch.arange(batch * heads, device=self.rows.device).view(batch, heads, 1, 1)
        query = torch.arange(n_queries, device=self.rows.device).unsqueeze(-1)
        stays = kept(dropout_p, seed, head, 0, query, self.rows.clamp_min(0).long())
        return stays.to(self.k.dtype) / (1 - dropout_p)

    def sum_keys(self, parts: Tensor, like: Tensor) -> Tensor:
        """The transpose of reading keys: sums parts (B, H, N, K, F) into the shape of ``like``."""
        batch, heads, length, width = like.shape
        rows = self._flat_rows(batch, heads, length).flatten()
        parts = parts.masked_fill(~self.keep.unsqueeze(-1), 0.0).reshape(-1, width)
        return parts.new_zeros((batch * heads * length, width)).index_add(0, rows, parts).view(like.shape)


def _of_cluster(x: Tensor, clusters: Tensor) -> Tensor:
    """Rows of x (B, H, C, ...) by the query's cluster: (B, H, N, ...); zeros for a query of none."""
    batch, heads, n_clusters = x.shape[:3]
    zero = x.new_zeros((batch, heads, 1, *x.shape[3:]))
    rows = torch.where(clusters < 0, n_clusters, clusters).long()
    index = rows.view(*rows.shape, *(1 for _ in x.shape[3:])).expand(*rows.shape, *x.shape[3:])
    return torch.cat([x, zero], 2).gather(2, index)


def _sum_of_cluster(x: Tensor, clusters: Tensor, n_clusters: int) -> Tensor:
    """Sums of rows (B, H, N, F) by cluster: (B, H, C, F)."""
    rows = torch.where(clusters < 0, n_clusters, clusters).long().unsqueeze(-1).expand_as(x)
    return x.new_zeros((*x.shape[:2], n_clusters + 1, x.shape[-1])).scatter_add(2, rows, x)[:, :, :-1]
