"""Gathered block attention: each block of query rows attends to its block of key rows, in several rounds.

A round is one launch. It starts from the running (out, lse) of its rows and leaves the new ones, so that after the
last round each row holds one softmax over all the keys that it met, and nothing is kept per round. The backward
recomputes the probabilities from that total lse, as in FlashAttention-2 (Dao 2023, section 3.1): one launch a round
for dq and one for dk, dv. Index blocks partition the rows of a round, so each row has one writer: no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from .block_pairs import counted, dropout_weight, neighbour, place
from .config import READS_SHARED, SCORE_OPS, TIGHT, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .own_key import own_key_backward_kernel, own_key_forward_kernel
from .rows import check_counts, check_rows
from .tiles import head_of, load_index, load_rows, store_rows

LOG2_E = math.log2(math.e)
FAR = 2**29  # blocks away: farther than any window reaches, and twice as far still fits 32 bits
# what results hold before the first launch: that of rows that are in no block
_FORWARD_BEGINS = {"out_ptr": 0.0, "lse_ptr": -math.inf}
_BACKWARD_BEGINS = {"dq_ptr": 0.0, "dk_ptr": 0.0, "dv_ptr": 0.0}
# self_mode, correct_duplicates, dropout_p; no buckets, no local round, every block used
_PLAIN = ("attend", False, 0.0, False, False, False)


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


_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
# those of own keys read each row once, in order, and have nothing to tune
TUNING: dict[str, TuningSpace] = {
    "block_attention_forward": _SPACE,
    "block_attention_backward_dq": _SPACE,
    "block_attention_backward_dkv": _SPACE,
}
KERNELS = {
    "block_attention_forward": forward_kernel,
    "block_attention_backward_dq": backward_dq_kernel,
    "block_attention_backward_dkv": backward_dkv_kernel,
    "block_attention_own_key_forward": own_key_forward_kernel,
    "block_attention_own_key_backward": own_key_backward_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, rounds: int, n_blocks: int, c_q: int, c_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, neighbours: int = 1, correct_duplicates: bool = False,
    config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of all the rounds of one pass of ``kernel`` (a key of :data:`TUNING`). neighbours: blocks in a window."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    blocks = batch * heads * rounds * n_blocks
    pairs, dims = blocks * c_q * c_k * neighbours, head_dim + value_dim
    # the block numbers of a pair's rows in each round before its own
    numbers = 2 * (rounds - 1) * blocks * (c_q + c_k) if correct_duplicates else 0
    # bytes of a row: of queries, with an index, and of keys
    of_q, of_k = head_dim * element_size + 4, dims * element_size + 4
    if kernel == "block_attention_forward":
        of_q += 8 * (value_dim + 1)  # the running out and lse, read and written
        flops = 2 * pairs * dims
    elif kernel == "block_attention_backward_dq":
        of_q += value_dim * element_size + 8 * head_dim + 8
        flops = 2 * pairs * (2 * head_dim + value_dim)
    else:
        of_q += value_dim * element_size + 8
        of_k += 8 * dims
        flops = 4 * pairs * dims
    work = Cost(flops, blocks * (c_q * of_q + c_k * of_k) + numbers, pairs, launches=rounds)
    if config is None:
        return work
    m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    d, dv = padded(head_dim), padded(value_dim)
    m_tiles, n_tiles = cdiv(c_q, m), cdiv(c_k, n)
    steps = blocks * m_tiles * n_tiles * neighbours
    score, weights = (m, n, d), (m, n, dv)
    if kernel == "block_attention_forward":
        shapes, pointwise = (score, (m, dv, n)), SCORE_OPS * m * n + m * dv
    elif kernel == "block_attention_backward_dq":
        shapes, pointwise = (score, weights, (m, d, n)), SCORE_OPS * m * n
    else:
        shapes, pointwise = (score, weights, (n, d, m), (n, dv, m)), SCORE_OPS * m * n
    # one side's tiles stay with their program; the other side's pass by each of these
    again_q, again_k = (n_tiles * neighbours, 1) if kernel.endswith("dkv") else (1, m_tiles * neighbours)
    return replace(
        work, **products(steps, *shapes), tile_exps=steps * m * n, pointwise=steps * pointwise, steps=steps,
        held=4 * m * n * (1 if kernel.endswith("forward") else 2),  # the scores, and their gradients
        loaded=blocks * (c_q * of_q * again_q + c_k * of_k * again_k) + numbers * max(again_q, again_k),
    )  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Which keys a query meets, beside its block's own: see :func:`forward`."""

    look_back: int = 0
    look_ahead: int = 0
    wrap: bool = True
    is_causal: bool = False
    exclude_self: bool = False
    last_resort: bool = False
    once: bool = False
    correct_duplicates: bool = False
    buckets: bool = False
    dropout: bool = False

    @property
    def own_key(self) -> bool:
        """Whether the blocks leave a query's own key to the kernels of own keys."""
        return self.last_resort or self.once


