"""What clusters do to rows, by definition: sums over the members of each, and each member's copy of its cluster's row.
One is the other's transpose."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster_sums(x: Tensor, clusters: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Sums (B, H, C, F), in fp32 (fp64 for fp64), and counts (B, H, C), int32, of the members of each cluster.

    x (B, H, N, F); clusters (B, H, N), -1 for rows of no cluster: what these hold has no effect.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    place = _place(clusters, n_clusters)
    shape = (*clusters.shape[:2], n_clusters + 1)
    sums = x.new_zeros((*shape, x.shape[-1])).scatter_add(2, place.unsqueeze(-1).expand_as(x), x)
    counts = place.new_zeros(shape).scatter_add(2, place, torch.ones_like(place))
    return sums[:, :, :-1], counts[..., :-1].int()


def cluster_broadcast(values: Tensor, clusters: Tensor) -> Tensor:
    """The row of ``values`` (B, H, C, F) of each row's cluster: (B, H, N, F); zeros for rows of no cluster."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, 1))
    place = _place(clusters, values.shape[2]).unsqueeze(-1)
    return padded.gather(2, place.expand(*clusters.shape, values.shape[3]))


def members(clusters: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """(order, offsets); see :func:`fastattn.ops.cluster_members.members`."""
    place = _place(clusters, n_clusters)
    order = torch.sort(place, dim=-1, stable=True).indices.int()
    counts = torch.nn.functional.one_hot(place, n_clusters + 1).sum(2)
    offsets = torch.nn.functional.pad(counts[..., :-1].cumsum(-1), (1, 0))
    return order, offsets.int()


def _place(clusters: Tensor, n_clusters: int) -> Tensor:
    """Cluster numbers with ``n_clusters`` in place of -1."""
    return torch.where(clusters < 0, n_clusters, clusters).long()
