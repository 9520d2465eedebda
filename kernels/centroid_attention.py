"""Attention of a few queries, the means of clusters, to all keys, and the keys that each of them weighs most.

The keys are cut into parts, so that a few queries keep a whole device busy; a part leaves its own (out, lse), and the
parts are folded as the rounds of block attention are. On the way each group of GROUP neighbouring keys leaves its
largest logit, its peak: the K largest logits of a query are in the K groups of largest peaks, so that only K * GROUP
logits are looked at once more, and no (C, S) matrix exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .block_pairs import kept_pairs
from .config import SCORE_OPS, TIGHT, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .tiles import head_of, load_rows, store_rows

LOG2_E = math.log2(math.e)
GROUP = tl.constexpr(16)  # keys of a peak: with S = 16384, K = 32 a query has 1024 peaks and 512 logits to choose from
PART = 2048  # keys of a part


@triton.jit
def load_keys(key_mask_ptr, start, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """The rows from ``start`` on; -1 from ``end`` on and for keys that take no part."""
    rows = start + tl.arange(0, BLOCK)
    if HAS_MASK:
        return tl.where(tl.load(key_mask_ptr + rows, mask=rows < end, other=False), rows, -1)
    else:
        return tl.where(rows < end, rows, -1)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, lse_ptr, peaks_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_parts, part_size, n_groups, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_VALUES: tl.constexpr,
    HAS_PEAKS: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries and one part of the keys
    m_tiles = tl.cdiv(n_queries, BLOCK_M)
    row = (tl.program_id(0) // (m_tiles * n_parts)).to(tl.int64)
    part, m_tile = tl.program_id(0) // m_tiles % n_parts, tl.program_id(0) % m_tiles
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    key_mask_ptr += row // n_heads * n_keys
    peaks_ptr += row * n_queries * n_groups

    q_rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = tl.where(q_rows < n_queries, q_rows, -1)
    q = load_rows(q_ptr + row * n_queries * HEAD_DIM, q_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = tl.minimum(part * part_size + part_size, n_keys)
    for start in range(part * part_size, end, BLOCK_N):
        k_rows = load_keys(key_mask_ptr, start, end, HAS_MASK, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        s = tl.where((k_rows >= 0)[None, :], s, float("-inf"))
        if HAS_PEAKS:
            peaks = tl.max(tl.reshape(s, [BLOCK_M, BLOCK_N // GROUP, GROUP]), 2)  # [BLOCK_M, BLOCK_N / GROUP]
            groups = start // GROUP + tl.arange(0, BLOCK_N // GROUP)
            at = q_rows.to(tl.int64)[:, None] * n_groups + groups[None, :]
            tl.store(peaks_ptr + at, peaks, mask=(q_rows >= 0)[:, None] & (groups < n_groups)[None, :])
        if HAS_VALUES:
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without keys: exp2(-inf - 0) = 0, not NaN
            alpha = tl.exp2(m - m_safe)
            p = tl.exp2(s - m_safe[:, None])
            total = total * alpha + tl.sum(p, 1)
            if HAS_DROPOUT:
                p = tl.where(kept_pairs(seed_ptr, row, 0, q_rows[:, None], k_rows[None, :], drop_below), p, 0.0)
            v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            m = m_new

    if HAS_VALUES:
        met = total != 0.0  # also where it is NaN
        total = tl.where(met, total, 1.0)
        lse = tl.where(met, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        place = row * n_parts + part
        out_ptr += place * n_queries * VALUE_DIM
        store_rows(out_ptr, q_rows, VALUE_DIM, acc * (keep_scale / total)[:, None], VALUE_DIM, BLOCK_DV)
        tl.store(lse_ptr + place * n_queries + q_rows, lse, mask=q_rows >= 0)


@triton.jit
def candidates_kernel(
    q_ptr, k_ptr, key_mask_ptr, groups_ptr, logits_ptr,
    k_stride_b, k_stride_h, k_stride_n, n_heads, group_size, n_queries, n_keys, n_chosen, n_tiles, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    # one program = the logits of one query with BLOCK_N of the keys of its n_chosen groups
    query = (tl.program_id(0) // n_tiles).to(tl.int64)  # of all heads
    row = query // n_queries
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    places = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    is_place = places < n_chosen * GROUP
    groups = tl.load(groups_ptr + query * n_chosen + places // GROUP, mask=is_place, other=0)  # [BLOCK_N]
    k_rows = groups * GROUP + places % GROUP
    is_key = is_place & (k_rows < n_keys)
    if HAS_MASK:
        is_key = is_key & tl.load(key_mask_ptr + row // n_heads * n_keys + k_rows, mask=is_key, other=False)
    k = load_rows(k_ptr, tl.where(is_key, k_rows, -1), k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    columns = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + query * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)  # [BLOCK_D]
    s = tl.sum(k.to(tl.float32) * q.to(tl.float32)[None, :], 1) * scale_log2
    tl.store(logits_ptr + query * n_chosen * GROUP + places, tl.where(is_key, s, float("-inf")), mask=is_place)


@triton.jit
def backward_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, lse_ptr, delta_ptr, dq_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_parts, part_size, scale, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries and one part of the keys
    m_tiles = tl.cdiv(n_queries, BLOCK_M)
    row = (tl.program_id(0) // (m_tiles * n_parts)).to(tl.int64)
    part, m_tile = tl.program_id(0) // m_tiles % n_parts, tl.program_id(0) % m_tiles
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    key_mask_ptr += row // n_heads * n_keys

    q_rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = tl.where(q_rows < n_queries, q_rows, -1)
    q = load_rows(q_ptr + row * n_queries * HEAD_DIM, q_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr + row * n_queries * VALUE_DIM, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    lse = tl.load(lse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(part * part_size + part_size, n_keys)
    for start in range(part * part_size, end, BLOCK_N):
        k_rows = load_keys(key_mask_ptr, start, end, HAS_MASK, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        p = tl.where((k_rows >= 0)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION) * keep_scale  # [BLOCK_M, BLOCK_N]
        if HAS_DROPOUT:
            dp = tl.where(kept_pairs(seed_ptr, row, 0, q_rows[:, None], k_rows[None, :], drop_below), dp, 0.0)
        ds = p * (dp - delta[:, None]) * scale
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr + (row * n_parts + part) * n_queries * HEAD_DIM, q_rows, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, scale, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_N keys, for all queries of all query heads that share it
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    kv_row = (tl.program_id(0) // n_tiles).to(tl.int64)
    first_row = kv_row * group_size  # of the query heads
    k_ptr = head_of(k_ptr, first_row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, first_row, n_heads, group_size, v_stride_b, v_stride_h)
    start = tl.program_id(0) % n_tiles * BLOCK_N
    k_rows = load_keys(key_mask_ptr + first_row // n_heads * n_keys, start, n_keys, HAS_MASK, BLOCK_N)  # [BLOCK_N]
    k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    m_tiles = tl.cdiv(n_queries, BLOCK_M)
    for step in range(0, group_size * m_tiles):
        row = first_row + step // m_tiles
        q_rows = step % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        q_rows = tl.where(q_rows < n_queries, q_rows, -1)
        q = load_rows(q_ptr + row * n_queries * HEAD_DIM, q_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_rows(dout_ptr + row * n_queries * VALUE_DIM, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)
        lse = tl.load(lse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        # transposed, so that p and ds are left operands as they come
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [BLOCK_N, BLOCK_M]
        p = tl.where((k_rows >= 0)[:, None] & (q_rows >= 0)[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION) * keep_scale  # [BLOCK_N, BLOCK_M]
        kept_p = p
        if HAS_DROPOUT:
            stays = kept_pairs(seed_ptr, row, 0, q_rows[None, :], k_rows[:, None], drop_below)
            dp = tl.where(stays, dp, 0.0)
            kept_p = tl.where(stays, p * keep_scale, 0.0)
        dv = tl.dot(kept_p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (dp - delta[None, :]) * scale
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    rows = start + tl.arange(0, BLOCK_N)
    rows = tl.where(rows < n_keys, rows, -1)  # masked keys get 0
    store_rows(dk_ptr + kv_row * n_keys * HEAD_DIM, rows, HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + kv_row * n_keys * VALUE_DIM, rows, VALUE_DIM, dv, VALUE_DIM, BLOCK_DV)


_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
TUNING: dict[str, TuningSpace] = {
    "centroid_attention_forward": _SPACE,
    "centroid_attention_candidates": TuningSpace(blocks={"BLOCK_N": (64, 128, 256)}, num_warps=(1, 4)),
    "centroid_attention_backward_dq": _SPACE,
    "centroid_attention_backward_dkv": _SPACE,
}
KERNELS = {
    "centroid_attention_forward": forward_kernel,
    "centroid_attention_candidates": candidates_kernel,
    "centroid_attention_backward_dq": backward_dq_kernel,
    "centroid_attention_backward_dkv": backward_dkv_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, n_queries: int, n_keys: int, top_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one call of ``kernel`` (a key of :data:`TUNING`)."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows, blocks = batch * heads, dict(config.blocks) if config else {}
    if kernel == "centroid_attention_candidates":
        chosen = min(top_k, cdiv(n_keys, GROUP.value)) * GROUP.value
        own = rows * n_queries * chosen * (head_dim * element_size + 4)
        work = Cost(2 * rows * n_queries * chosen * head_dim, own, 0, rate="float32")
        if not blocks:
            return work
        steps = rows * n_queries * cdiv(chosen, blocks["BLOCK_N"])
        size = blocks["BLOCK_N"] * padded(head_dim)
        return replace(
            work, tile_flops=2 * steps * size, pointwise=steps * size, steps=steps, held=4 * size, loaded=own
        )  # fmt: skip
    pairs, dims = rows * n_queries * n_keys, head_dim + value_dim
    is_dkv, n_parts = kernel.endswith("dkv"), 1 if kernel.endswith("dkv") else cdiv(n_keys, PART)
    # bytes of a query in each part, and of a key
    of_q, of_k = head_dim * element_size, dims * element_size
    if kernel == "centroid_attention_forward":
        of_q += 4 * value_dim + 4 + cdiv(n_keys, GROUP.value) * 4 / n_parts
        flops = 2 * pairs * dims
    elif not is_dkv:
        of_q += value_dim * element_size + 8 + 4 * head_dim
        flops = 2 * pairs * (2 * head_dim + value_dim)
    else:
        of_q += value_dim * element_size + 8
        of_k *= 2
        flops = 4 * pairs * dims
    work = Cost(flops, rows * (n_queries * n_parts * of_q + n_keys * of_k), pairs)
    if not blocks:
        return work
    m, n = blocks["BLOCK_M"], blocks["BLOCK_N"]
    d, dv = padded(head_dim), padded(value_dim)
    part = n_keys if is_dkv else PART
    m_tiles, n_tiles = cdiv(n_queries, m), n_keys // part * cdiv(part, n) + cdiv(n_keys % part, n)
    steps = rows * m_tiles * n_tiles
    score, weights = (m, n, d), (m, n, dv)
    if kernel == "centroid_attention_forward":
        shapes, pointwise = (score, (m, dv, n)), (SCORE_OPS + 1) * m * n + m * dv
    elif not is_dkv:
        shapes, pointwise = (score, weights, (m, d, n)), SCORE_OPS * m * n
    else:
        shapes, pointwise = (score, weights, (n, d, m), (n, dv, m)), SCORE_OPS * m * n
    again_q, again_k = (n_tiles, 1) if is_dkv else (n_parts, m_tiles)
    return replace(
        work, **products(steps, *shapes), tile_exps=steps * m * n, pointwise=steps * pointwise, steps=steps,
        held=4 * m * n * (1 if kernel.endswith("forward") else 2),  # the scores, and their gradients
        loaded=rows * (n_queries * of_q * again_q + n_keys * of_k * again_k),
    )  # fmt: skip


def heuristic(kernel: str, device_type: str, n_queries: int, head_dim: int, element_size: int = 4) -> Config:
    """The configuration where nothing was tuned: the largest tiles that registers (or the cache) hold.

    device_type: as in block attention's. On a GPU these are the largest tiles whose binaries spill nothing, on sm_80 to
    sm_120 and gfx942; fp32 with head dims above 128 spills on NVIDIA whatever the tiles are.
    """
    if kernel == "centroid_attention_candidates":
        return Config({"BLOCK_N": 64}, num_warps=4, num_stages=1)
    is_dkv = kernel.endswith("dkv")
    warps, stages = 4, 2
    if device_type == "cpu":
        most = (128, 128) if head_dim <= 64 else (64, 64)
        if is_dkv:
            most = 16, most[1]  # 128 queries at a time took 1.15 times as long
    elif device_type.startswith("hip"):
        most, stages = ((64, 64) if element_size * head_dim <= 256 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((16, 32) if is_dkv else (32, 16)) if head_dim <= 64 else (16, 16)
        warps, stages = (8, 1) if head_dim > 64 and "backward" in kernel else (4, 2)
    elif head_dim <= 128:
        is_large = head_dim > 64 or (kernel.endswith("dq") and device_type in TIGHT)
        most, warps = (32 if is_dkv else 64, 64), 8 if is_large else 4
    else:
        most, warps, stages = (32, 32), 8 if is_dkv else 4, 1
    return Config(
        {"BLOCK_M": min(most[0], max(16, next_power_of_2(n_queries))), "BLOCK_N": most[1]},
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def launch_of(
    kernel: str, tensors: Mapping[str, torch.Tensor], flags: Mapping[str, bool], scale: float, dropout_p: float,
    config: Config | None,
) -> Launch:  # fmt: skip
    """The launch of ``kernel`` on ``tensors``, named as the kernel's pointer arguments without ``_ptr``; there may be
    more than it takes. flags: ``HAS_MASK`` and, for the forward, ``HAS_VALUES`` and ``HAS_PEAKS``."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    chosen = config or heuristic(kernel, device_kind(q.device), n_queries, head_dim, q.element_size())
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, tensor in (("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries, "n_keys": n_keys}
    args |= {"n_parts": cdiv(n_keys, PART), "part_size": PART, "n_groups": cdiv(n_keys, GROUP.value)}
    args |= {"scale": scale, "scale_log2": scale * LOG2_E}
    args |= {"drop_below": round(dropout_p * 2**24), "keep_scale": 1 / (1 - dropout_p), "HAS_DROPOUT": dropout_p > 0}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim)), "PRECISION": dot_precision(q.dtype), **flags}
    if kernel == "centroid_attention_candidates":
        args["n_chosen"] = tensors["groups"].shape[3]
        args["n_tiles"] = cdiv(args["n_chosen"] * GROUP.value, chosen.blocks["BLOCK_N"])
        programs = batch * heads * n_queries * args["n_tiles"]
    elif kernel == "centroid_attention_backward_dkv":
        programs = batch * k.shape[1] * cdiv(n_keys, chosen.blocks["BLOCK_N"])
    else:
        programs = batch * heads * args["n_parts"] * cdiv(n_queries, chosen.blocks["BLOCK_M"])
    args = {name: args[name] for name in KERNELS[kernel].arg_names if name in args}
    return Launch(KERNELS[kernel], (programs,), args, chosen)


