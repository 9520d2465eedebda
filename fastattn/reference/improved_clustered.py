"""Improved clustered attention by definition (Vyas et al. 2020, "Fast Transformers with Clustered Attention", section
3.3), with all weights written out: memory is O(N * S).

Of its causal form there is only what concerns the lists, for the means have no causal form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.reference.centroid_attention import topk_keys
from fastattn.reference.dropout import kept


def improved_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clusters: Tensor,
    n_clusters: int,
    *,
    topk: int = 32,
    is_causal: bool = False,
    detach_mass: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seeds: Sequence[int] = (0, 0),
) -> Tensor:
    """out (B, H, N, Dv); the arguments as in :func:`fastattn.improved_clustered_attention`, with the clusters (B, H, N)
    given, -1 for queries that take no part, and the seeds of what is dropped of a query's own weights and of those that
    its cluster shares."""
    group = q.shape[1] // v.shape[1]
    weights = improved_clustered_weights(
        q, k, clusters, n_clusters, topk=topk, is_causal=is_causal, detach_mass=detach_mass, key_mask=key_mask,
        scale=scale, dropout_p=dropout_p, seeds=seeds,
    )  # fmt: skip
    if key_mask is not None:
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
    return weights @ v.repeat_interleave(group, 1)


def improved_clustered_weights(
    q: Tensor,
    k: Tensor,
    clusters: Tensor,
    n_clusters: int,
    *,
    topk: int = 32,
    is_causal: bool = False,
    detach_mass: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seeds: Sequence[int] = (0, 0),
) -> Tensor:
    """The weights (B, H, N, S) of all keys for each query; see :func:`improved_clustered_attention`."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n_keys = k.shape[2]
    q = q.masked_fill((clusters < 0).unsqueeze(-1), 0.0)  # masked rows may hold anything, NaN too
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], n_keys, dtype=torch.bool, device=k.device)
    k = k.masked_fill(~key_mask[:, None, :, None], 0.0).repeat_interleave(q.shape[1] // k.shape[1], 1)
    member = (clusters.unsqueeze(-1) == torch.arange(n_clusters, device=q.device)).to(q.dtype)  # [B, H, N, C]
    means = member.mT @ q / member.sum(-2).clamp_min(1).unsqueeze(-1)
    lists = topk_keys(means, k, topk, key_mask=key_mask, scale=scale).long()
    listed = torch.zeros(*means.shape[:3], n_keys + 1, dtype=torch.bool, device=q.device)
    listed = listed.scatter_(-1, torch.where(lists < 0, n_keys, lists), True)[..., :-1]  # [B, H, C, S]
    keep = member @ listed.to(q.dtype) > 0  # [B, H, N, S]
    if is_causal:
        keep &= torch.arange(n_keys, device=q.device) <= torch.arange(q.shape[2], device=q.device).unsqueeze(-1)
    fine = _drop(_softmax(q @ k.mT * scale, keep), dropout_p, seeds[0])
    if is_causal:
        return fine
    coarse = _softmax(means @ k.mT * scale, key_mask[:, None, None].expand_as(listed))
    mass = (coarse * listed).sum(-1, keepdim=True)
    if detach_mass:
        mass = mass.detach()
    return (member @ mass) * fine + member @ _drop(coarse * ~listed, dropout_p, seeds[1])


def _softmax(s: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the places to keep; zeros where there are none."""
    p = torch.softmax(s.masked_fill(~keep, -math.inf).masked_fill(~keep.any(-1, keepdim=True), 0.0), -1)
    return p * keep


def _drop(p: Tensor, dropout_p: float, seed: int) -> Tensor:
    if not dropout_p:
        return p
    batch, heads, n, n_keys = p.shape
    head = torch.arange(batch * heads, device=p.device).view(batch, heads, 1, 1)
    rows = torch.arange(n, device=p.device).unsqueeze(-1)
    return p * kept(dropout_p, seed, head, 0, rows, torch.arange(n_keys, device=p.device)) / (1 - dropout_p)
