"""Lloyd's algorithm on packed binary codes, as ``fastattn::hamming_kmeans``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.kernels.rows import check_rows
from fastattn.ops import checks
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.hash_bits import MOST_BITS
from fastattn.ops.library import define_op
from fastattn.reference import hamming_kmeans as reference


def hamming_kmeans(
    codes: Tensor,
    n_clusters: int,
    *,
    n_bits: int,
    n_iterations: int = 10,
    mask: Tensor | None = None,
    initial: Tensor | None = None,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> Tensor:
    """Clusters of binary codes by their Hamming distance, for each example and head (Vyas et al. 2020, section 3.2.2).

    ``n_iterations`` assignments of every row to its nearest centroid, the first of those at the same distance, and
    between them an update: a centroid's bit is 1 if more than half of its members have it, and a centroid without
    members gets random bits. All of it runs on the device of the codes, which no host waits for, on all of its cores,
    and without atomics: the same arguments give the same clusters on every device.

    Args:
        codes: (B, H, N) int64, as :func:`~fastattn.ops.hash_bits.hash_bits` makes them.
        n_clusters: at least 1. With fewer rows that take part than this, only as many clusters are used.
        n_bits: the bits of a code that count, 1 to 63.
        n_iterations: assignments, at least 1.
        mask: (B, N) bool, True for rows that take part; the others are in no cluster and count in no centroid.
        initial: rows whose codes are the first centroids, (C,) or (B, H, C), int32 or int64, taken as given: also where
            the mask is False, and more than once; -1 stands for a cluster that is never used. None: drawn without
            repetition among the rows that take part, the same for all heads.
        seed: of what is drawn: an int, or int64 without dimensions on the codes' device.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        Clusters (B, H, N), int32, 0 to C - 1, or -1 for a row that takes no part.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(codes=codes)
    checks.check_choice("impl", impl, checks.IMPLS)
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be torch.int64, got {codes.dtype}")
    if codes.dim() != 3 or 0 in codes.shape:
        raise ValueError(f"codes must have shape (batch, heads, length), none of them 0, got {tuple(codes.shape)}")
    checks.check_int("n_clusters", n_clusters, 1)
    check_n_bits(n_bits)
    checks.check_int("n_iterations", n_iterations, 1)
    checks.check_mask("mask", mask, codes.shape[0], codes.shape[2], codes.device)
    if initial is not None:
        check_initial("initial", initial, codes, n_clusters)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != codes.device:
            raise ValueError(
                f"seed must be an int, or a torch.int64 without dimensions on {codes.device}, "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
    else:
        checks.check_int("seed", seed, 0)
        seed = torch.full((), seed, dtype=torch.int64, device=codes.device)
    return cluster_codes(
        codes, n_clusters, n_bits=n_bits, n_iterations=n_iterations, mask=mask, initial=initial, seed=seed, impl=impl
    )


def check_n_bits(n_bits: Any) -> None:
    checks.check_int("n_bits", n_bits, 1)
    if n_bits > MOST_BITS:
        raise ValueError(f"n_bits must be at most {MOST_BITS}, got {n_bits}")


def check_initial(name: str, rows: Any, codes: Tensor, n_clusters: int) -> None:
    """Row numbers (C,) or (B, H, C), as the first centroids of ``codes`` (B, H, N)."""
    checks.check_tensors(**{name: rows})
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {rows.dtype}")
    if tuple(rows.shape) not in ((n_clusters,), (*codes.shape[:2], n_clusters)):
        raise ValueError(
            f"{name} must have shape (n_clusters,) = ({n_clusters},) or (batch, heads, n_clusters) = "
            f"{(*codes.shape[:2], n_clusters)}, got {tuple(rows.shape)}"
        )
    if rows.device != codes.device:
        raise ValueError(f"{name} must be on the device {codes.device} of what is clustered, got {rows.device}")
    check_rows(name, rows, codes.shape[2])


@torch.no_grad()
def cluster_codes(
    codes: Tensor,
    n_clusters: int,
    *,
    n_bits: int,
    n_iterations: int,
    mask: Tensor | None,
    initial: Tensor | None,
    seed: Tensor,
    impl: str | None = None,
) -> Tensor:
    """:func:`hamming_kmeans` for methods, which have checked their arguments already."""
    batch, heads, length = codes.shape
    if initial is None:
        initial = reference.first_rows(seed, length, n_clusters, mask)
        if mask is not None:
            initial = initial.unsqueeze(1)
    initial = initial.to(torch.int32).expand(batch, heads, n_clusters)
    if impl == "reference":
        return reference.hamming_kmeans(codes, initial, mask, seed, n_bits=n_bits, n_iterations=n_iterations)
    return _OP(codes, initial, mask, seed, n_bits, n_iterations, impl is None)


def _kmeans(
    codes: Tensor, initial: Tensor, mask: Tensor | None, seed: Tensor, n_bits: int, n_iterations: int, fallback: bool
) -> Tensor:
    def fused() -> Tensor:
        room = kernel_room("hamming")
        return room.kmeans(codes, initial, mask, seed, n_bits, n_iterations, lookup, stamp())

    def defined() -> Tensor:
        return reference.hamming_kmeans(codes, initial, mask, seed, n_bits=n_bits, n_iterations=n_iterations)

    return fused_or_defined("hamming_kmeans", fused, defined, fallback=fallback)


def _fake(codes: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.int32)


_OP = define_op(
    "hamming_kmeans(Tensor codes, Tensor initial, Tensor? mask, Tensor seed, int n_bits, int n_iterations,"
    " bool fallback) -> Tensor",
    _kmeans,
    fake=_fake,
)
