"""What a step of linear attention runs on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import linear_attention_step as kernels
from fastattn.kernels.launch import Launch


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of ``linear_attention_step`` with the map elu + 1, on tensors without memory.

    cluster_size: a step has none. every_pattern: False gives nothing, for SMYRF does not run it.
    """
    if every_pattern:
        for kernel in kernels.KERNELS:
            yield kernel, kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu")
