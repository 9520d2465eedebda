"""Hashing's launches for the sanitizers."""

from __future__ import annotations

import torch

from fastattn.kernels.config import Config
from fastattn.kernels.hash_argmax import launches_of
from fastattn.kernels.launch import Launch
from tests.sanitize.views import spread


def _launches(dtype: torch.dtype, n: int, dim: int, factors: tuple[int, ...], per_head: bool) -> list[Launch]:
    g = torch.Generator().manual_seed(0)
    x = spread(torch.randn(2, 3, n, dim, generator=g).to(dtype))
    rotations = torch.randn(3 if per_head else 1, 2, sum(factors) // 2, dim, generator=g)
    tensors = {"x": x, "rotations": rotations, "buckets": torch.empty(2, 3, 2, n, dtype=torch.int32)}
    config = Config({"BLOCK_M": 16, "BLOCK_N": 16})
    return list(launches_of(tensors, factors, {factor // 2: config for factor in factors}))


CASES = {
    "hash_argmax_digit": {
        "odd-several-tiles": lambda kernel, dtype: _launches(dtype, 47, 40, (74,), True),
        "factorised-one-column": lambda kernel, dtype: _launches(dtype, 17, 1, (6, 2, 34), False),
    }
}
