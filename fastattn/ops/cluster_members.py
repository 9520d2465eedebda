"""The rows of each cluster, one cluster after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.argsort import stable_argsort

MOST_CLUSTERS = 2**24  # their numbers are sorted as fp32


@torch.no_grad()
def members(clusters: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """A stable counting sort of rows by cluster.

    Args:
        clusters: (B, H, N), int32 or int64, 0 to C - 1, or -1 for rows of no cluster.
        n_clusters: C, at most 2^24.

    Returns:
        order (B, H, N), int32: the rows of cluster 0, those of cluster 1, ..., each in their order, and last those of
        no cluster. offsets (B, H, C + 1), int32: cluster c stands at offsets[c] .. offsets[c + 1] - 1 of the order.

    On the device of ``clusters``, which no host waits for. Arguments are not checked.
    """
    number = clusters.float()
    order = stable_argsort(torch.where(number < 0, float(n_clusters), number))
    ordered = clusters.gather(-1, order.long())
    # rows of no cluster, -1, stand last: as a number above all others
    ordered = torch.where(ordered < 0, n_clusters, ordered)
    edges = torch.arange(n_clusters + 1, device=clusters.device, dtype=ordered.dtype)
    edges = edges.expand(*ordered.shape[:2], n_clusters + 1).contiguous()
    return order, torch.searchsorted(ordered, edges, out_int32=True)
