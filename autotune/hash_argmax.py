"""What hashing runs on the CPU, for who wants it built before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastattn.kernels import hash_argmax as kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch

# halves of the factors that default numbers of buckets have: up to 64 for one factor, up to 32 for each of two
_FIRST, _LATER = (16, 32, 64), (16, 32)


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``lsh_attention`` hashes with, on tensors without memory.

    cluster_size: hashing does not depend on it. every_pattern: False gives none, for SMYRF does not hash so.
    """
    if not every_pattern:
        return
    for is_first, halves in ((True, _FIRST), (False, _LATER)):
        for half in halves:
            config: Config = kernels.heuristic("hash_argmax_digit", "cpu", half, head_dim)
            launch = kernels.example_launch(
                "hash_argmax_digit", dtype, head_dim=head_dim, columns=half, first=is_first, device_type="cpu",
                config=config,
            )  # fmt: skip
            tile = " x ".join(str(size) for size in config.blocks.values())
            yield f"hash_argmax_digit, tile {tile}, {'first factor' if is_first else 'later factors'}", launch
