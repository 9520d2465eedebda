"""``fastattn::TopkAttention`` in standard ops: each query attends to the key list of its cluster."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.cluster_attention import HeadRows
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
TILE = 32  # queries that share one copy of a list: as many as a list usually has keys, so copies are as large as k
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def ClusterTiles(clusters, n_clusters):
    """clusters (B, H, N) int32, 0 to C - 1 or -1, n_clusters (1,) int64 -> tile_cluster (B, H, n_tiles), tile_rows
    (B, H, n_tiles, TILE) and place (B, H, N), int64: the rows sorted by cluster and cut into tiles of one cluster each,
    -1 where a tile is not full, and where among all slots of its head's tiles each row stands.

    Rows of no cluster are those of cluster C."""
    zero = op.Constant(value_int=0)
    minus_one = op.Constant(value_int=-1)
    tile = op.Constant(value_ints=[TILE])
    lead = op.Shape(clusters, start=0, end=2)
    n = op.Shape(clusters, start=2, end=3)
    number = op.Cast(clusters, to=INT64)
    number = op.Where(op.Less(number, zero), n_clusters, number)
    ordered, order = op.TopK(number, n, axis=2, largest=0, sorted=1)  # equal numbers keep their order

    per_cluster = op.Expand(zero, op.Concat(lead, n_clusters + 1, axis=0))
    each_one = op.Expand(op.Constant(value_int=1), op.Shape(number))
    counts = op.ScatterElements(per_cluster, number, each_one, axis=2, reduction="add")
    first_row = op.CumSum(counts, op.Constant(value_int=2), exclusive=1)
    first_tile = op.CumSum((counts + tile - 1) / tile, op.Constant(value_int=2), exclusive=1)
    rank = op.Range(zero, op.Squeeze(n), op.Constant(value_int=1)) - op.GatherElements(first_row, ordered, axis=2)
    slot = op.GatherElements(first_tile, ordered, axis=2) * tile + rank  # [B, H, N]

    n_tiles = n / tile + n_clusters + 1  # as many as there may be
    slots = op.Concat(lead, n_tiles * tile, axis=0)
    tiles = op.Concat(lead, n_tiles, tile, axis=0)
    tile_rows = op.Reshape(op.ScatterElements(op.Expand(minus_one, slots), slot, order, axis=2), tiles)
    of_slot = op.ScatterElements(op.Expand(n_clusters, slots), slot, ordered, axis=2)
    tile_cluster = op.Squeeze(op.Slice(op.Reshape(of_slot, tiles), [0], [1], [3]), [3])
    place = op.ScatterElements(order, order, slot, axis=2)
    return tile_cluster, tile_rows, place


@script(DOMAIN, default_opset=op)
def TopkAttention(q, k, v, clusters, topk_index, mass, rest, is_causal: int, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) T, clusters (B, H, N) int32, 0 to C - 1, or -1 for queries of
    none, topk_index (B, H, C, K) int32, -1 for no key, mass (B, H, C) and rest (B, H, C, Dv) fp32 -> out (B, H, N, Dv)
    T, lse (B, H, N) fp32.

    out is mass times the softmax of scale * q . k over the keys of the query's cluster's list, plus rest; lse the
    logarithm of the softmax's denominator. is_causal: without keys after the query's own row. A query that meets no key
    has lse -inf and out rest; one of no cluster 0, whatever it holds."""
    zero = op.Constant(value_float=0.0)
    none = op.Constant(value_int=-1)
    n_clusters = op.Shape(topk_index, start=2, end=3)
    tile_cluster, tile_rows, place = ClusterTiles(clusters, n_clusters)

    # a list, a mass and a rest more, for queries of no cluster
    one_more = [0, 0, 0, 0, 0, 0, 1, 0]
    lists = op.Pad(op.Cast(topk_index, to=INT64), one_more, none)  # [B, H, C + 1, K]
    lists, first_list, _no_list = HeadRows(lists)
    list_of_tile = first_list + tile_cluster
    keys = op.Gather(lists, list_of_tile, axis=0)  # [B, H, n_tiles, K]

    # heads of keys as query heads see them: their tables' rows, one key head for each group
    heads = op.Shape(q, start=1, end=2)
    kv_heads = op.Shape(k, start=1, end=2)
    head = op.Range(op.Constant(value_int=0), op.Squeeze(heads), op.Constant(value_int=1))
    kv_head = head / (heads / kv_heads)
    no_key = keys < 0
    k_table, first_key, no_row = HeadRows(op.Cast(k, to=FLOAT))
    v_table, _first_key, _no_row = HeadRows(op.Cast(v, to=FLOAT))
    k_rows = op.Where(no_key, no_row, keys + op.Unsqueeze(op.Gather(first_key, kv_head, axis=1), [3]))
    tile_k = op.Gather(k_table, k_rows, axis=0)  # [B, H, n_tiles, K, D]
    tile_v = op.Gather(v_table, k_rows, axis=0)  # [B, H, n_tiles, K, Dv]
    q_table, first_query, no_query = HeadRows(op.Cast(q, to=FLOAT))
    q_rows = op.Where(tile_rows < 0, no_query, tile_rows + op.Unsqueeze(first_query, [3]))
    tile_q = op.Gather(q_table, q_rows, axis=0)  # [B, H, n_tiles, TILE, D]

    s = op.MatMul(tile_q, op.Transpose(tile_k, perm=[0, 1, 2, 4, 3])) * op.Constant(value_float=scale)
    later = op.Greater(op.Unsqueeze(keys, [3]), op.Unsqueeze(tile_rows, [4]))  # [B, H, n_tiles, TILE, K]
    later = op.And(later, op.Cast(op.Constant(value_int=is_causal), to=TensorProto.BOOL))
    s = op.Where(op.Or(op.Unsqueeze(no_key, [3]), later), op.Constant(value_float=float("-inf")), s)
    top = op.ReduceMax(s, [4], keepdims=1)
    top = op.Where(op.IsInf(top), zero, top)  # no key: exp(-inf - 0) is 0, where -inf - -inf is NaN
    p = op.Exp(s - top)
    total = op.ReduceSum(p, [4], keepdims=1)
    tile_out = op.MatMul(p, tile_v) / op.Where(total > zero, total, zero + 1.0)  # [B, H, n_tiles, TILE, Dv]
    tile_lse = top + op.Log(total)

    rest_table, first_rest, _no_rest = HeadRows(op.Pad(rest, one_more, zero))
    mass_table, _first_mass, _no_mass = HeadRows(op.Pad(op.Unsqueeze(mass, [3]), one_more, zero))
    tile_mass = op.Unsqueeze(op.Gather(mass_table, first_rest + tile_cluster, axis=0), [4])
    tile_rest = op.Unsqueeze(op.Gather(rest_table, first_rest + tile_cluster, axis=0), [3])
    tile_out = tile_out * tile_mass + tile_rest

    lead = op.Shape(q, start=0, end=2)
    slots = op.Shape(tile_rows, start=2, end=3) * op.Shape(tile_rows, start=3, end=4)
    out_table, first_slot, _ = HeadRows(op.Reshape(tile_out, op.Concat(lead, slots, op.Shape(v, start=3), axis=0)))
    lse_table, _first, _ = HeadRows(op.Reshape(tile_lse, op.Concat(lead, slots, [1], axis=0)))
    out = op.CastLike(op.Gather(out_table, first_slot + place, axis=0), q)
    lse = op.Squeeze(op.Gather(lse_table, first_slot + place, axis=0), [3])
    return out, lse


OP = ExportedOp(functions=(TopkAttention, ClusterTiles))
