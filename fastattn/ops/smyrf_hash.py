"""SMYRF's hash as a torch op: ``fastattn::smyrf_hash``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_op
from fastattn.reference import smyrf_hash as reference


def smyrf_hash(
    q: Tensor,
    k: Tensor,
    projections: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys on one sphere, projected on directions: rows of large inner product have hashes that are near.

    The hash of SMYRF (Daras et al. 2020, section 3.2): F(q) = [q ; 0 ; sqrt(R2 - |q|^2)] and
    G(k) = [k ; sqrt(R2 - |k|^2) ; 0] on each direction, where R2 = max |q|^2 + max |k|^2 over the rows of a head that
    take part. Two kernels a side: memory is that of the results and a number a row. Products are fp32 whatever the rows
    and torch's own precision are.

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        k: (B, Hkv, S, D) in q's dtype; H is a multiple of Hkv.
        projections: R directions, (D + 2, R) for all heads or (B, H, D + 2, R), of a floating dtype, used in fp32 (fp64
            for fp64 inputs), in the order [D rows for q or k; that of k's last coordinate; that of q's].
        query_mask: (B, N) bool, True for queries that take part. What stands in the others changes no hash but their
            own, which may be anything. None: all take part.
        key_mask: (B, S) bool, the same for keys.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        (q_hash (B, H, R, N), k_hash (B, H, R, S)), fp32 (fp64 for fp64). They carry no gradient. On one device a row's
        hash depends, to the bit, on the row, its head's directions and R2 alone. Where a row that takes part is not
        finite, all hashes of its head may be anything.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(q=q, k=k)
    checks.check_choice("impl", impl, checks.IMPLS)
    checks.check_qkv(q, k, k, impl)
    _check_projections(projections, q)
    checks.check_mask("query_mask", query_mask, q.shape[0], q.shape[2], q.device)
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], k.device)
    return hash_rows(q, k, projections, query_mask, key_mask, impl)


def hash_rows(
    q: Tensor, k: Tensor, projections: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, impl: str | None
) -> tuple[Tensor, Tensor]:
    """:func:`smyrf_hash` for methods, which have checked their arguments already."""
    q, k, projections = q.detach(), k.detach(), projections.detach()
    if impl == "reference":
        with no_autocast(q.device.type):
            return reference.smyrf_hash(q, k, projections, query_mask, key_mask)
    return _OP(q, k, projections, query_mask, key_mask, impl is None)


def _check_projections(projections: Any, q: Tensor) -> None:
    checks.check_tensors(projections=projections)
    if not projections.is_floating_point():
        raise TypeError(f"projections must be of a floating dtype, got {projections.dtype}")
    batch, heads, _, dim = q.shape
    *lead, coordinates, rounds = projections.shape if projections.dim() >= 2 else (-1, -1)
    if (lead and lead != [batch, heads]) or coordinates != dim + 2 or rounds < 1:
        raise ValueError(
            f"projections must have shape (head_dim + 2, rounds) = ({dim + 2}, rounds) or (batch, heads, head_dim + 2, "
            f"rounds) = ({batch}, {heads}, {dim + 2}, rounds), got {tuple(projections.shape)}"
        )
    checks.check_device("projections", projections, q.device)


def _hash(
    q: Tensor, k: Tensor, projections: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, fallback: bool
) -> tuple[Tensor, Tensor]:
    def fused() -> tuple[Tensor, Tensor]:
        room = kernel_room("smyrf_hash")
        turned = projections.to(torch.float32).mT.contiguous().expand(q.shape[0], q.shape[1], -1, -1)
        return room.smyrf_hash(q, k, turned, query_mask, key_mask, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor]:
        with no_autocast(q.device.type):
            return reference.smyrf_hash(q, k, projections, query_mask, key_mask)

    return fused_or_defined("SMYRF's hash", fused, defined, fallback=fallback)


def _fake_hash(q: Tensor, k: Tensor, projections: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rounds = q.shape[0], q.shape[1], projections.shape[-1]
    shapes = (batch, heads, rounds, q.shape[2]), (batch, heads, rounds, k.shape[2])
    q_hash, k_hash = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return q_hash, k_hash


_OP = define_op(
    "smyrf_hash(Tensor q, Tensor k, Tensor projections, Tensor? query_mask, Tensor? key_mask, bool fallback)"
    " -> (Tensor q_hash, Tensor k_hash)",
    _hash,
    fake=_fake_hash,
)
