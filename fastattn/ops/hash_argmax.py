"""Angular LSH as a torch op: ``fastattn::hash_argmax``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_op
from fastattn.reference import hash_argmax as reference

MOST_BUCKETS = 2**31 - 2  # numbers of buckets are int32


def hash_argmax(
    x: Tensor, rotations: Tensor, n_buckets: int | Sequence[int], *, impl: str | None = None
) -> Tensor:  # fmt: skip
    """The bucket of every row in every round: the place of the largest of [x R, -x R], R the round's rotation.

    The hash of Reformer (Kitaev et al. 2020, section 2). Rotation and argmax are one kernel: memory is that of the
    result. Products are fp32 whatever x and torch's own precision are; rows whose two largest entries lie within fp32's
    rounding of each other may fall into either bucket. Equal entries: the first of [x R, -x R].

    Args:
        x: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides. Lengths of rows do not matter.
        rotations: (H or 1, D, h, W) of a floating dtype, used in fp32 (fp64 for fp64 inputs): h rounds of W random
            directions, usually standard normal; one set for all heads, or one for each.
        n_buckets: an even number, W = n_buckets / 2; or several, (f0, f1, ...), for a factorised hash of f0 * f1 * ...
            buckets: each factor has its own f / 2 of the columns, W is the sum of these, and the bucket is
            b0 + f0 * b1 + f0 * f1 * b2 + ...
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        buckets (B, H, h, N), int32, from 0 to n_buckets - 1 in each round. They carry no gradient. A row of NaN has
        some bucket.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(x=x)
    checks.check_choice("impl", impl, checks.IMPLS)
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"x must have shape (batch, heads, length, head_dim), none 0, got {tuple(x.shape)}")
    checks.check_dtype("x", x, impl)
    factors = check_buckets(n_buckets)
    check_rotations(rotations, x, factors)
    return bucket_rows(x, rotations, factors, impl)


def bucket_rows(x: Tensor, rotations: Tensor, factors: tuple[int, ...], impl: str | None) -> Tensor:
    """:func:`hash_argmax` for methods, which have checked their arguments already."""
    x, rotations = x.detach(), rotations.detach()
    if impl == "reference":
        with no_autocast(x.device.type):
            return reference.hash_argmax(x, rotations, factors)
    return _OP(x, rotations, list(factors), impl is None)


def check_buckets(n_buckets: Any) -> tuple[int, ...]:
    """The factors of ``n_buckets``, which is one even number or several."""
    factors = n_buckets if isinstance(n_buckets, tuple | list) else (n_buckets,)
    for factor in factors:
        checks.check_int("n_buckets", factor, 2)
        if factor % 2:
            raise ValueError(f"n_buckets must be even, or a tuple of even factors, got {n_buckets}")
    if not 0 < math.prod(factors) <= MOST_BUCKETS or not factors:
        raise ValueError(f"n_buckets must have one factor or more and a product up to {MOST_BUCKETS}, got {n_buckets}")
    return tuple(factors)


def check_rotations(rotations: Any, x: Tensor, factors: tuple[int, ...], n_hashes: int | None = None) -> None:
    """Checks rotations (H or 1, D, n_hashes, sum of factors / 2) for x (B, H, N, D)."""
    checks.check_tensors(rotations=rotations)
    if not rotations.is_floating_point():
        raise TypeError(f"rotations must be of a floating dtype, got {rotations.dtype}")
    heads, dim, width = x.shape[1], x.shape[3], sum(factors) // 2
    rounds = "n_hashes" if n_hashes is None else n_hashes
    shape = tuple(rotations.shape)
    fits = len(shape) == 4 and (shape[0] == 1 or shape[0] == heads) and shape[1] == dim and shape[2] >= 1
    if not fits or shape[3] != width or (n_hashes is not None and shape[2] != n_hashes):
        raise ValueError(
            "rotations must have shape (heads or 1, head_dim, n_hashes, n_buckets / 2 or half the sum of its factors)"
            f" = ({heads} or 1, {dim}, {rounds}, {width}), got {shape}"
        )
    checks.check_device("rotations", rotations, x.device)


def _hash(x: Tensor, rotations: Tensor, factors: Sequence[int], fallback: bool) -> Tensor:
    factors = tuple(factors)

    def fused() -> Tensor:
        turned = rotations.to(torch.float32).permute(0, 2, 3, 1).contiguous()
        return kernel_room("hash_argmax").hash_argmax(x, turned, factors, lookup, stamp())

    def defined() -> Tensor:
        with no_autocast(x.device.type):
            return reference.hash_argmax(x, rotations, factors)

    return fused_or_defined("LSH hashing", fused, defined, fallback=fallback)


def _fake_hash(x: Tensor, rotations: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], rotations.shape[2], x.shape[2]), dtype=torch.int32)


_OP = define_op(
    "hash_argmax(Tensor x, Tensor rotations, SymInt[] factors, bool fallback) -> Tensor", _hash, fake=_fake_hash
)