def _runner(
    inputs: Mapping[str, torch.Tensor], scale: float, dropout_p: float, lookup: Lookup | None, stamp: Hashable
) -> Callable[..., None]:
    """run(kernels, tensors): one launch of each of ``kernels`` on ``inputs`` and ``tensors``; see ``run_planned`` for
    ``made``."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    shape = dict(zip(("batch", "heads", "n_queries", "head_dim"), q.shape, strict=True))
    shape |= {"n_keys": k.shape[2], "value_dim": v.shape[3]}

    def run(kernels: tuple[str, ...], more: dict[str, torch.Tensor], made: int, **flags: bool) -> None:
        tensors = {**inputs, **more}

        def launches() -> Iterator[Launch]:
            for kernel in kernels:
                # the logits that are looked at once more know no dropout
                options = {**flags, "HAS_DROPOUT": dropout_p > 0 and kernel != "centroid_attention_candidates"}
                config = lookup(kernel, q.device, q.dtype, shape, options) if lookup else None
                yield launch_of(kernel, tensors, flags, scale, dropout_p, config)

        key = (kernels, scale, dropout_p, *flags.items(), torch.get_float32_matmul_precision(), stamp)
        run_planned(key, tensors, launches, made=made)

    return run


def _inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, seed: torch.Tensor
) -> dict[str, torch.Tensor]:
    mask = torch.empty(1, dtype=torch.bool, device=q.device) if key_mask is None else key_mask.contiguous()
    return {"q": q.contiguous(), "k": unit_stride(k), "v": unit_stride(v), "key_mask": mask, "seed": seed}


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, key_mask: torch.Tensor | None, seed: torch.Tensor,
    top_k: int, scale: float, dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse, topk_index) of q (B, H, C, D) among k (B, Hkv, S, D) and v (B, Hkv, S, Dv); the arguments are checked
    by ``fastattn.ops.centroid_attention``.

    key_mask: (B, S), bool. seed: int64, without dimensions, of dropout. out (B, H, C, Dv) and lse (B, H, C), fp32: both
    are empty where v is None. topk_index (B, H, C, min(top_k, S)), int32: the keys of the largest logits, in no order,
    -1 where fewer take part. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    batch, heads, n_queries, _ = q.shape
    n_keys, n_parts = k.shape[2], cdiv(k.shape[2], PART)
    has_mask = key_mask is not None
    inputs = _inputs(q, k, k if v is None else v, key_mask, seed)
    run = _runner(inputs, scale, dropout_p, lookup, stamp)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return q.new_empty((batch, heads, *shape), dtype=dtype)

    value_dim = 0 if v is None else v.shape[3]
    outs, lses = empty(n_parts, n_queries, value_dim), empty(n_parts, n_queries if value_dim else 0)
    peaks = empty(n_queries, cdiv(n_keys, GROUP.value) if top_k else 0)
    run(
        ("centroid_attention_forward",), {"out": outs, "lse": lses, "peaks": peaks}, 3,
        HAS_MASK=has_mask, HAS_VALUES=v is not None, HAS_PEAKS=top_k > 0,
    )  # fmt: skip
    out, lse = _fold(outs, lses) if v is not None else (outs[:, :, 0], lses[:, :, 0])
    if not top_k:
        return out, lse, empty(n_queries, 0, dtype=torch.int32)
    groups = peaks.topk(min(top_k, peaks.shape[-1]), sorted=False).indices.int()
    logits = empty(n_queries, groups.shape[-1] * GROUP.value)
    run(("centroid_attention_candidates",), {"groups": groups, "logits": logits}, 1, HAS_MASK=has_mask)
    best, places = logits.topk(min(top_k, n_keys), sorted=False)
    index = groups.gather(-1, places // GROUP.value) * GROUP.value + places.int() % GROUP.value
    return out, lse, index.masked_fill_(best == -math.inf, -1)


def _fold(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of all the keys from those of their parts, (B, H, parts, C, Dv) and (B, H, parts, C)."""
    if lses.shape[2] == 1:
        return outs.squeeze(2), lses.squeeze(2)
    lse = torch.logsumexp(lses, 2)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(2))
    return (outs * weights.unsqueeze(-1)).sum(2), lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    key_mask: torch.Tensor | None, seed: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    scale: float, dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) from the gradients of out and lse and what :func:`forward` returned; the same options."""
    inputs = _inputs(q, k, v, key_mask, seed)
    batch, heads, n_queries, head_dim = q.shape
    # a logit's share in lse is its probability, as it is in delta
    delta = torch.linalg.vecdot(dout.float(), out) - dlse
    parts = q.new_empty((batch, heads, cdiv(k.shape[2], PART), n_queries, head_dim), dtype=torch.float32)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    more = {"dout": dout.to(v.dtype).contiguous(), "lse": lse.contiguous(), "delta": delta}
    kernels = ("centroid_attention_backward_dq", "centroid_attention_backward_dkv")
    run = _runner(inputs, scale, dropout_p, lookup, stamp)
    run(kernels, more | {"dq": parts, "dk": dk, "dv": dv}, 4, HAS_MASK=key_mask is not None)
    return parts.sum(2).to(q.dtype), dk, dv


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, device_type: str = "cuda", config: Config | None = None,
    n_queries: int = 100, has_mask: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    config = config or heuristic(kernel, device_type, n_queries, head_dim, dtype.itemsize)
    q, k, row = meta(1, 1, n_queries, head_dim, dtype=dtype), meta(1, 1, 4096, head_dim, dtype=dtype), meta(1, 1, 64)
    tensors = {"dout": q, "q": q, "k": k, "v": k, "key_mask": meta(1, 4096, dtype=torch.bool), "dk": k, "dv": k}
    tensors |= {"seed": meta(1, dtype=torch.int64), "groups": meta(1, 1, n_queries, 32, dtype=torch.int32)}
    tensors |= {name: row for name in ("out", "lse", "peaks", "logits", "delta", "dq")}
    flags = {"HAS_MASK": has_mask, "HAS_VALUES": True, "HAS_PEAKS": True}
    return launch_of(kernel, tensors, flags, 1.0, 0.0, config)
