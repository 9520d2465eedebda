"""Launches of SMYRF's hash for the sanitizers."""

from __future__ import annotations

import torch

from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from fastattn.kernels.smyrf_hash import lift_launch, project_launch, side_of
from tests.sanitize.views import spread

_G = 2  # query heads that share a key head


def _project(dtype: torch.dtype, n: int, dim: int, rounds: int, is_masked: bool) -> list[Launch]:
    g = torch.Generator().manual_seed(0)
    x = spread(torch.randn(2, 2, n, dim, generator=g).to(dtype))
    directions = torch.randn(2, 2 * _G, rounds, dim + 2, generator=g)
    mask = torch.rand(2, n, generator=g) > 0.3 if is_masked else None
    side = side_of(x, directions, mask)
    side["most"].zero_()  # it may have more places than there are tiles
    return [project_launch(side, "cpu", Config({"BLOCK_M": 16, "BLOCK_K": 32}))]


def _lift(n: int, n_other: int, of_queries: bool) -> list[Launch]:
    g = torch.Generator().manual_seed(0)
    squares = torch.rand(2, 3, n, generator=g)
    tensors = {"products": torch.randn(2, 3, 5, n, generator=g), "squares": squares, "hashes": torch.empty(2, 3, 5, n)}
    tensors |= {"most": torch.rand(2, 3, -(-n // 16), generator=g)}
    tensors |= {"other_most": torch.rand(2, 3, -(-n_other // 16), generator=g)}
    tensors |= {"directions": torch.randn(3, 5, 10, generator=g).expand(2, -1, -1, -1)}
    return [lift_launch(tensors, 16, n_other, "cpu", of_queries=of_queries, config=Config({"BLOCK_M": 16}))]


CASES = {
    "smyrf_hash_project": {
        "odd-several-tiles": lambda kernel, dtype: _project(dtype, 47, 40, 19, True),
        "one-column": lambda kernel, dtype: _project(dtype, 17, 1, 1, False),
    },
    "smyrf_hash_lift": {
        "queries": lambda kernel, dtype: _lift(47, 300, True),
        "keys": lambda kernel, dtype: _lift(17, 1, False),
    },
}
