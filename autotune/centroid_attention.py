"""What centroid attention runs on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import centroid_attention as kernels
from fastattn.kernels.launch import Launch


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``improved_clustered_attention`` runs with its defaults, on tensors without memory.

    cluster_size: centroids do not depend on it. every_pattern: False gives none, for SMYRF has no centroids; True gives
    what calls with and without a key mask run.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for has_mask in (False, True):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", has_mask=has_mask)
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', key_mask' if has_mask else ''}", launch
