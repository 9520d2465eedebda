"""Which queries meet which keys in SMYRF: hashes of rows, sorted, and cut into clusters of equal size.

Nothing here is differentiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops.argsort import stable_argsort
from fastattn.ops.smyrf_hash import hash_rows
from fastattn.reference.smyrf_hash import heights


@dataclass(frozen=True)
class Clusters:
    """n_blocks clusters of at most q_size queries and k_size keys. packed: filled one after the other."""

    n_blocks: int
    q_size: int
    k_size: int
    packed: bool


def plan(n: int, s: int, q_cluster_size: int, k_cluster_size: int | None, is_self_like: bool) -> Clusters:
    """The clusters of n queries and s keys. is_self_like: as many queries as keys, of which the same take part."""
    n_blocks = -(-n // q_cluster_size)
    if k_cluster_size is not None:
        n_key_blocks = -(-s // k_cluster_size)
        if n_key_blocks != n_blocks:
            raise ValueError(
                f"k_cluster_size must make as many clusters as q_cluster_size: {n} queries in clusters of "
                f"q_cluster_size={q_cluster_size} are {n_blocks}, {s} keys in clusters of "
                f"k_cluster_size={k_cluster_size} are {n_key_blocks}"
            )
    if is_self_like and k_cluster_size in (None, q_cluster_size):
        return Clusters(n_blocks, q_cluster_size, q_cluster_size, packed=True)
    if s < n_blocks:
        return Clusters(s, -(-n // s), 1, packed=False)
    return Clusters(n_blocks, q_cluster_size, k_cluster_size or -(-s // n_blocks), packed=False)


@torch.no_grad()
def route(
    q: Tensor,
    k: Tensor,
    projections: Tensor | None,
    n_hashes: int,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    clusters: Clusters,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, Ck), int32. projections: None for principal directions.
    impl: of the hash."""
    q_hash, k_hash = _hashes(q, k, projections, n_hashes, key_mask, query_mask, impl)
    q_index = _cut(_order(q_hash, query_mask), query_mask, clusters.n_blocks, clusters.q_size, clusters.packed)
    k_index = _cut(_order(k_hash, key_mask), key_mask, clusters.n_blocks, clusters.k_size, clusters.packed)
    return q_index, k_index


def _hashes(
    q: Tensor,
    k: Tensor,
    projections: Tensor | None,
    n_hashes: int,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """F(q) and G(k) on the directions, (B, H, R, N) and (B, H, R, S)."""
    if projections is None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        exact_q = q.to(dtype)
        q_height, _ = heights(exact_q, k.to(dtype), query_mask, key_mask)
        projections = principal_directions(exact_q, q_height, query_mask, n_hashes)
    return hash_rows(q, k, projections, query_mask, key_mask, impl)


def principal_directions(q: Tensor, q_height: Tensor, query_mask: Tensor | None, n_hashes: int) -> Tensor:
    """(B, H, D + 2, n_hashes): for each head the orthonormal directions along which F(q) varies most over the queries
    that take part, about their mean.

    A query prefers keys on its own side of a direction the more, the farther out it lies there; how keys vary decides
    less (measured on a sentence encoder: docs/smyrf.md). The sign changes nothing but the order of equal hashes, and is
    such that each direction's largest coordinate is positive.
    """
    height = q_height.unsqueeze(-1)
    if query_mask is None:
        x, height = q - q.mean(2, keepdim=True), height - height.mean(2, keepdim=True)
    else:
        keep = query_mask[:, None, :, None]
        count = keep.sum(2, keepdim=True).clamp_min(1)
        x, height = (torch.where(keep, y, 0.0) for y in (q, height))
        x, height = (torch.where(keep, y - y.sum(2, keepdim=True) / count, 0.0) for y in (x, height))
    cross = x.mT @ height
    scatter = torch.cat([torch.cat([x.mT @ x, cross], -1), torch.cat([cross.mT, height.mT @ height], -1)], -2)
    # a head with NaN gives NaN along whatever directions, where eigh would raise
    directions = torch.linalg.eigh(scatter.nan_to_num(0.0, 0.0, 0.0)).eigenvectors.flip(-1)[..., :n_hashes]
    largest = directions.gather(-2, directions.abs().argmax(-2, keepdim=True))
    directions = torch.where(largest < 0, -directions, directions)
    of_q, of_height = directions[..., :-1, :], directions[..., -1:, :]
    return torch.cat([of_q, torch.zeros_like(of_height), of_height], -2)  # F(q) has 0 where G(k) has its height


def _order(hashes: Tensor, mask: Tensor | None) -> Tensor:
    """Rows sorted by hash, those that take no part last."""
    if mask is not None:
        hashes = hashes.masked_fill(~mask[:, None, None], math.inf)
    return stable_argsort(hashes)


def _cut(order: Tensor, mask: Tensor | None, n_blocks: int, size: int, packed: bool) -> Tensor:
    """Sorted rows (B, H, R, N) as blocks (B, H, R, nb, C), -1 where there is no row that takes part."""
    batch, heads, rounds, n = order.shape
    if mask is not None:
        count = mask.sum(-1)  # [B]
        rank = torch.arange(n, device=order.device)
        order = torch.where((rank < count.unsqueeze(-1))[:, None, None], order, order.new_full((), -1))
    if packed or (mask is None and n == n_blocks * size):
        if n < n_blocks * size:
            order = torch.nn.functional.pad(order, (0, n_blocks * size - n), value=-1)
        return order.view(batch, heads, rounds, n_blocks, size)
    block = torch.arange(n_blocks + 1, device=order.device)
    edge = block * n // n_blocks if mask is None else block * count.unsqueeze(-1) // n_blocks  # [nb + 1] or [B, nb + 1]
    rank = edge[..., :-1, None] + torch.arange(size, device=order.device)  # [.., nb, C]
    inside = rank < edge[..., 1:, None]
    rank = rank.clamp_max(n - 1).expand(batch, n_blocks, size).flatten(1)[:, None, None]
    blocks = order.gather(-1, rank.expand(batch, heads, rounds, -1)).unflatten(-1, (n_blocks, size))
    inside = inside.expand(batch, n_blocks, size)[:, None, None]
    return torch.where(inside, blocks, blocks.new_full((), -1))
