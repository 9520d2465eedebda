"""Top-k attention's launches for the sanitizers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from fastattn.kernels.topk_attention import launch_of, parts_of, sum_launch
from fastattn.ops.cluster_members import members
from tests.sanitize.views import spread


def _launches(kernel: str, dtype: torch.dtype, top_k: int, is_causal: bool, dropout_p: float) -> list[Launch]:
    """47 queries in 5 clusters, of which one is empty and one has most; 53 keys; odd head dims; grouped heads."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((2, 4, *shape), dtype=dtype)

    q, k, v = (spread(draw(2, h, n, d).to(dtype)) for h, n, d in ((4, 47, 40), (2, 53, 40), (2, 53, 24)))
    clusters = torch.randint(-1, 12, (2, 4, 47), generator=g).clamp_max(4)
    order, offsets = members(clusters.masked_fill(clusters == 2, 4).int(), 5)
    lists = torch.randint(-1, 53, (2, 4, 5, top_k), generator=g).int()
    parts, _ = parts_of(47, 5, top_k)
    tensors = {
        "dout": draw(2, 4, 47, 24).to(dtype), "q": q, "k": k, "v": v, "order": order, "offsets": offsets,
        "topk_index": lists, "mass": draw(2, 4, 5), "rest": draw(2, 4, 5, 24), "seed": torch.tensor(7),
        "lse": 6 + draw(2, 4, 47), "delta": draw(2, 4, 47), "dlse": draw(2, 4, 47),
        "out": empty(47, 24, dtype=dtype),
        "dq": empty(47, 40, dtype=dtype), "dk": empty(parts, top_k, 40), "dv": empty(parts, top_k, 24),
        "rows": empty(parts, top_k, dtype=torch.int32), "drest": empty(parts, 24), "dmass": empty(parts),
        "clusters": empty(parts, dtype=torch.int32),
    }  # fmt: skip
    return [launch_of(kernel, tensors, is_causal, 0.3, dropout_p, Config({"BLOCK_M": 16, "BLOCK_N": 16}))]


def _sum(dtype: torch.dtype, dim: int) -> list[Launch]:
    g = torch.Generator().manual_seed(0)
    entries = torch.stack([torch.randperm(50, generator=g) for _ in range(3)]).int()
    first = torch.randint(0, 51, (3, 20), generator=g).sort().values.int()
    tensors = {"parts": torch.randn(3, 50, dim, generator=g), "entries": entries, "first": first}
    return [sum_launch(tensors | {"sum": torch.empty(3, 19, dim, dtype=dtype)}, Config({"BLOCK_M": 8}))]


CASES = {
    f"topk_attention_{part}": {
        "two-tiles-causal": lambda kernel, dtype: _launches(kernel, dtype, 19, True, 0.0),
        "one-tile-dropout": lambda kernel, dtype: _launches(kernel, dtype, 5, False, 0.4),
    }
    for part in ("forward", "backward_dq", "backward_dkv")
} | {
    "topk_attention_sum": {
        "odd": lambda kernel, dtype: _sum(dtype, 40),
        "one-column": lambda kernel, dtype: _sum(dtype, 1),
    }
}
