"""The Triton kernels of block attention: one launch a round, forward, dq, and dk with dv."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_pairs import counted, dropout_weight, neighbour, place
from .tiles import head_of, load_index, load_rows, store_rows


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale_log2,
    n_used_blocks_ptr, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
    local_index_q_ptr, local_index_k_ptr, n_local_blocks, seed_ptr, drop_below, kept_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, OWN_KEY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one block
    IS_LOCAL: tl.constexpr = tl.constexpr(local_index_q_ptr is not None)
    row, block, m_tile = place(n_local_blocks if IS_LOCAL else n_blocks, tl.cdiv(c_q, BLOCK_M))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    out_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    n_used = None if n_used_blocks_ptr is None else tl.load(n_used_blocks_ptr + row // n_heads)
    n_ring = n_blocks if n_used is None else n_used
    if IS_LOCAL:
        q_index_ptr = local_index_q_ptr + row * n_local_blocks * c_q
        k_index_ptr = local_index_k_ptr + row * n_local_blocks * c_k
        n_window = 1
    else:
        q_index_ptr += (row * n_rounds + round_id) * n_blocks * c_q
        k_index_ptr += row * n_rounds * n_blocks * c_k
        n_window = 1 + look_back + look_ahead
        if n_used is not None:
            n_window = tl.where(block < n_used, n_window, 0)

    q_rows = load_index(q_index_ptr, block, c_q, m_tile * BLOCK_M, True, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if IS_FIRST:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    else:
        # the earlier rounds stand as one key of logit lse and value out
        lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=float("-inf"))  # [BLOCK_M]
        if OWN_KEY:
            lse = tl.where(lse == float("inf"), float("-inf"), lse)
        m = lse * 1.4426950408889634
        total = tl.where(lse == float("-inf"), 0.0, 1.0)
        acc = load_rows(out_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]

    n_tiles = tl.cdiv(c_k, BLOCK_N)
    for step in range(0, n_window * n_tiles):
        if IS_LOCAL:
            k_block, is_block, k_round, at = block, True, round_id, 0
        else:
            distance = step // n_tiles - look_back
            k_block, is_block = neighbour(block, distance, round_id, n_rounds, n_blocks, n_used, WRAP)
            k_round = k_block // n_blocks
            at = step // n_tiles
        k_rows = load_index(k_index_ptr, k_block, c_k, (step % n_tiles) * BLOCK_N, is_block, BLOCK_N)  # [BLOCK_N]
        keep = counted(
            q_rows[:, None], k_rows[None, :], row, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
            n_queries, n_keys, n_rounds, n_ring, look_back, look_ahead, round_id, k_round, at,
            IS_CAUSAL, EXCLUDE_SELF, WRAP, IS_LOCAL,
        )  # fmt: skip
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        s = tl.where(keep, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without keys: exp2(-inf - 0) = 0, not NaN
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        total = total * alpha + tl.sum(p, 1)
        if seed_ptr is not None:
            p = p * dropout_weight(
                seed_ptr, row, round_id, q_rows[:, None], k_rows[None, :], drop_below, kept_scale
            )  # fmt: skip
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    met = total != 0.0  # also where it is NaN
    total = tl.where(met, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    # where an own key may follow, rows that stand in a block and met no key are told from those in none
    lse = tl.where(met, (m + tl.log2(total)) * 0.6931471805599453, float("inf" if OWN_KEY else "-inf"))
    store_rows(out_ptr, q_rows, VALUE_DIM, out, VALUE_DIM, BLOCK_DV)
    tl.store(lse_ptr + q_rows, lse, mask=q_rows >= 0)


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def backward_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale,
    n_used_blocks_ptr, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
    local_index_q_ptr, local_index_k_ptr, n_local_blocks, seed_ptr, drop_below, kept_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one block
    IS_LOCAL: tl.constexpr = tl.constexpr(local_index_q_ptr is not None)
    row, block, m_tile = place(n_local_blocks if IS_LOCAL else n_blocks, tl.cdiv(c_q, BLOCK_M))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    dout_ptr += row * n_queries * VALUE_DIM
    dq_ptr += row * n_queries * HEAD_DIM
    lse_ptr += row * n_queries
    delta_ptr += row * n_queries
    n_used = None if n_used_blocks_ptr is None else tl.load(n_used_blocks_ptr + row // n_heads)
    n_ring = n_blocks if n_used is None else n_used
    if IS_LOCAL:
        q_index_ptr = local_index_q_ptr + row * n_local_blocks * c_q
        k_index_ptr = local_index_k_ptr + row * n_local_blocks * c_k
        n_window = 1
    else:
        q_index_ptr += (row * n_rounds + round_id) * n_blocks * c_q
        k_index_ptr += row * n_rounds * n_blocks * c_k
        n_window = 1 + look_back + look_ahead
        if n_used is not None:
            n_window = tl.where(block < n_used, n_window, 0)

    q_rows = load_index(q_index_ptr, block, c_q, m_tile * BLOCK_M, True, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634  # [BLOCK_M]
    delta = tl.load(delta_ptr + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
    if IS_FIRST:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        dq = load_rows(dq_ptr, q_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    n_tiles = tl.cdiv(c_k, BLOCK_N)
    for step in range(0, n_window * n_tiles):
        if IS_LOCAL:
            k_block, is_block, k_round, at = block, True, round_id, 0
        else:
            distance = step // n_tiles - look_back
            k_block, is_block = neighbour(block, distance, round_id, n_rounds, n_blocks, n_used, WRAP)
            k_round = k_block // n_blocks
            at = step // n_tiles
        k_rows = load_index(k_index_ptr, k_block, c_k, (step % n_tiles) * BLOCK_N, is_block, BLOCK_N)  # [BLOCK_N]
        keep = counted(
            q_rows[:, None], k_rows[None, :], row, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
            n_queries, n_keys, n_rounds, n_ring, look_back, look_ahead, round_id, k_round, at,
            IS_CAUSAL, EXCLUDE_SELF, WRAP, IS_LOCAL,
        )  # fmt: skip
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if seed_ptr is not None:
            dp = dp * dropout_weight(
                seed_ptr, row, round_id, q_rows[:, None], k_rows[None, :], drop_below, kept_scale
            )  # fmt: skip
        ds = p * (dp - delta[:, None]) * scale
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    store_rows(dq_ptr, q_rows, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def backward_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale,
    n_used_blocks_ptr, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
    local_index_q_ptr, local_index_k_ptr, n_local_blocks, seed_ptr, drop_below, kept_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_N keys of one block, for one query head (heads of a group are summed afterwards)
    IS_LOCAL: tl.constexpr = tl.constexpr(local_index_q_ptr is not None)
    row, block, n_tile = place(n_local_blocks if IS_LOCAL else n_blocks, tl.cdiv(c_k, BLOCK_N))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    dout_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    delta_ptr += row * n_queries
    dk_ptr += row * n_keys * HEAD_DIM
    dv_ptr += row * n_keys * VALUE_DIM
    n_used = None if n_used_blocks_ptr is None else tl.load(n_used_blocks_ptr + row // n_heads)
    n_ring = n_blocks if n_used is None else n_used
    if IS_LOCAL:
        q_index_ptr = local_index_q_ptr + row * n_local_blocks * c_q
        k_index_ptr = local_index_k_ptr + row * n_local_blocks * c_k
        n_window = 1
    else:
        q_index_ptr += row * n_rounds * n_blocks * c_q
        k_index_ptr += (row * n_rounds + round_id) * n_blocks * c_k
        n_window = 1 + look_back + look_ahead
        if n_used is not None:
            n_window = tl.where(block < n_used, n_window, 0)

    k_rows = load_index(k_index_ptr, block, c_k, n_tile * BLOCK_N, True, BLOCK_N)  # [BLOCK_N]
    k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    if IS_FIRST:
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    else:
        dk = load_rows(dk_ptr, k_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dv = load_rows(dv_ptr, k_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    m_tiles = tl.cdiv(c_q, BLOCK_M)
    for step in range(0, n_window * m_tiles):
        if IS_LOCAL:
            q_block, is_block, q_round, at = block, True, round_id, 0
        else:
            # the queries that look back to these keys stand after them, and the other way round
            distance = step // m_tiles - look_ahead
            q_block, is_block = neighbour(block, distance, round_id, n_rounds, n_blocks, n_used, WRAP)
            q_round = q_block // n_blocks if WRAP else round_id
            at = look_back + look_ahead - step // m_tiles
        q_rows = load_index(q_index_ptr, q_block, c_q, (step % m_tiles) * BLOCK_M, is_block, BLOCK_M)  # [BLOCK_M]
        keep = counted(
            q_rows[None, :], k_rows[:, None], row, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr,
            n_queries, n_keys, n_rounds, n_ring, look_back, look_ahead, q_round, round_id, at,
            IS_CAUSAL, EXCLUDE_SELF, WRAP, IS_LOCAL,
        )  # fmt: skip
        q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_rows(dout_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634  # [BLOCK_M]
        delta = tl.load(delta_ptr + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        # transposed, so that p and ds are left operands as they come
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)  # [BLOCK_N, BLOCK_M]
        p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
        if seed_ptr is not None:
            weight = dropout_weight(
                seed_ptr, row, q_round, q_rows[None, :], k_rows[:, None], drop_below, kept_scale
            )  # fmt: skip
            dv = tl.dot((p * weight).to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION) * weight  # [BLOCK_N, BLOCK_M]
        else:
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - delta[None, :]) * scale
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    store_rows(dk_ptr, k_rows, HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, k_rows, VALUE_DIM, dv, VALUE_DIM, BLOCK_DV)
