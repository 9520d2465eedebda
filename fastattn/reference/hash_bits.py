"""Random-hyperplane codes by definition: which side of each plane a row lies on, as the bits of one integer."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_bits(x: Tensor, planes: Tensor) -> Tensor:
    """Codes (B, H, N), int64, of the rows x (B, H, N, D); see :func:`fastattn.ops.hash_bits.hash_bits`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    planes = planes.to(dtype)
    return pack(x.to(dtype) @ planes[:, :-1].mT > planes[:, -1])


def pack(bits: Tensor) -> Tensor:
    """Booleans (..., n_bits) as one int64 each, bit b standing for 2^b."""
    place = torch.arange(bits.shape[-1], device=bits.device)
    return (bits.long() << place).sum(-1)


def unpack(codes: Tensor, n_bits: int) -> Tensor:
    """The inverse of :func:`pack`: booleans (..., n_bits)."""
    place = torch.arange(n_bits, device=codes.device)
    return ((codes.unsqueeze(-1) >> place) & 1).bool()
