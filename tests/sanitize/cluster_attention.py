"""Launches of clusters' sums and of their broadcast for the sanitizers."""

from __future__ import annotations

import torch

from fastattn.kernels import cluster_attention
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.sanitize.views import spread


def _launch(kernel: str, dtype: torch.dtype, tiles: dict[str, int]) -> list[Launch]:
    """67 rows make whole tiles and a nearly empty one, 19 clusters too; 40 columns do not fill 64."""
    g = torch.Generator().manual_seed(0)
    x, values = (torch.randn(2, 2, n, 40, generator=g).to(dtype) for n in (67, 19))
    tensors = {"clusters": torch.randint(-1, 19, (2, 2, 67), generator=g, dtype=torch.int32)}
    if kernel == "cluster_attention_sums":
        shape = (2, 2, cluster_attention.chunks(67, "cpu")[0], 20)
        tensors |= {"x": spread(x), "sums": torch.zeros(*shape, 40), "counts": torch.zeros(shape, dtype=torch.int32)}
        return [cluster_attention.sums_launch(tensors, "cpu", Config(tiles))]
    return [cluster_attention.broadcast_launch(tensors | {"values": values, "out": x}, "cpu", Config(tiles))]


CASES = {
    "cluster_attention_sums": {
        "row by row": lambda kernel, dtype: _launch(kernel, dtype, {"BLOCK_N": 16, "BLOCK_C": 16, "SCATTER": 1}),
        "products": lambda kernel, dtype: _launch(kernel, dtype, {"BLOCK_N": 16, "BLOCK_C": 16, "SCATTER": 0}),
    },
    "cluster_attention_broadcast": {"odd": lambda kernel, dtype: _launch(kernel, dtype, {"BLOCK_N": 16})},
}
