"""Attention to the key list of a query's cluster, and its gradient: the fine part of improved clustered attention.

Queries are sorted by cluster, so that a program has a tile of queries of one cluster, and loads the cluster's keys once
for all of them. Which cluster that is, it finds in the clusters' offsets: the host knows no cluster's size, and starts
as many programs as any sizes can need. A key may stand in many lists, so the gradients of keys are summed in two steps:
one sum for each part of a cluster and place in its list, then one over all of those that hold the same key, sorted. So
each row has one writer: no atomics, and the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .block_pairs import kept_pairs
from .config import READS_SHARED, SCORE_OPS, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .tiles import head_of, load_rows, store_rows

LOG2_E = math.log2(math.e)


@triton.jit
def find_tile(offsets_ptr, tile, size, n_groups, n_rows, BLOCK_C: tl.constexpr):
    """(group, start, end): the places start .. end - 1 that tile number ``tile`` has among rows sorted by group, where
    each group is cut into tiles of ``size``. Group g has the places offsets[g] .. offsets[g + 1] - 1, group n_groups
    those from offsets[n_groups] to n_rows. Beyond the last tile start is end."""
    groups = tl.arange(0, BLOCK_C)
    starts = tl.load(offsets_ptr + groups, mask=groups <= n_groups, other=n_rows)  # [BLOCK_C]
    ends = tl.load(offsets_ptr + groups + 1, mask=groups < n_groups, other=n_rows)  # [BLOCK_C]
    tiles = tl.cumsum((ends - starts + size - 1) // size, 0)  # of the groups up to and with this one
    is_before = tiles <= tile
    group = tl.sum(is_before.to(tl.int32))
    start = tl.load(offsets_ptr + group, mask=group <= n_groups, other=n_rows)
    start += (tile - tl.max(tl.where(is_before, tiles, 0))) * size
    end = tl.load(offsets_ptr + group + 1, mask=group < n_groups, other=n_rows)
    return group, tl.minimum(start, end), tl.minimum(start + size, end)


@triton.jit
def load_places(order_ptr, start, end, BLOCK: tl.constexpr):
    """The rows at the places from ``start`` on; -1 from ``end`` on."""
    places = start + tl.arange(0, BLOCK)
    return tl.load(order_ptr + places, mask=places < end, other=-1)


@triton.jit
def load_list(list_ptr, cluster, n_listed, top_k, start, BLOCK: tl.constexpr):
    """The places start .. start + BLOCK - 1 of a cluster's list; -1 from ``n_listed`` on, which is 0 or ``top_k``."""
    places = start + tl.arange(0, BLOCK)
    return tl.load(list_ptr + cluster.to(tl.int64) * top_k + places, mask=places < n_listed, other=-1)


