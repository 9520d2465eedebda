"""Launches of hashing and of Lloyd's algorithm for the sanitizers."""

from __future__ import annotations

import torch

from fastattn.kernels import hamming
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.sanitize.views import spread


def _hash(kernel: str, dtype: torch.dtype) -> list[Launch]:
    """67 rows make a whole tile and a nearly empty one; 40 columns one and a half."""
    g = torch.Generator().manual_seed(0)
    x, planes = torch.randn(2, 2, 67, 40, generator=g).to(dtype), torch.randn(41, 37, generator=g)
    tensors = {"x": spread(x), "planes": planes, "codes": torch.zeros(2, 2, 67, dtype=torch.int64)}
    return [hamming.hash_launch(tensors, "cpu", Config({"BLOCK_M": 64, "BLOCK_K": 32}))]


def _kmeans(kernel: str, masked: bool, tiles: dict[str, int]) -> list[Launch]:
    """One iteration's launch of ``kernel`` on 130 rows of each of four heads."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(2**37, (2, 2, 130), generator=g)
    tensors = {"codes": codes, "clusters": torch.randint(-1, 19, (2, 2, 130), generator=g, dtype=torch.int32)}
    tensors["centroids"] = torch.randint(2**31 - 1, (2, 2, 2, 19), generator=g, dtype=torch.int32)
    tensors["ranks"] = torch.arange(19, dtype=torch.int32).repeat(2, 2, 1)
    tensors["ranks"][..., 17:] += 127 << 24
    tensors["mask"] = torch.rand(2, 130, generator=g) < 0.5 if masked else codes
    tensors["counts"] = torch.randint(0, 9, hamming.counts_size(2, 2, 130, 19, "cpu"), generator=g, dtype=torch.int32)
    tensors["seed"] = torch.tensor(2**40 + 1)
    launches = hamming.kmeans_launches(tensors, 37, 2, "cpu", {kernel: Config(tiles)})
    return [next(launch for launch in launches if launch.kernel is hamming.KERNELS[kernel])]


CASES = {
    "hamming_hash": {"odd-strided": _hash},
    "hamming_assign": {
        "counts": lambda kernel, dtype: _kmeans(kernel, True, {"BLOCK_N": 64, "BLOCK_C": 16, "POPCOUNT": 1}),
        "products": lambda kernel, dtype: _kmeans(kernel, False, {"BLOCK_N": 64, "BLOCK_C": 16, "POPCOUNT": 0}),
    },
    "hamming_count": {
        "row by row": lambda kernel, dtype: _kmeans(kernel, False, {"BLOCK_N": 64, "BLOCK_C": 16, "SCATTER": 1}),
        "products": lambda kernel, dtype: _kmeans(kernel, False, {"BLOCK_N": 64, "BLOCK_C": 16, "SCATTER": 0}),
    },
    "hamming_update": {"odd": lambda kernel, dtype: _kmeans(kernel, False, {"BLOCK_C": 16})},
}
