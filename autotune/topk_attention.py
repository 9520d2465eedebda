"""What top-k attention runs on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import topk_attention as kernels
from fastattn.kernels.launch import Launch


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``improved_clustered_attention`` runs with its defaults, on tensors without memory.

    cluster_size: lists do not depend on it. every_pattern: False gives none, for SMYRF has no lists; True also gives
    what causal calls run.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for is_causal in (False,) if kernel == "topk_attention_sum" else (False, True):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", is_causal=is_causal)
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', is_causal' if is_causal else ''}", launch
