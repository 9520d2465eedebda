"""Linear attention's launches for the sanitizers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from fastattn.kernels.linear_attention import KERNELS, Pattern, launches_of
from tests.sanitize.views import spread

CHUNK = 16
CONFIG = {
    kernel: Config({"BLOCK_SIZE": 256} if kernel.endswith("scan") else {rows: 16, "BLOCK_F": 16, "BLOCK_DV": 16})
    for kernel in KERNELS
    for rows in (["BLOCK_N"] if kernel.endswith("states") else ["BLOCK_M"])
}


def _launches(kernel: str, dtype: torch.dtype, pattern: Pattern, features: int, value_dim: int) -> list[Launch]:
    """47 queries; 47 keys of causal calls, else 37; two query heads to a key head."""
    g = torch.Generator().manual_seed(0)
    n_queries, n_keys = 47, 47 if pattern.is_causal else 37

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    queries = spread(random(2, 4, n_queries, features).to(dtype)), spread(random(2, 4, n_queries, value_dim).to(dtype))
    keys = spread(random(2, 2, n_keys, features).to(dtype)), spread(random(2, 2, n_keys, value_dim).to(dtype))
    (own_x, own_y), (other_x, other_y) = (keys, queries) if pattern.own_keys else (queries, keys)
    size, n_own = features * (value_dim + 1), own_x.shape[2]
    n_chunks = -(-other_x.shape[2] // CHUNK)
    tensors = {"own_x": own_x, "own_y": own_y, "other_x": other_x, "other_y": other_y}
    tensors |= {"key_mask": torch.arange(n_keys).expand(2, -1) % 5 != 2}
    tensors["key_mask"] = tensors["key_mask"].contiguous() if pattern.has_mask else random(1)
    tensors |= {"den": 1 + random(2, 4, n_queries).abs(), "delta": random(2, 4, n_queries)}
    tensors |= {"states": random(2, other_x.shape[1], n_chunks, size), "initial": random(2, 4, size)}
    tensors |= {"before": random(2, 4, n_chunks if pattern.is_causal else 1, size), "final": random(2, 4, size)}
    tensors |= {"out": random(2, 4, n_queries, value_dim).to(dtype)}
    tensors |= {"dx": random(2, 4, n_own, features).to(dtype), "result": random(2, 4, n_own, value_dim).to(dtype)}
    return list(launches_of((kernel,), tensors, pattern, 1e-6, CONFIG, CHUNK))


CASES = {
    kernel: {
        "causal-masked-odd": lambda kernel, dtype: _launches(
            kernel, dtype, Pattern("elu", is_causal=True, has_mask=True, has_initial=True), 20, 33
        ),
        "back-causal-masked": lambda kernel, dtype: _launches(
            kernel, dtype, Pattern("relu2", is_causal=True, own_keys=True, has_mask=True), 17, 16
        ),
        "whole-one-feature": lambda kernel, dtype: _launches(kernel, dtype, Pattern("relu"), 1, 3),
        "back-whole": lambda kernel, dtype: _launches(kernel, dtype, Pattern("identity", own_keys=True), 35, 8),
    }
    for kernel in KERNELS
}
