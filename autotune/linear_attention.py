"""What linear attention runs on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from fastattn.kernels import linear_attention as kernels
from fastattn.kernels.launch import Launch

# (kernel, does it make what belongs to keys?)
_PASSES = tuple(product(kernels.KERNELS, (False, True)))


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``linear_attention`` runs with the map elu + 1, forward and backward, causal and not, on
    tensors without memory.

    cluster_size: linear attention has none. every_pattern: False gives nothing, for SMYRF does not run it.
    """
    if not every_pattern:
        return
    for (kernel, own_keys), is_causal, has_mask in product(_PASSES, (False, True), (False, True)):
        pattern = kernels.Pattern(is_causal=is_causal, own_keys=own_keys, has_mask=has_mask)
        launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", pattern=pattern)
        flags = [name for name in ("is_causal", "own_keys", "has_mask") if getattr(pattern, name)]
        yield ", ".join([kernel, *flags]), launch
