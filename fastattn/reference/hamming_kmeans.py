"""Lloyd's algorithm on binary codes by definition (Vyas et al. 2020, "Fast Transformers with Clustered Attention",
section 3.2.2): the distance is the number of bits that differ, the mean of a cluster is each bit's strict majority."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.hash_bits import unpack
from fastattn.reference.philox import philox


def hamming_kmeans(
    codes: Tensor, initial: Tensor, mask: Tensor | None, seed: Tensor, *, n_bits: int, n_iterations: int
) -> Tensor:
    """Clusters (B, H, N), int32, of codes (B, H, N), -1 for rows that take no part; see
    :func:`fastattn.ops.hamming_kmeans.hamming_kmeans`.

    initial: (B, H, C), which rows are the first centroids; -1 for a cluster that does not exist. mask: (B, N).
    seed: int64 without dimensions.
    """
    n_clusters = initial.shape[-1]
    takes_part = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.unsqueeze(1).expand_as(codes)
    exists = initial >= 0  # [B, H, C]
    bits = unpack(codes, n_bits)  # [B, H, N, n_bits]
    centroids = unpack(codes.gather(-1, initial.clamp_min(0).long()), n_bits)  # [B, H, C, n_bits]
    clusters = _nearest(bits, centroids, exists)
    for iteration in range(n_iterations - 1):
        members = torch.nn.functional.one_hot(clusters, n_clusters).masked_fill(~takes_part.unsqueeze(-1), 0).float()
        count = members.sum(-2).unsqueeze(-1)  # [B, H, C, 1]; fp32 holds sums up to 2^24 exactly
        ones = members.mT @ bits.float()
        drawn = unpack(random_codes(seed, iteration, n_clusters), n_bits)
        centroids = torch.where(count > 0, 2 * ones > count, drawn)
        clusters = _nearest(bits, centroids, exists)
    return clusters.masked_fill(~takes_part, -1).int()


def random_codes(seed: Tensor, iteration: int, n_clusters: int) -> Tensor:
    """What clusters that have lost all members in an iteration get, (C,) int64: the same for all heads."""
    low, high, _, _ = philox(seed, iteration * n_clusters + torch.arange(n_clusters, device=seed.device))
    return low | high << 32


def first_rows(seed: Tensor, length: int, n_clusters: int, mask: Tensor | None) -> Tensor:
    """Random rows without repetition among those that take part: (C,), or (B, C) with a mask (B, N); int32.

    Where fewer than C take part, -1 stands for the rest.
    """
    # other counters than those of random_codes; four words each
    words = philox(seed, torch.arange(-(-length // 4), device=seed.device) + 2**32)
    row = torch.arange(length, device=seed.device)
    key = (torch.stack(words, -1).flatten()[:length] >> 1 << 32) | row  # all different
    most = torch.iinfo(torch.int64).max
    if mask is not None:
        key = key.masked_fill(~mask, most)
    least = key.topk(min(n_clusters, length), largest=False).values
    rows = torch.where(least == most, -1, least & (2**32 - 1)).int()
    return torch.nn.functional.pad(rows, (0, n_clusters - rows.shape[-1]), value=-1)


def _nearest(bits: Tensor, centroids: Tensor, exists: Tensor) -> Tensor:
    """The nearest centroid of each row, the first of those at the same distance: (B, H, N), int64."""
    n_bits, n_clusters = centroids.shape[-2:][::-1]
    agreement = (2.0 * bits - 1) @ (2.0 * centroids - 1).mT  # [B, H, N, C]; n_bits - 2 * distance
    distance = (n_bits - agreement.long()) // 2
    distance = distance.masked_fill(~exists.unsqueeze(-2), n_bits + 1)
    rank = distance * n_clusters + torch.arange(n_clusters, device=bits.device)
    return rank.amin(-1) % n_clusters
