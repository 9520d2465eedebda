"""Tiles of features for linear attention: rows are loaded and go through the feature map at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, keep, stride, start, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[len(rows), BLOCK] from column ``start`` on; rows that are not kept and columns from DIM on read as 0."""
    columns = start + tl.arange(0, BLOCK)
    mask = keep[:, None]
    if DIM % BLOCK != 0:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def feature(x, FEATURE_MAP: tl.constexpr):
    """phi of x, which is fp32: "elu" (elu + 1), "relu", "relu2" (its square) or "identity"; of NaN it is NaN."""
    if FEATURE_MAP == "elu":
        return tl.where(x > 0, x + 1.0, tl.exp(x))
    elif FEATURE_MAP == "relu":
        return tl.where(x < 0, 0.0, x)
    elif FEATURE_MAP == "relu2":
        return tl.where(x < 0, 0.0, x * x)
    else:
        return x


@triton.jit
def load_features(
    base, rows, keep, stride, start, FEATURE_MAP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """phi of such a tile, in fp32; also 0 where that reads as 0."""
    phi = feature(load_tile(base, rows, keep, stride, start, DIM, BLOCK).to(tl.float32), FEATURE_MAP)
    if FEATURE_MAP == "elu":  # of 0 it is 1
        mask = keep[:, None]
        if DIM % BLOCK != 0:
            mask = mask & (start + tl.arange(0, BLOCK) < DIM)[None, :]
        phi = tl.where(mask, phi, 0.0)
    return phi


@triton.jit
def slope(x, FEATURE_MAP: tl.constexpr):
    """The derivative of phi, of x in fp32."""
    if FEATURE_MAP == "elu":
        return tl.where(x > 0, 1.0, tl.exp(x))
    elif FEATURE_MAP == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif FEATURE_MAP == "relu2":
        return tl.where(x > 0, 2.0 * x, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def operand(x, pointer, NARROW: tl.constexpr):
    """x as a product takes it: in the type that ``pointer`` points to, or in fp32."""
    if NARROW:
        return x.to(pointer.dtype.element_ty)
    else:
        return x.to(tl.float32)
