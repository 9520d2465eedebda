"""Shape buckets: shapes that a kernel meets alike share one tuned configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping

# How much work there is; what a block costs hardly depends on it. A row measured at the nearest count serves.
COUNTS = frozenset({"batch", "heads", "rounds", "n_blocks", "n_queries", "n_keys", "n_clusters", "n_rows"})
# The tensor core's least tile, to which kernels pad a head dim.
_LEAST_DIM = 16


def bucket(shape: Mapping[str, int]) -> dict[str, int]:
    """The bucket of ``shape``, whose names are sizes that are at least 1.

    Counts (:data:`COUNTS`) go up to a power of two. Head dims (``*_dim``) do too, from 16, as kernels pad them. The
    rest are block sizes such as ``c_q``: up to 2^k or 3 * 2^k, so that a bucket's members waste tiles alike.
    """
    return {name: _round_up(name, size) for name, size in sorted(shape.items())}


def _round_up(name: str, size: int) -> int:
    if size < 1:
        raise ValueError(f"shape[{name!r}] must be at least 1, got {size}")
    power = 1 << (size - 1).bit_length()
    if name in COUNTS:
        return power
    if name.endswith("_dim"):
        return max(_LEAST_DIM, power)
    return power * 3 // 4 if power >= 4 and size <= power * 3 // 4 else power


def distance(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """How far two buckets are apart: doublings of their counts, summed; infinite where anything else differs."""
    if a.keys() != b.keys() or any(a[name] != b[name] for name in a if name not in COUNTS):
        return math.inf
    return sum(abs(math.log2(a[name] / b[name])) for name in a if name in COUNTS)