def heuristic(
    kernel: str, device_type: str, c_q: int, c_k: int, head_dim: int, element_size: int = 4,
    pattern: Pattern | None = None,
) -> Config:  # fmt: skip
    """The configuration where nothing was tuned: whole blocks as tiles up to what registers (or the cache) hold.

    device_type: as :func:`~fastattn.kernels.launch.device_kind` says it; ``"cuda"`` or ``"hip"`` is any GPU of that
    vendor. On a GPU these are the largest tiles whose binaries spill nothing, on sm_80 to sm_120 and gfx942; fp32 with
    head dims above 128 spills on NVIDIA whatever the tiles are.
    """
    if "own_key" in kernel:
        return Config({"BLOCK_M": max(16, 4096 // next_power_of_2(head_dim))}, num_stages=1)
    backward = kernel != "block_attention_forward"
    warps, stages = 4, 2
    if device_type == "cpu":
        most = (128, 128) if head_dim <= 64 else (64, 64)
    elif device_type.startswith("hip"):
        # its registers do not hold a second stage of tiles
        most, stages = ((64, 64) if element_size * head_dim <= 256 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((32, 16) if kernel.endswith("dkv") else (32, 32)) if head_dim <= 64 else (16, 16)
    elif kernel.endswith("dkv") and head_dim <= 64:
        is_padded = head_dim < next_power_of_2(head_dim)
        most = (32, 32 if device_type in TIGHT and is_padded else 64)
        if device_type in READS_SHARED and not (pattern and pattern.dropout):  # draws take registers
            most = (64, 64)
    elif head_dim <= 64:
        most = (64, 64) if backward else (128, 128)
        warps = 4 if backward or min(c_q, c_k) <= 64 else 8
    elif head_dim <= 128:
        most, warps = (64, 64), 8
    else:
        most, warps, stages = (32, 32), 8 if kernel.endswith("dkv") else 4, 1
    is_exact_dq = kernel.endswith("dq") and element_size > 2
    if pattern and device_type.startswith("cuda") and (pattern.correct_duplicates or (pattern.dropout and is_exact_dq)):
        warps = 8  # the mask that is carried through the rounds before, and draws beside exact dots, take registers
    if pattern and pattern.correct_duplicates and device_type != "cpu":
        stages = 1  # the loop over the rounds before ends the pipeline
        most = (min(32, most[0]), most[1]) if kernel.endswith("dkv") else most
    m, n = (min(limit, max(16, next_power_of_2(size))) for limit, size in zip(most, (c_q, c_k), strict=True))
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def launches_of(
    kernel: str, tensors: Mapping[str, torch.Tensor], pattern: Pattern, scale: float, config: Mapping[str, Config],
    dropout_p: float = 0.0,
) -> Iterator[Launch]:  # fmt: skip
    """The launches of ``kernel`` on ``tensors``, named as the kernel's pointer arguments without ``_ptr``; there may be
    more than it takes, and those of options that are off are left out. One launch a round, and one for the local round
    if its index is there; a kernel of own keys has one in all.

    config: by kernel; where blocks of the local round have another size, the heuristic's serves there.
    """
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    _, _, n_rounds, n_blocks, c_q = tensors["q_index"].shape
    c_k = tensors["k_index"].shape[4]
    device, is_dkv = device_kind(q.device), kernel == "block_attention_backward_dkv"
    chosen = config.get(kernel) or heuristic(kernel, device, c_q, c_k, head_dim, q.element_size(), pattern)
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items() if not name.startswith("local_")}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries}
    if is_dkv or pattern.correct_duplicates or pattern.buckets:
        args["n_keys"] = n_keys
    args |= {"n_rounds": n_rounds, "n_blocks": n_blocks, "c_q": c_q, "c_k": c_k}
    args |= {"look_back": pattern.look_back, "look_ahead": pattern.look_ahead}
    args |= {"scale": scale, "scale_log2": scale * LOG2_E}
    if pattern.dropout:
        args |= {"drop_below": round(dropout_p * 2**24), "kept_scale": 1 / (1 - dropout_p)}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim))}
    args |= {"IS_CAUSAL": pattern.is_causal, "EXCLUDE_SELF": pattern.exclude_self, "WRAP": pattern.wrap}
    args |= {"OWN_KEY": pattern.own_key, "LAST_RESORT": pattern.last_resort, "PRECISION": dot_precision(q.dtype)}
    # None: an argument of an option that is off
    args = {name: args.get(name) for name in KERNELS[kernel].arg_names if name not in chosen.blocks}
    local = [tensors[name] for name in ("local_index_q", "local_index_k") if name in tensors]
    if "own_key" in kernel:
        grid = (batch * heads * cdiv(n_queries, chosen.blocks["BLOCK_M"]),)
        yield Launch(KERNELS[kernel], grid, args | {"n_draws": n_rounds + bool(local)}, chosen)
        return

    def grid_of(n_blocks: int, c_q: int, c_k: int, chosen: Config) -> tuple[int]:
        size, tile = (c_k, chosen.blocks["BLOCK_N"]) if is_dkv else (c_q, chosen.blocks["BLOCK_M"])
        return (batch * heads * n_blocks * cdiv(size, tile),)

    grid, rows = grid_of(n_blocks, c_q, c_k, chosen), {"q_index_ptr": n_queries, "k_index_ptr": n_keys}
    is_backward = kernel != "block_attention_forward"
    for round_id in range(n_rounds):
        # the backward of own keys comes before, and leaves gradients to be added to
        is_first = round_id == 0 and not (is_backward and pattern.own_key)
        yield Launch(KERNELS[kernel], grid, args | {"round_id": round_id, "IS_FIRST": is_first}, chosen, rows)
    if local:
        n_local, local_c_q, local_c_k = *local[0].shape[3:], local[1].shape[4]
        if (local_c_q, local_c_k) != (c_q, c_k):
            chosen = heuristic(kernel, device, local_c_q, local_c_k, head_dim, q.element_size(), pattern)
        args |= {"local_index_q_ptr": local[0], "local_index_k_ptr": local[1], "q_index_ptr": None, "k_index_ptr": None}
        args |= {"n_local_blocks": n_local, "c_q": local_c_q, "c_k": local_c_k, "round_id": n_rounds, "IS_FIRST": False}
        rows = {"local_index_q_ptr": n_queries, "local_index_k_ptr": n_keys}
        yield Launch(KERNELS[kernel], grid_of(n_local, local_c_q, local_c_k, chosen), args, chosen, rows)


