"""The Triton kernels of top-k attention: forward, dq, sums of parts for dk with dv, and the sum of those parts."""

from __future__ import annotations

import triton
import triton.language as tl

from .block_pairs import kept_pairs
from .tiles import head_of, load_rows, store_rows


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
