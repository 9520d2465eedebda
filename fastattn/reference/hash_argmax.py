"""Angular LSH by definition (Kitaev et al. 2020, "Reformer", section 2): the argmax over [x R, -x R]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def hash_argmax(x: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """Buckets (B, H, h, N), int32, of x (B, H, N, D); see :func:`fastattn.ops.hash_argmax.hash_argmax`.

    fp16 and bf16 are computed in fp32, and fp32 exactly whatever torch's matmul precision is: with "medium" a CPU that
    has AMX multiplies in bf16, and one row in 700 is in another bucket. Memory is O(N * sum of factors) for each head
    and round.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, rotations = x.to(dtype), rotations.to(dtype)
    with highest_precision():
        rotated = torch.einsum("bhnd,hdrw->bhrnw", x, rotations.expand(x.shape[1], -1, -1, -1))
    bucket = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=x.device)
    weight = 1
    for part, factor in zip(rotated.split([factor // 2 for factor in factors], -1), factors, strict=True):
        bucket += weight * torch.cat([part, -part], -1).argmax(-1)
        weight *= factor
    return bucket.to(torch.int32)


@contextmanager
def highest_precision() -> Iterator[None]:
    """Products of fp32 as they are; where another thread multiplies meanwhile, its are too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