def pattern_of(
    look_back: int, look_ahead: int, wrap: bool, is_causal: bool, self_mode: str, correct_duplicates: bool,
    dropout_p: float, buckets: bool,
) -> Pattern:  # fmt: skip
    return Pattern(
        look_back, look_ahead, wrap, is_causal, exclude_self=self_mode != "attend",
        last_resort=self_mode == "last_resort", once=self_mode == "once",
        correct_duplicates=correct_duplicates, buckets=buckets, dropout=dropout_p > 0,
    )  # fmt: skip


def _run(
    kernels: tuple[str, ...], tensors: dict[str, torch.Tensor], made: int, flags: tuple[Any, ...], scale: float,
    lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """All launches of each of ``kernels``, one kernel after the other; see ``run_planned`` for ``made``. flags: the
    arguments of :func:`pattern_of`, and whatever else tells which tensors are there."""

    def launches() -> Iterator[Launch]:
        q, pattern, dropout_p = tensors["q"], pattern_of(*flags[:8]), flags[6]
        fill = dict(_FORWARD_BEGINS if "block_attention_forward" in kernels else _BACKWARD_BEGINS)
        batch, heads, rounds, n_blocks, c_q = tensors["q_index"].shape
        shape = {"batch": batch, "heads": heads, "rounds": rounds, "n_blocks": n_blocks, "c_q": c_q}
        shape |= {"c_k": tensors["k_index"].shape[4], "head_dim": q.shape[3], "value_dim": tensors["v"].shape[3]}
        for kernel in kernels:
            tuned = lookup(kernel, q.device, q.dtype, shape, vars(pattern)) if lookup and kernel in TUNING else None
            config = {kernel: tuned} if tuned else {}
            for launch in launches_of(kernel, tensors, pattern, scale, config, dropout_p):
                begun = [name for name in fill if launch.args.get(name) is not None]
                yield replace(launch, fill={name: fill.pop(name) for name in begun})

    run_planned((kernels, flags, scale, torch.get_float32_matmul_precision(), stamp), tensors, launches, made=made)


def block_numbers(name: str, index: torch.Tensor, length: int) -> torch.Tensor:
    """In which block each row stands in each round, (B, H, R, length) int32, from ``index`` (B, H, R, nb, C); the
    absent are so far off that they stand in no window."""
    check_rows(name, index, length)
    rows = index.flatten(3).long()
    n_blocks, size = index.shape[3:]
    numbers = torch.arange(n_blocks, dtype=torch.int32, device=index.device).repeat_interleave(size)
    absent = index.new_full((*rows.shape[:3], length + 1), FAR if name == "q_index" else -FAR)
    return absent.scatter_(3, rows.masked_fill_(rows < 0, length), numbers.expand_as(rows))[..., :-1].contiguous()


def _of_options(
    tensors: dict[str, torch.Tensor], flags: tuple[Any, ...], key_mask: torch.Tensor | None, *given: torch.Tensor | None
) -> int:
    """Adds to ``tensors`` what options need beside them. given: the last six tensors of :func:`forward`. Returns how
    many of them follow from the others."""
    names = ("q_bucket", "k_bucket", "local_index_q", "local_index_k", "seed", "n_used_blocks")
    for name, tensor in zip(names, given, strict=True):
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    if "n_used_blocks" in tensors:
        check_counts("n_used_blocks", tensors["n_used_blocks"], tensors["q_index"].shape[3])
    if flags[4] in ("last_resort", "once"):
        batch, n_keys = tensors["k"].shape[0], tensors["k"].shape[2]
        no_mask = tensors["q_index"].new_ones((batch, n_keys), dtype=torch.bool)
        tensors["own_mask"] = no_mask if key_mask is None else key_mask.contiguous()
    if not flags[5]:
        return 0
    for side, x in (("q", tensors["q"]), ("k", tensors["k"])):
        tensors[f"{side}_block"] = block_numbers(f"{side}_index", tensors[f"{side}_index"], x.shape[2])
    return 2


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, self_mode: str = "attend",
    correct_duplicates: bool = False, dropout_p: float = 0.0, key_mask: torch.Tensor | None = None,
    q_bucket: torch.Tensor | None = None, k_bucket: torch.Tensor | None = None,
    local_index_q: torch.Tensor | None = None, local_index_k: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, n_used_blocks: torch.Tensor | None = None, *,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of block attention; the arguments but for the index values are checked by
    ``fastattn.ops.block_attention``, which says what they mean.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); q_index (B, H, R, nb, Cq), k_index (B, H, R, nb, Ck), int32
    and contiguous, -1 is padding. key_mask: folded into the indices already; here it says whose own key takes part.
    seed: int64, without dimensions, where ``dropout_p`` is not 0. n_used_blocks: (B,) int32. lookup: gives tuned
    configurations; its answers are kept while ``stamp`` stays the same. Returns out (B, H, N, Dv) in q's dtype and lse
    (B, H, N) in fp32; a row that meets no key has 0 and -inf. In the lowest bit of lse, "last_resort" tells the
    backward which rows fell back on their own key. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, _ = q.shape
    tensors = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    options = (self_mode, correct_duplicates, dropout_p, q_bucket is not None, local_index_q is not None)
    options += (n_used_blocks is not None,)
    flags = (look_back, look_ahead, wrap, is_causal, *options)
    kernels, made = ("block_attention_forward",), 2
    if options != _PLAIN:
        given = (key_mask, q_bucket, k_bucket, local_index_q, local_index_k, seed, n_used_blocks)
        made += _of_options(tensors, flags, *given)
        if self_mode in ("last_resort", "once"):
            kernels += ("block_attention_own_key_forward",)
    # what fp32 tensors are made from: to name the dtype for each costs 0.5 to 1 us
    fp32 = q if q.dtype == torch.float32 else q.new_empty((), dtype=torch.float32)
    # between launches the running out is fp32, whatever the inputs are
    is_one_launch = q_index.shape[2] == 1 and local_index_q is None and len(kernels) == 1
    # sizes one by one: as a tuple they take 0.4 us more
    out = (q if is_one_launch else fp32).new_empty(batch, heads, n_queries, v.shape[3])
    lse = fp32.new_empty(batch, heads, n_queries)
    tensors["out"], tensors["lse"] = out, lse
    _run(kernels, tensors, made, flags, scale, lookup, stamp)
    return (out if is_one_launch or fp32 is q else out.to(q.dtype)), lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor,
    k_index: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, self_mode: str = "attend",
    correct_duplicates: bool = False, dropout_p: float = 0.0, key_mask: torch.Tensor | None = None,
    q_bucket: torch.Tensor | None = None, k_bucket: torch.Tensor | None = None,
    local_index_q: torch.Tensor | None = None, local_index_k: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, n_used_blocks: torch.Tensor | None = None, *,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) from dout (B, H, N, Dv) and what :func:`forward` returned; the same options."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    dout, lse = dout.contiguous(), lse.contiguous()
    batch, heads, _, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index, "lse": lse}
    flags = (look_back, look_ahead, wrap, is_causal, self_mode, correct_duplicates, dropout_p)
    flags += (q_bucket is not None, local_index_q is not None, n_used_blocks is not None)
    kernels, made = ("block_attention_backward_dq", "block_attention_backward_dkv"), 4
    if flags[4:] != _PLAIN:
        given = (key_mask, q_bucket, k_bucket, local_index_q, local_index_k, seed, n_used_blocks)
        made += _of_options(tensors, flags, *given)
        if self_mode in ("last_resort", "once"):
            kernels = ("block_attention_own_key_backward", *kernels)
    tensors["delta"] = torch.linalg.vecdot(dout.float(), out.float())  # [B, H, N]
    tensors["dq"] = q.new_empty(q.shape, dtype=torch.float32)
    tensors["dk"] = dk = k.new_empty((batch, heads, n_keys, head_dim), dtype=torch.float32)
    tensors["dv"] = dv = v.new_empty((batch, heads, n_keys, value_dim), dtype=torch.float32)
    _run(kernels, tensors, made, flags, scale, lookup, stamp)
    if kv_heads != heads:
        dk, dv = (x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for x in (dk, dv))
    return tensors["dq"].to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int, value_dim: int | None = None, c_q: int = 64, c_k: int = 64,
    device_type: str = "cuda", pattern: Pattern | None = None, config: Config | None = None, first: bool = False,
    local: bool = False, n_used_blocks: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see.

    first: of the first round. local: of the local round, which has the same block sizes here. n_used_blocks: whether
    it is given."""
    value_dim = value_dim or head_dim
    pattern = pattern or Pattern(once="own_key" in kernel)
    sizes = (c_q, c_k, head_dim, dtype.itemsize)
    config = config or heuristic(kernel, device_type, *sizes, pattern)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    x, y = empty(1, 1, c_q, head_dim, dtype=dtype), empty(1, 1, c_k, value_dim, dtype=dtype)
    q_index, k_index = (empty(1, 1, 2, 1, c, dtype=torch.int32) for c in (c_q, c_k))
    tensors = {"q": x, "k": x, "v": y, "q_index": q_index, "k_index": k_index}
    if n_used_blocks:
        tensors["n_used_blocks"] = empty(1, dtype=torch.int32)
    if local:
        tensors |= {"local_index_q": q_index[:, :, :1], "local_index_k": k_index[:, :, :1]}
    if pattern.correct_duplicates:
        tensors |= {"q_block": q_index[..., 0, :], "k_block": k_index[..., 0, :]}
    if pattern.buckets:
        tensors |= {"q_bucket": q_index[..., 0, :], "k_bucket": k_index[..., 0, :]}
    if pattern.dropout:
        tensors["seed"] = empty(dtype=torch.int64)
    if pattern.own_key:
        tensors["own_mask"] = empty(1, c_k, dtype=torch.bool)
    tensors["lse"] = empty(1, 1, c_q)
    if kernel.endswith("_forward"):
        tensors["out"] = empty(1, 1, c_q, value_dim)
    else:
        tensors |= {"dout": y, "delta": empty(1, 1, c_q), "dq": empty(1, 1, c_q, head_dim)}
        tensors |= {"dk": empty(1, 1, c_k, head_dim), "dv": empty(1, 1, c_k, value_dim)}
    dropout_p = 0.5 if pattern.dropout else 0.0
    launches = [*launches_of(kernel, tensors, pattern, 1.0, {kernel: config}, dropout_p)]
    return launches[-1] if local or "own_key" in kernel else launches[0 if first else 1]
