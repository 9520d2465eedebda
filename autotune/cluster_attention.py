"""What clusters' sums and their broadcast run on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import cluster_attention as kernels
from fastattn.kernels.launch import Launch


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``clustered_attention`` runs around its attention, on tensors without memory.

    cluster_size: nothing depends on it. every_pattern: False gives none, for SMYRF has no means.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu")
        tile = " x ".join(str(size) for size in launch.config.blocks.values())
        yield f"{kernel}, tile {tile}", launch
