"""A query's own key beside its blocks, which leave it out: as its last resort, or counted exactly once.

The forward kernel runs after the rounds, which left lse +inf in the rows that stand in a block and met no key, and -inf
in those that stand in none. The backward kernel runs before the rounds, whose gradients add to what it leaves. What it
must know of "last_resort", which rows fell back on their own key, stands in the lowest bit of lse: 1 for those.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_pairs import dropout_weight
from .tiles import head_of, load_rows, store_rows


@triton.jit
def rows_of_program(n_rows, BLOCK_M: tl.constexpr):
    """(head, its row numbers [BLOCK_M], -1 beyond the last)."""
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    rows = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return (tl.program_id(0) // n_tiles).to(tl.int64), tl.where(rows < n_rows, rows, -1)


@triton.jit
def own_key_forward_kernel(
    q_ptr, k_ptr, v_ptr, own_mask_ptr, seed_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_draws, drop_below, kept_scale, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, LAST_RESORT: tl.constexpr,
):  # fmt: skip
    row, rows = rows_of_program(n_queries, BLOCK_M)  # [BLOCK_M]
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    out_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    is_row = rows >= 0
    lse = tl.load(lse_ptr + rows, mask=is_row, other=float("-inf"))  # [BLOCK_M]
    takes_part = tl.load(own_mask_ptr + row // n_heads * n_queries + rows, mask=is_row, other=0) != 0
    own = takes_part & (lse == float("inf") if LAST_RESORT else lse != float("-inf"))
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    own_rows = tl.where(own, rows, -1)
    q = load_rows(q_ptr, own_rows, q_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    k = load_rows(k_ptr, own_rows, k_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    v = load_rows(v_ptr, own_rows, v_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    s = tl.sum(q * k, 1) * scale
    if LAST_RESORT:
        bits = tl.where(own, s, lse).to(tl.int32, bitcast=True)
        lse = tl.where(own, bits | 1, bits & -2).to(tl.float32, bitcast=True)
    else:
        top = tl.maximum(lse, s)
        top = tl.where(top == float("-inf"), 0.0, top)
        before = tl.exp2((lse - top) * 1.4426950408889634)
        p = tl.exp2((s - top) * 1.4426950408889634)
        total = before + p
        total = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(own, top + tl.log2(total) * 0.6931471805599453, lse)
        if seed_ptr is not None:
            p = p * dropout_weight(seed_ptr, row, n_draws, rows, rows, drop_below, kept_scale)
        out = load_rows(out_ptr, own_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        v = (out * before[:, None] + v * p[:, None]) / total[:, None]
    store_rows(out_ptr, own_rows, VALUE_DIM, v, VALUE_DIM, BLOCK_DV)
    tl.store(lse_ptr + rows, lse, mask=is_row)


@triton.jit
def own_key_backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, own_mask_ptr, seed_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_draws, drop_below, kept_scale, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, LAST_RESORT: tl.constexpr,
):  # fmt: skip
    # the gradients are 0 where this stores none
    row, rows = rows_of_program(n_queries, BLOCK_M)  # [BLOCK_M]
    is_row = rows >= 0
    dout_ptr += row * n_queries * VALUE_DIM
    dv_ptr += row * n_queries * VALUE_DIM
    lse = tl.load(lse_ptr + row * n_queries + rows, mask=is_row, other=float("-inf"))  # [BLOCK_M]
    takes_part = tl.load(own_mask_ptr + row // n_heads * n_queries + rows, mask=is_row, other=0) != 0
    own = takes_part & (lse != float("-inf"))
    if LAST_RESORT:
        own = own & ((lse.to(tl.int32, bitcast=True) & 1) == 1)
    own_rows = tl.where(own, rows, -1)
    dout = load_rows(dout_ptr, own_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    if LAST_RESORT:
        store_rows(dv_ptr, own_rows, VALUE_DIM, dout, VALUE_DIM, BLOCK_DV)
    else:
        q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
        k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
        v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
        delta = tl.load(delta_ptr + row * n_queries + rows, mask=own, other=0.0)  # [BLOCK_M]
        q = load_rows(q_ptr, own_rows, q_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        k = load_rows(k_ptr, own_rows, k_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        v = load_rows(v_ptr, own_rows, v_stride_n, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
        p = tl.exp2((tl.sum(q * k, 1) * scale - lse) * 1.4426950408889634)
        dp = tl.sum(dout * v, 1)
        kept = p
        if seed_ptr is not None:
            weight = dropout_weight(seed_ptr, row, n_draws, rows, rows, drop_below, kept_scale)
            dp = dp * weight
            kept = kept * weight
        ds = (p * (dp - delta) * scale)[:, None]
        store_rows(dv_ptr, own_rows, VALUE_DIM, kept[:, None] * dout, VALUE_DIM, BLOCK_DV)
        store_rows(dq_ptr + row * n_queries * HEAD_DIM, own_rows, HEAD_DIM, ds * k, HEAD_DIM, BLOCK_D)
        store_rows(dk_ptr + row * n_queries * HEAD_DIM, own_rows, HEAD_DIM, ds * q, HEAD_DIM, BLOCK_D)
