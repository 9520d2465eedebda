"""Codes of random hyperplanes, packed in 64 bits, as ``fastattn::hash_bits``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_op
from fastattn.reference import hash_bits as reference

MOST_BITS = 63


def hash_bits(x: Tensor, planes: Tensor, *, impl: str | None = None) -> Tensor:
    """On which side of each plane the rows of ``x`` lie: bit b of a row's code is [x . planes[b, :D] > planes[b, D]].

    The hashing of clustered attention (Vyas et al. 2020, section 3.2.2). Projection, comparison and packing are one
    pass over x; sums are as exact as those of fp32, whatever torch's precision setting is.

    Args:
        x: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        planes: (n_bits, D + 1) of any floating dtype, n_bits from 1 to 63: a normal and, last, a threshold each.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        Codes (B, H, N), int64, 0 to 2^n_bits - 1. NaN lies above no threshold. There is no gradient.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(x=x, planes=planes)
    checks.check_choice("impl", impl, checks.IMPLS)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, heads, length, head_dim), none of them 0, got {tuple(x.shape)}")
    checks.check_dtype("x", x, impl)
    check_planes(planes, x)
    return encode(x, planes, impl)


def check_planes(planes: Tensor, x: Tensor) -> None:
    if not planes.is_floating_point():
        raise TypeError(f"planes must be of a floating dtype, got {planes.dtype}")
    if planes.dim() != 2 or planes.shape[1] != x.shape[3] + 1 or not 1 <= planes.shape[0] <= MOST_BITS:
        raise ValueError(
            f"planes must have shape (n_bits, head_dim + 1) = (1 to {MOST_BITS}, {x.shape[3] + 1}), "
            f"got {tuple(planes.shape)}"
        )
    if planes.device != x.device:
        raise ValueError(f"planes must be on the device {x.device} of what is hashed, got {planes.device}")


@torch.no_grad()
def encode(x: Tensor, planes: Tensor, impl: str | None = None) -> Tensor:
    """:func:`hash_bits` for methods, which have checked their arguments already."""
    if impl == "reference":
        with no_autocast(x.device.type):
            return reference.hash_bits(x, planes)
    return _OP(x, planes.float(), impl is None)


def _hash(x: Tensor, planes: Tensor, fallback: bool) -> Tensor:
    def fused() -> Tensor:
        return kernel_room("hamming").hash_bits(x, planes, lookup, stamp())

    def defined() -> Tensor:
        with no_autocast(x.device.type):
            return reference.hash_bits(x, planes)

    return fused_or_defined("hash_bits", fused, defined, fallback=fallback)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.int64)


_OP = define_op("hash_bits(Tensor x, Tensor planes, bool fallback) -> Tensor", _hash, fake=_fake)
