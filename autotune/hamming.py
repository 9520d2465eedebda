"""What hashing and clustering of queries run on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import hamming as kernels
from fastattn.kernels.launch import Launch


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``clustered_attention`` runs to find clusters, on tensors without memory.

    cluster_size: nothing depends on it. every_pattern: False gives none, for SMYRF does not cluster so.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for masked in (False, True) if kernel == "hamming_assign" else (False,):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, masked=masked, device_type="cpu")
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', masked' if masked else ''}", launch
