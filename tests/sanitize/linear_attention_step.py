"""The launches of a step of linear attention for the sanitizers."""

from __future__ import annotations

import torch

from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from fastattn.kernels.linear_attention_step import launches_of
from tests.sanitize.views import spread


def _launches(kernel: str, dtype: torch.dtype, feature_map: str, features: int, value_dim: int) -> list[Launch]:
    g = torch.Generator().manual_seed(0)
    q = spread(torch.randn(2, 4, 1, features, generator=g).to(dtype))
    k = spread(torch.randn(2, 2, 1, features, generator=g).to(dtype))
    v = spread(torch.randn(2, 2, 1, value_dim, generator=g).to(dtype))
    s, z = torch.randn(2, 4, features, value_dim, generator=g), torch.rand(2, 4, features, generator=g)
    tensors = {"q": q, "k": k, "v": v, "s": s, "z": z, "out": torch.empty(2, 4, 1, value_dim, dtype=dtype)}
    tensors |= {"new_s": torch.empty_like(s), "new_z": torch.empty_like(z)}
    return list(launches_of(kernel, tensors, feature_map, 1e-6, Config({"BLOCK_F": 16, "BLOCK_DV": 16})))


CASES = {
    "linear_attention_step": {
        "odd": lambda kernel, dtype: _launches(kernel, dtype, "elu", 35, 33),
        "one-feature": lambda kernel, dtype: _launches(kernel, dtype, "relu2", 1, 1),
    }
}
