"""SMYRF by definition (Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering", sections 3.2, 3.3).

Written as what it is, a dense softmax over a multiset: ``count[i, j]`` is how often query i meets key j, in how many
rounds they share a cluster, and out_i = sum_j count_ij exp(s_ij) v_j / sum_j count_ij exp(s_ij). Options are changes of
the counts. Memory and time are O(N * S): for tests. There is no dropout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def smyrf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: Tensor,
    *,
    scale: float | None = None,
    **knobs: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse); the arguments as in :func:`fastattn.smyrf_attention`, with ``projections`` given; knobs as of
    :func:`meeting_counts`.

    out (B, H, N, Dv); lse (B, H, N). A row that meets no key has out 0 and lse -inf.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    count = meeting_counts(q.detach(), k.detach(), projections, **knobs)
    s = (q @ k.mT * scale).masked_fill(count == 0, -math.inf)
    met = (count > 0).any(-1, keepdim=True)
    top = s.detach().amax(-1, keepdim=True).masked_fill(~met, 0.0)
    weight = count * torch.exp(s - top)
    total = weight.sum(-1, keepdim=True).masked_fill(~met, 1.0)
    lse = (top + torch.log(total)).masked_fill(~met, -math.inf)
    used = (count > 0).any(-2).unsqueeze(-1)  # a value that nobody meets may hold anything, NaN too
    return weight / total @ v.masked_fill(~used, 0.0), lse.squeeze(-1)


def meeting_counts(
    q: Tensor,
    k: Tensor,
    projections: Tensor,
    *,
    q_cluster_size: int,
    k_cluster_size: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    correct_duplicates: bool = False,
    local_window: int = 0,
) -> Tensor:
    """How often query i meets key j: (B, H, N, S), in q's dtype. q and k have equal heads.

    projections: (D + 2, rounds), or a set for each head (B, H, D + 2, rounds)."""
    batch, heads, n_queries, _ = q.shape
    n_keys = k.shape[2]
    self_like = n_queries == n_keys and (query_mask is None or query_mask is key_mask)
    n_blocks = min(math.ceil(n_queries / q_cluster_size), n_keys)
    if n_blocks < math.ceil(n_queries / q_cluster_size):
        q_cluster_size = math.ceil(n_queries / n_blocks)
    packed = self_like and k_cluster_size in (None, q_cluster_size)
    projections = projections.expand(batch, heads, *projections.shape[-2:])
    count = q.new_zeros((batch, heads, n_queries, n_keys))
    for b in range(batch):
        k_real = torch.arange(n_keys, device=q.device) if key_mask is None else key_mask[b].nonzero().squeeze(-1)
        q_real = torch.arange(n_queries, device=q.device) if query_mask is None else query_mask[b].nonzero().squeeze(-1)
        if self_like:
            q_real = k_real
        if len(q_real) == 0 or len(k_real) == 0:
            continue
        for h in range(heads):
            q_hash, k_hash = hashes(q[b, h, q_real], k[b, h, k_real], projections[b, h])
            for r in range(projections.shape[-1]):
                q_sorted = q_real[torch.argsort(q_hash[:, r], stable=True)]
                k_sorted = k_real[torch.argsort(k_hash[:, r], stable=True)]
                for c in range(n_blocks):
                    if packed:
                        block = slice(c * q_cluster_size, (c + 1) * q_cluster_size)
                        rows, keys = q_sorted[block], k_sorted[block]
                    else:
                        rows, keys = _quantile(q_sorted, c, n_blocks), _quantile(k_sorted, c, n_blocks)
                    count[b, h, rows.unsqueeze(-1), keys] += 1
        positions = torch.cat([q_real, k_real]).unique() if local_window else k_real[:0]
        for block in positions.split(max(local_window, 1)):
            rows, keys = block[torch.isin(block, q_real)], block[torch.isin(block, k_real)]
            count[b, :, rows.unsqueeze(-1), keys] += 1
        if is_causal:
            own = q_real[torch.isin(q_real, k_real)]
            count[b].tril_(-1)
            count[b, :, own, own] = 1
    return count.clamp_max(1) if correct_duplicates else count


def hashes(q: Tensor, k: Tensor, projections: Tensor) -> tuple[Tensor, Tensor]:
    """The transforms of q (N, D) and k (S, D) on the projections: (N, n_hashes) and (S, n_hashes)."""
    f, g = transforms(q, k)
    return f @ projections.to(q.dtype), g @ projections.to(q.dtype)


def transforms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """F(q_i) = [q_i ; 0 ; sqrt(R2 - |q_i|^2)] and G(k_j) = [k_j ; sqrt(R2 - |k_j|^2) ; 0], (N, D + 2) and (S, D + 2).

    Both lie on one sphere, and the larger their inner product, which is q . k, the nearer they are.
    R2 = max |q|^2 + max |k|^2.
    """
    q_norm, k_norm = q.square().sum(-1, keepdim=True), k.square().sum(-1, keepdim=True)
    radius = q_norm.amax() + k_norm.amax()
    f = torch.cat([q, torch.zeros_like(q_norm), (radius - q_norm).clamp_min(0).sqrt()], -1)
    g = torch.cat([k, (radius - k_norm).clamp_min(0).sqrt(), torch.zeros_like(k_norm)], -1)
    return f, g


def principal_directions(q: Tensor, k: Tensor, n_hashes: int) -> Tensor:
    """(D + 2, n_hashes): the orthonormal directions along which F(q) of q (N, D) varies most about its mean.

    The largest coordinate of each is positive."""
    f, _ = transforms(q, k)
    directions = torch.linalg.svd(f - f.mean(0)).Vh[:n_hashes].T
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -directions, directions)


def _quantile(rows: Tensor, block: int, n_blocks: int) -> Tensor:
    n = len(rows)
    return rows[block * n // n_blocks : (block + 1) * n // n_blocks]