@triton.jit
def list_mask(q_rows, k_rows, IS_CAUSAL: tl.constexpr):
    """Which pairs take part; q_rows and k_rows broadcast against each other."""
    keep = (k_rows >= 0) & (q_rows >= 0)
    if IS_CAUSAL:
        keep = keep & (k_rows <= q_rows)
    return keep


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, offsets_ptr, topk_index_ptr, mass_ptr, rest_ptr, seed_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_clusters, top_k, n_tiles, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one cluster; queries of no cluster stand last, as one without keys
    row, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    out_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    topk_index_ptr += row * n_clusters * top_k

    cluster, start, end = find_tile(
        offsets_ptr + row * (n_clusters + 1), tile, BLOCK_M, n_clusters, n_queries, BLOCK_C
    )  # fmt: skip
    is_cluster = (cluster < n_clusters) & (start < end)
    n_listed = tl.where(is_cluster, top_k, 0)
    q_rows = load_places(order_ptr + row * n_queries, start, end, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for step in range(0, tl.cdiv(n_listed, BLOCK_N)):
        k_rows = load_list(topk_index_ptr, cluster, n_listed, top_k, step * BLOCK_N, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        s = tl.where(list_mask(q_rows[:, None], k_rows[None, :], IS_CAUSAL), s, float("-inf"))
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

    met = total != 0.0  # also where it is NaN
    total = tl.where(met, total, 1.0)
    mass = tl.load(mass_ptr + row * n_clusters + cluster, mask=is_cluster, other=0.0)
    columns = tl.arange(0, BLOCK_DV)
    rest_ptr += (row * n_clusters + cluster) * VALUE_DIM
    rest = tl.load(rest_ptr + columns, mask=columns < tl.where(is_cluster, VALUE_DIM, 0), other=0.0)  # [BLOCK_DV]
    out = acc * (mass * keep_scale / total)[:, None] + rest[None, :]
    lse = tl.where(met, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    store_rows(out_ptr, q_rows, VALUE_DIM, out, VALUE_DIM, BLOCK_DV)
    tl.store(lse_ptr + q_rows, lse, mask=q_rows >= 0)


@triton.jit
def pair_gradients(
    q, k, v, dout, q_rows, k_rows, lse, scale_log2, seed_ptr, row, drop_below, keep_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(p, dp): the probabilities, and how the sum of out * dout depends on each of them, where mass is 1."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    keep = list_mask(q_rows[:, None], k_rows[None, :], IS_CAUSAL)
    p = tl.where(keep, tl.exp2(s - lse[:, None] * 1.4426950408889634), 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION) * keep_scale
    if HAS_DROPOUT:
        dp = tl.where(kept_pairs(seed_ptr, row, 0, q_rows[:, None], k_rows[None, :], drop_below), dp, 0.0)
    return p, dp


@triton.jit
def backward_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, order_ptr, offsets_ptr, topk_index_ptr, mass_ptr, lse_ptr, dlse_ptr, seed_ptr,
    dq_ptr, delta_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_clusters, top_k, n_tiles, scale, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    IS_ONE_TILE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one cluster, as in the forward. Writes delta, the sum of dout * out
    # where mass is 1, as well: neither mass 0 nor the rest can be taken off an output, so it is worked out anew
    row, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    dq_ptr += row * n_queries * HEAD_DIM
    topk_index_ptr += row * n_clusters * top_k

    cluster, start, end = find_tile(
        offsets_ptr + row * (n_clusters + 1), tile, BLOCK_M, n_clusters, n_queries, BLOCK_C
    )  # fmt: skip
    is_cluster = (cluster < n_clusters) & (start < end)
    n_listed = tl.where(is_cluster, top_k, 0)
    q_rows = load_places(order_ptr + row * n_queries, start, end, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr + row * n_queries * VALUE_DIM, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)
    lse = tl.load(lse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
    dlse = tl.load(dlse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
    mass = tl.load(mass_ptr + row * n_clusters + cluster, mask=is_cluster, other=0.0)

    n_steps = tl.cdiv(n_listed, BLOCK_N)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if not IS_ONE_TILE:
        for step in range(0, n_steps):
            k_rows = load_list(topk_index_ptr, cluster, n_listed, top_k, step * BLOCK_N, BLOCK_N)  # [BLOCK_N]
            k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
            p, dp = pair_gradients(
                q, k, v, dout, q_rows, k_rows, lse, scale_log2, seed_ptr, row, drop_below, keep_scale,
                IS_CAUSAL, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
            delta += tl.sum(p * dp, 1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, n_steps):
        k_rows = load_list(topk_index_ptr, cluster, n_listed, top_k, step * BLOCK_N, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        p, dp = pair_gradients(
            q, k, v, dout, q_rows, k_rows, lse, scale_log2, seed_ptr, row, drop_below, keep_scale,
            IS_CAUSAL, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        if IS_ONE_TILE:
            delta = tl.sum(p * dp, 1)
        ds = p * (mass * (dp - tl.expand_dims(delta, 1)) + dlse[:, None]) * scale
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_rows(dq_ptr, q_rows, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)
    tl.store(delta_ptr + row * n_queries + q_rows, delta, mask=q_rows >= 0)


@triton.jit
def backward_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, order_ptr, offsets_ptr, topk_index_ptr, mass_ptr, lse_ptr, delta_ptr, dlse_ptr,
    seed_ptr, dk_ptr, dv_ptr, rows_ptr, drest_ptr, dmass_ptr, clusters_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_clusters, top_k, n_parts, part_size, scale, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = part_size queries of one cluster and one tile of BLOCK_N keys of its list. Parts bound the work of a
    # program where one cluster has most queries; a part that there is not leaves rows and a cluster of -1
    n_lists = tl.cdiv(top_k, BLOCK_N)
    row = (tl.program_id(0) // (n_parts * n_lists)).to(tl.int64)
    part, tile = tl.program_id(0) // n_lists % n_parts, tl.program_id(0) % n_lists
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)

    cluster, start, end = find_tile(
        offsets_ptr + row * (n_clusters + 1), part, part_size, n_clusters, n_queries, BLOCK_C
    )  # fmt: skip
    is_cluster = (cluster < n_clusters) & (start < end)
    end = tl.where(is_cluster, end, start)
    n_listed = tl.where(is_cluster, top_k, 0)
    topk_index_ptr += row * n_clusters * top_k
    k_rows = load_list(topk_index_ptr, cluster, n_listed, top_k, tile * BLOCK_N, BLOCK_N)  # [BLOCK_N]
    k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    mass = tl.load(mass_ptr + row * n_clusters + cluster, mask=is_cluster, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    drest = tl.zeros([BLOCK_DV], tl.float32)
    dmass = tl.zeros([BLOCK_M], tl.float32)
    for first in range(start, end, BLOCK_M):
        q_rows = load_places(order_ptr + row * n_queries, first, end, BLOCK_M)  # [BLOCK_M]
        q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_rows(dout_ptr + row * n_queries * VALUE_DIM, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)
        lse = tl.load(lse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        delta = tl.load(delta_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        dlse = tl.load(dlse_ptr + row * n_queries + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        # transposed, so that p and ds are left operands as they come
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [BLOCK_N, BLOCK_M]
        keep = list_mask(q_rows[None, :], k_rows[:, None], IS_CAUSAL)
        p = tl.where(keep, tl.exp2(s - lse[None, :] * 1.4426950408889634), 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION) * keep_scale  # [BLOCK_N, BLOCK_M]
        kept_p = p * mass
        if HAS_DROPOUT:
            stays = kept_pairs(seed_ptr, row, 0, q_rows[None, :], k_rows[:, None], drop_below)
            dp = tl.where(stays, dp, 0.0)
            kept_p = tl.where(stays, kept_p * keep_scale, 0.0)
        dv = tl.dot(kept_p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        ds = p * (mass * (dp - delta[None, :]) + dlse[None, :]) * scale
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        drest += tl.sum(dout.to(tl.float32), 0)
        dmass += delta

    places = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    part += row * n_parts  # of all heads, in 64 bits
    slots = tl.where(places < top_k, places, -1)  # the list's places, as rows of the part
    store_rows(dk_ptr + part * top_k * HEAD_DIM, slots, HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + part * top_k * VALUE_DIM, slots, VALUE_DIM, dv, VALUE_DIM, BLOCK_DV)
    tl.store(rows_ptr + part * top_k + places, k_rows, mask=places < top_k)
    if tile == 0:
        columns = tl.arange(0, BLOCK_DV)
        tl.store(drest_ptr + part * VALUE_DIM + columns, drest, mask=columns < VALUE_DIM)
        tl.store(dmass_ptr + part, tl.sum(dmass))
        tl.store(clusters_ptr + part, tl.where(is_cluster, cluster, -1))


@triton.jit
def sum_kernel(
    parts_ptr, entries_ptr, first_ptr, sum_ptr, n_entries, n_rows, n_tiles,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M rows of a sum; row i is that of the parts entries[first[i]] .. entries[first[i + 1] - 1]
    head, tile = (tl.program_id(0) // n_tiles).to(tl.int64), tl.program_id(0) % n_tiles
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.where(rows < n_rows, rows, -1)
    first_ptr += head * (n_rows + 1)
    first = tl.load(first_ptr + rows, mask=rows >= 0, other=0)  # [BLOCK_M]
    last = tl.load(first_ptr + rows + 1, mask=rows >= 0, other=0)  # [BLOCK_M]
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for step in range(0, tl.max(last - first)):  # pyright: ignore[reportArgumentType]
        entries = tl.load(entries_ptr + head * n_entries + first + step, mask=first + step < last, other=-1)
        acc += load_rows(parts_ptr + head * n_entries * DIM, entries, DIM, DIM, BLOCK_DIM)  # [BLOCK_M, BLOCK_DIM]
    store_rows(sum_ptr + head * n_rows * DIM, rows, DIM, acc, DIM, BLOCK_DIM)


_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
TUNING: dict[str, TuningSpace] = {
    "topk_attention_forward": _SPACE,
    "topk_attention_backward_dq": _SPACE,
    "topk_attention_backward_dkv": _SPACE,
    "topk_attention_sum": TuningSpace(blocks={"BLOCK_M": (8, 16, 32, 64)}, num_warps=(1, 4)),
}
KERNELS = {
    "topk_attention_forward": forward_kernel,
    "topk_attention_backward_dq": backward_dq_kernel,
    "topk_attention_backward_dkv": backward_dkv_kernel,
    "topk_attention_sum": sum_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, n_queries: int, n_clusters: int, top_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one call of ``kernel`` (a key of :data:`TUNING`). Clusters have any size: the last tile of one is half
    full in the mean."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows, dims = batch * heads, head_dim + value_dim
    if kernel == "topk_attention_sum":
        return _sum_cost(rows, n_queries, n_clusters, top_k, head_dim, element_size, config)
    pairs, members = rows * n_queries * top_k, n_queries / n_clusters
    # bytes of a query and of a list with its keys
    of_q, of_list = head_dim * element_size + 8, top_k * (dims * element_size + 4) + 4 * value_dim + 4
    part_size, parts = parts_of(n_queries, n_clusters, top_k)[1], 0
    if kernel == "topk_attention_forward":
        of_q += value_dim * element_size
        flops = 2 * pairs * dims
    elif kernel == "topk_attention_backward_dq":
        of_q += dims * element_size + 8
        flops = 2 * pairs * (2 * head_dim + value_dim)
    else:
        of_q += value_dim * element_size + 8
        flops = 4 * pairs * dims
        parts = rows * n_clusters * _tiles(members, part_size)
    written = parts * (top_k * (dims * 4 + 4) + 4 * value_dim + 8)
    lists = rows * n_clusters * of_list
    work = Cost(flops, rows * n_queries * of_q + lists + written, pairs)
    if config is None:
        return work
    m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    d, dv = padded(head_dim), padded(value_dim)
    m_tiles, n_tiles = _tiles(members, m), cdiv(top_k, n)
    again_q, again_k = 1, m_tiles
    score, weights = (m, n, d), (m, n, dv)
    if kernel == "topk_attention_forward":
        shapes, pointwise, passes = (score, (m, dv, n)), SCORE_OPS * m * n + m * dv, 1
    elif kernel == "topk_attention_backward_dq":
        # where a list is several tiles, these pass twice: a query's delta has to be known before
        passes = 1 if n_tiles == 1 else 2
        shapes, pointwise = (*(score, weights) * passes, (m, d, n)), SCORE_OPS * m * n * passes
        again_k *= passes
    else:
        shapes, pointwise, passes = (score, weights, (n, d, m), (n, dv, m)), SCORE_OPS * m * n, 1
        again_q, again_k = n_tiles, _tiles(members, part_size)
    steps = rows * n_clusters * m_tiles * n_tiles
    return replace(
        work, **products(steps, *shapes), tile_exps=steps * m * n * passes, pointwise=steps * pointwise,
        held=4 * m * n * (1 if kernel.endswith("forward") else 2),  # the scores, and their gradients
        steps=steps * passes, loaded=rows * n_queries * of_q * again_q + lists * again_k + written,
    )  # fmt: skip


def _tiles(members: float, size: int) -> float:
    """Tiles of a cluster, in the mean of clusters of all sizes."""
    return max(1.0, members / size + 0.5)


def _sum_cost(
    rows: int, n_rows: int, n_clusters: int, top_k: int, dim: int, element_size: int, config: Config | None
) -> Cost:
    """Of the sum that makes dk or dv of ``n_rows`` keys, where lists name any keys."""
    part_size = parts_of(n_rows, n_clusters, top_k)[1]
    entries = n_clusters * _tiles(n_rows / n_clusters, part_size) * top_k
    moved = rows * (entries * (4 * dim + 4) + n_rows * (dim * element_size + 4))
    work = Cost(rows * entries * dim, moved, 0, rate="float32")
    if config is None:
        return work
    m = config.blocks["BLOCK_M"]
    steps = rows * cdiv(n_rows, m) * _most_of(m, entries / n_rows)
    size = m * padded(dim)
    return replace(work, tile_flops=steps * size, pointwise=steps * size, steps=steps, held=4 * size, loaded=moved)


def _most_of(rows: int, mean: float) -> float:
    """The entries of that one of ``rows`` rows that has most, in the mean, where each has ``mean`` by chance."""
    if mean > 100:  # nearly normal
        return mean + math.sqrt(2 * mean * math.log(rows))
    most, entries, probability, at_most = 0.0, 0, math.exp(-mean), math.exp(-mean)
    while at_most < 1 - 1e-9 and entries < mean + 100:
        most += 1 - at_most**rows
        entries += 1
        probability *= mean / entries
        at_most += probability
    return max(most, mean)


def heuristic(
    kernel: str, device_type: str, top_k: int, head_dim: int, element_size: int = 4, members: int = 64
) -> Config:
    """The configuration where nothing was tuned: the whole list as one tile, up to what registers (or the cache) hold.

    device_type: as in block attention's. members: queries of a cluster, in the mean. On a GPU these are the largest
    tiles whose binaries spill nothing, on sm_80 to sm_120 and gfx942; fp32 with head dims above 128 spills on NVIDIA
    whatever the tiles are.
    """
    if kernel == "topk_attention_sum":
        return Config({"BLOCK_M": 16}, num_warps=4, num_stages=1)
    warps, stages = 4, 2
    if device_type == "cpu":
        # in what keys' gradients take of queries, 64 at a time took 1.2 times as long as 16
        most = (16 if kernel.endswith("dkv") else 64, 128 if head_dim <= 64 else 64)
    elif device_type.startswith("hip"):
        most, stages = ((64, 64) if element_size * head_dim <= 128 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((16, 32) if kernel.endswith("dkv") else (32, 32)) if head_dim <= 64 else (16, 16)
        stages = 2 if head_dim <= 64 else 1
    elif kernel.endswith("dkv") and head_dim <= 64:
        most, warps = ((64, 64), 8) if device_type in READS_SHARED else ((32, 32), 4)
    elif head_dim <= 128:
        most = (64, 32 if kernel.endswith("dkv") else 64)
        warps = 8 if head_dim > 64 or (top_k > 32 and device_type not in READS_SHARED) else 4
    else:
        most, warps, stages = (32, 32), 8 if kernel.endswith("dkv") else 4, 1
    m, n = (min(limit, max(16, next_power_of_2(size))) for limit, size in zip(most, (members, top_k), strict=True))
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def parts_of(n_queries: int, n_clusters: int, top_k: int) -> tuple[int, int]:
    """(the most parts that clusters can have, queries of a part): what one program of the gradient of keys sums over.

    So long that all parts' gradients of their lists take no more than the queries themselves.
    """
    size = max(256, next_power_of_2(4 * top_k))
    return min(n_queries, n_queries // size + n_clusters), size


def launch_of(
    kernel: str,
    tensors: Mapping[str, torch.Tensor],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    config: Config | None,
) -> Launch:
    """The launch of ``kernel``, other than that of the sum, on ``tensors``, named as the kernel's pointer arguments
    without ``_ptr``; there may be more than it takes."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    n_clusters, top_k = tensors["topk_index"].shape[2:]
    members = cdiv(n_queries, n_clusters)
    chosen = config or heuristic(kernel, device_kind(q.device), top_k, head_dim, q.element_size(), members)
    block_m, block_n = chosen.blocks["BLOCK_M"], chosen.blocks["BLOCK_N"]
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries}
    args |= {"n_clusters": n_clusters, "top_k": top_k, "scale": scale, "scale_log2": scale * LOG2_E}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim)), "BLOCK_C": next_power_of_2(n_clusters + 1)}
    args |= {"drop_below": round(dropout_p * 2**24), "keep_scale": 1 / (1 - dropout_p), "HAS_DROPOUT": dropout_p > 0}
    args |= {"IS_CAUSAL": is_causal, "IS_ONE_TILE": top_k <= block_n, "PRECISION": dot_precision(q.dtype)}
    # full tiles, and one that is not for each cluster and for the queries of none
    args["n_tiles"] = min(n_queries, n_queries // block_m + n_clusters + 1)
    args["n_parts"], args["part_size"] = parts_of(n_queries, n_clusters, top_k)
    programs = args["n_tiles"]
    if kernel == "topk_attention_backward_dkv":
        programs = args["n_parts"] * cdiv(top_k, block_n)
    args = {name: args[name] for name in KERNELS[kernel].arg_names if name in args}
    rows = {"order_ptr": n_queries, "offsets_ptr": n_queries + 1, "topk_index_ptr": n_keys}
    return Launch(KERNELS[kernel], (batch * heads * programs,), args, chosen, rows)


def sum_launch(tensors: Mapping[str, torch.Tensor], config: Config | None) -> Launch:
    """The launch of the sum on tensors parts (heads, entries, F), entries (heads, entries), first (heads, rows + 1) and
    sum (heads, rows, F)."""
    heads, n_rows, dim = tensors["sum"].shape
    n_entries = tensors["entries"].shape[1]
    chosen = config or heuristic("topk_attention_sum", device_kind(tensors["sum"].device), 1, dim)
    n_tiles = cdiv(n_rows, chosen.blocks["BLOCK_M"])
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    args |= {"n_entries": n_entries, "n_rows": n_rows, "n_tiles": n_tiles}
    args |= {"DIM": dim, "BLOCK_DIM": max(16, next_power_of_2(dim))}
    return Launch(sum_kernel, (heads * n_tiles,), args, chosen, {"entries_ptr": n_entries, "first_ptr": n_entries + 1})


def _run(
    kernels: tuple[str, ...], tensors: dict[str, torch.Tensor], made: int, is_causal: bool, scale: float,
    dropout_p: float, lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """One launch of each of ``kernels``; see ``run_planned`` for ``made``."""

    def launches() -> Iterator[Launch]:
        q, (batch, heads, n_clusters, top_k) = tensors["q"], tensors["topk_index"].shape
        shape = {"batch": batch, "heads": heads, "n_queries": q.shape[2], "n_clusters": n_clusters, "top_k": top_k}
        shape |= {"head_dim": q.shape[3], "value_dim": tensors["v"].shape[3]}
        options = {"is_causal": is_causal, "dropout": dropout_p > 0}
        for kernel in kernels:
            config = lookup(kernel, q.device, q.dtype, shape, options) if lookup else None
            yield launch_of(kernel, tensors, is_causal, scale, dropout_p, config)

    run_planned(
        (kernels, is_causal, scale, dropout_p, torch.get_float32_matmul_precision(), stamp),
        tensors,
        launches,
        made=made,
    )


def _sum_by_row(
    parts: torch.Tensor, entries: torch.Tensor, first: torch.Tensor, out: torch.Tensor,
    lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """Writes into ``out`` (heads, rows, F), row by row, the sum of the parts (heads, entries, F) of that row."""
    tensors = {"parts": parts, "entries": entries, "first": first, "sum": out}

    def launches() -> Iterator[Launch]:
        heads, n_rows, dim = out.shape
        shape = {"heads": heads, "n_rows": n_rows, "value_dim": dim}
        yield sum_launch(tensors, lookup("topk_attention_sum", out.device, out.dtype, shape, {}) if lookup else None)

    run_planned(("topk_attention_sum", stamp), tensors, launches)


def _sorted(rows: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(entries, first), int32: the places of rows (heads, entries) sorted by row, and for each of ``n_rows`` rows where
    its places begin and those of the last one end; places of row -1 stand before all."""
    rows, entries = torch.sort(rows, dim=-1, stable=True)
    wanted = torch.arange(n_rows + 1, device=rows.device, dtype=torch.int32).expand(len(rows), -1).contiguous()
    return entries.int(), torch.searchsorted(rows, wanted, out_int32=True)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    topk_index: torch.Tensor, mass: torch.Tensor, rest: torch.Tensor, seed: torch.Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of top-k attention; the arguments but for the index values are checked by
    ``fastattn.ops.topk_attention``.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv). order (B, H, N): the queries sorted by cluster; those of
    cluster c are order[offsets[c]] .. order[offsets[c + 1] - 1], those of no cluster stand from offsets[C] on. offsets
    (B, H, C + 1); topk_index (B, H, C, K), -1 for no key; all three int32 and contiguous. mass (B, H, C) and rest
    (B, H, C, Dv), fp32: out = mass * softmax part + rest. seed: int64, without dimensions, of dropout.
    lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.

    Returns out (B, H, N, Dv) in q's dtype and lse (B, H, N) in fp32, of the softmax part alone; a query of no cluster
    has 0 and -inf. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "order": order, "offsets": offsets, "topk_index": topk_index}
    tensors |= {"mass": mass.contiguous(), "rest": rest.contiguous(), "seed": seed, "out": out, "lse": lse}
    _run(("topk_attention_forward",), tensors, 2, is_causal, scale, dropout_p, lookup, stamp)
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, topk_index: torch.Tensor, mass: torch.Tensor, lse: torch.Tensor, seed: torch.Tensor,
    is_causal: bool, scale: float, dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv, dmass, drest) from dout (B, H, N, Dv), dlse (B, H, N) in fp32 and the lse of :func:`forward`; the
    same options."""
    q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), dout.contiguous()
    batch, heads, n_queries, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    n_clusters, top_k = topk_index.shape[2:]
    n_parts, _ = parts_of(n_queries, n_clusters, top_k)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return q.new_empty((batch, heads, *shape), dtype=dtype)

    dq, delta = q.new_empty(q.shape), empty(n_queries)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "order": order, "offsets": offsets, "topk_index": topk_index}
    tensors |= {
        "mass": mass.contiguous(),
        "lse": lse.contiguous(),
        "dlse": dlse.contiguous(),
        "seed": seed,
        "dq": dq,
        "delta": delta,
    }
    parts = {"dk": empty(n_parts, top_k, head_dim), "dv": empty(n_parts, top_k, value_dim)}
    parts |= {"rows": empty(n_parts, top_k, dtype=torch.int32), "drest": empty(n_parts, value_dim)}
    parts |= {"dmass": empty(n_parts), "clusters": empty(n_parts, dtype=torch.int32)}
    kernels = ("topk_attention_backward_dq", "topk_attention_backward_dkv")
    _run(kernels, tensors | parts, 2 + len(parts), is_causal, scale, dropout_p, lookup, stamp)

    # heads that share keys: the parts of all of them are summed at once
    entries, first = _sorted(parts["rows"].view(batch * kv_heads, -1), n_keys)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    for name, out in (("dk", dk), ("dv", dv)):
        part = parts[name].view(*entries.shape, -1)
        _sum_by_row(part, entries, first, out.view(batch * kv_heads, n_keys, -1), lookup, stamp)
    entries, first = _sorted(parts["clusters"].view(batch * heads, n_parts), n_clusters)
    dmass, drest = empty(n_clusters), empty(n_clusters, value_dim)
    for name, out in (("dmass", dmass), ("drest", drest)):
        part = parts[name].view(*entries.shape, -1)
        _sum_by_row(part, entries, first, out.view(batch * heads, n_clusters, -1), lookup, stamp)
    return dq, dk, dv, dmass, drest


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, device_type: str = "cuda", config: Config | None = None,
    top_k: int = 32, n_clusters: int = 100, is_causal: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    config = config or heuristic(kernel, device_type, top_k, head_dim, dtype.itemsize)
    if kernel == "topk_attention_sum":
        entries = meta(1, 64, dtype=torch.int32)
        tensors = {"parts": meta(1, 64, head_dim), "entries": entries, "first": entries}
        return sum_launch(tensors | {"sum": meta(1, 63, head_dim, dtype=dtype)}, config)
    x, row, integers = meta(1, 1, 64, head_dim, dtype=dtype), meta(1, 1, 64), meta(1, 1, 64, dtype=torch.int32)
    tensors = {"dout": x, "q": x, "k": x, "v": x, "order": integers, "offsets": integers, "out": x, "dq": x}
    tensors |= {"topk_index": meta(1, 1, n_clusters, top_k, dtype=torch.int32)}
    tensors |= {"rest": row, "drest": row, "dk": row, "dv": row, "rows": integers, "clusters": integers}
    tensors |= {name: row for name in ("mass", "dmass", "lse", "dlse", "delta")}
    tensors["seed"] = meta(1, dtype=torch.int64)
    return launch_of(kernel, tensors, is_causal, 1.0, 0.0, config)
