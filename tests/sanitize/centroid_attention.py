"""Centroid attention's launches for the sanitizers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels import centroid_attention
from fastattn.kernels.centroid_attention import launch_of
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.sanitize.views import spread


def _launches(kernel: str, dtype: torch.dtype, n_keys: int, dropout_p: float, **flags: bool) -> list[Launch]:
    """19 queries of 4 heads that share 2 heads of keys; odd head dims."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    parts, groups = -(-n_keys // centroid_attention.PART), -(-n_keys // 16)
    tensors = {
        "q": draw(2, 4, 19, 40).to(dtype), "k": spread(draw(2, 2, n_keys, 40).to(dtype)),
        "v": spread(draw(2, 2, n_keys, 24).to(dtype)), "key_mask": torch.rand(2, n_keys, generator=g) < 0.7,
        "seed": torch.tensor(7), "dout": draw(2, 4, 19, 24).to(dtype), "delta": draw(2, 4, 19),
        "groups": torch.randint(groups, (2, 4, 19, 2), generator=g).int(), "logits": draw(2, 4, 19, 32),
        "peaks": draw(2, 4, 19, groups), "dq": draw(2, 4, parts, 19, 40),
        "dk": draw(2, 2, n_keys, 40).to(dtype), "dv": draw(2, 2, n_keys, 24).to(dtype),
    }  # fmt: skip
    if kernel == "centroid_attention_forward":
        tensors |= {"out": draw(2, 4, parts, 19, 24), "lse": draw(2, 4, parts, 19)}
    else:
        tensors |= {"lse": 6 + draw(2, 4, 19)}
    blocks = {"BLOCK_N": 16} if kernel == "centroid_attention_candidates" else {"BLOCK_M": 16, "BLOCK_N": 16}
    return [launch_of(kernel, tensors, flags, 0.1, dropout_p, Config(blocks))]


CASES = {
    kernel: {
        "odd-masked": lambda kernel, dtype: _launches(
            kernel, dtype, 53, 0.0, HAS_MASK=True, HAS_VALUES=True, HAS_PEAKS=True
        ),
        "dropout-lists-alone": lambda kernel, dtype: _launches(
            kernel, dtype, 33, 0.4, HAS_MASK=False, HAS_VALUES="backward" in kernel, HAS_PEAKS=True
        ),
    }
    for kernel in centroid_attention.KERNELS
}
