"""Which queries meet which keys in SMYRF: hashes of rows, sorted, and cut into clusters of equal size.

Nothing here is differentiated, and neither F(q) nor G(k), of D + 2 columns, is ever made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.ops.argsort import stable_argsort


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
) -> tuple[Tensor, Tensor]:
    """q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, Ck), int32. projections: None for principal directions."""
    q_hash, k_hash = _hashes(q, k, projections, n_hashes, key_mask, query_mask)
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
) -> tuple[Tensor, Tensor]:
    """F(q) and G(k) on the directions, (B, H, R, N) and (B, H, R, S)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    q_height, k_height = _heights(q, k, key_mask, query_mask)
    if projections is None:
        projections = principal_directions(q, q_height, query_mask, n_hashes)
    projections = projections.to(dtype)
    directions, k_direction, q_direction = projections[..., :-2, :], projections[..., -2, :], projections[..., -1, :]
    q_hash = torch.addcmul(_project(q, directions), q_height.unsqueeze(2), q_direction.unsqueeze(-1))
    k_hash = torch.addcmul(_project_keys(k, directions, q.shape[1]), k_height.unsqueeze(2), k_direction.unsqueeze(-1))
    return q_hash, k_hash


def _heights(q: Tensor, k: Tensor, key_mask: Tensor | None, query_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The coordinates sqrt(R2 - |x|^2) that F and G add: (B, H, N) and (B, H, S)."""
    q_square, q_most = _square_norms(q, query_mask)
    k_square, k_most = _square_norms(k, key_mask)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k_square, k_most = k_square.repeat_interleave(group, 1), k_most.repeat_interleave(group, 1)
    radius = q_most + k_most  # [B, H, 1]
    return (radius - q_square).clamp_min_(0).sqrt_(), (radius - k_square).clamp_min_(0).sqrt_()


def _square_norms(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """|x_i|^2 (B, H, N) and the largest over the rows that take part (B, H, 1)."""
    # vector_norm makes no copy of x, which x.square() would
    square = torch.linalg.vector_norm(x, dim=-1).square_()
    real = square if mask is None else square.masked_fill(~mask.unsqueeze(1), 0.0)
    return square, real.amax(-1, keepdim=True)


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


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """x (B, H, N, D) on directions (D, R) or (B, H, D, R): (B, H, R, N). Sorting wants N last, and the product is twice
    as fast so."""
    turned = x.transpose(1, 2)
    if directions.dim() > 2 or not turned.is_contiguous():
        return directions.mT @ x.mT
    # heads split off a projection, as models have them: one product without a copy
    batch, n, heads, dim = turned.shape
    return (directions.mT @ turned.reshape(-1, dim).mT).view(-1, batch, n, heads).permute(1, 3, 0, 2)


def _project_keys(k: Tensor, directions: Tensor, heads: int) -> Tensor:
    """k (B, Hkv, S, D) on directions (D, R) or (B, H, D, R): (B, H, R, S), without a copy of k for each query head."""
    batch, kv_heads, n_keys, _ = k.shape
    group = heads // kv_heads
    if group == 1:
        return _project(k, directions)
    if directions.dim() == 2:
        return _project(k, directions).repeat_interleave(group, 1)
    of_group = directions.unflatten(1, (kv_heads, group)).transpose(2, 3).flatten(3)  # [B, Hkv, D, G * R]
    return (of_group.mT @ k.mT).view(batch, heads, -1, n_keys)


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
