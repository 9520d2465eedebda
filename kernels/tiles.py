"""What tile kernels share: gathered rows, index blocks, and where a head begins."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Gathers rows into [len(rows), BLOCK_DIM]; row -1 and columns from DIM on read as 0."""
    columns = tl.arange(0, BLOCK_DIM)
    mask = (rows >= 0)[:, None]
    if BLOCK_DIM != DIM:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(base, rows, stride, value, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    columns = tl.arange(0, BLOCK_DIM)
    mask = (rows >= 0)[:, None]
    if BLOCK_DIM != DIM:
        mask = mask & (columns < DIM)[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], value, mask=mask)


@triton.jit
def load_index(base, block, size, start, is_block, BLOCK: tl.constexpr):
    """The row numbers start .. start + BLOCK - 1 of an index block; -1 beyond its end, or where there is no block."""
    offsets = start + tl.arange(0, BLOCK)
    return tl.load(base + block.to(tl.int64) * size + offsets, mask=(offsets < size) & is_block, other=-1)


@triton.jit
def head_of(base, row, n_heads, group_size, stride_b, stride_h):
    """Where a head begins, in a tensor that has one for ``group_size`` query heads."""
    return base + row // n_heads * stride_b + row % n_heads // group_size * stride_h
