"""What both forms of block attention are made of: the softmax of each round, and the rounds as one softmax."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

INT64 = TensorProto.INT64
FP32 = TensorProto.FLOAT
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def KeyValueRows(x, heads):
    """x (B, Hkv, S, F), heads (1,) int64 -> rows (B * Hkv * S + 1, F) fp32, the last of zeros, and the number of the
    first row of each head's keys, (B, H, 1, 1, 1) int64."""
    one = op.Constant(value_ints=[1])
    batch = op.Shape(x, start=0, end=1)
    kv_heads = op.Shape(x, start=1, end=2)
    length = op.Shape(x, start=2, end=3)
    width = op.Shape(x, start=3)
    # leading dimensions are always spelt out, for a -1 there would take up whatever doesn't divide and mix the heads
    flat = op.Reshape(op.Cast(x, to=FP32), op.Concat(batch * kv_heads * length, width, axis=0))
    # padding reads a row of zeros: whatever stands in rows that take no part, NaN too, has no effect
    empty = op.Expand(op.Constant(value_float=0.0), op.Concat(one, width, axis=0))
    rows = op.Concat(flat, empty, axis=0)
    pair = op.Range(op.Constant(value_int=0), op.Squeeze(batch * heads), op.Constant(value_int=1))
    kv_pair = (pair / heads) * kv_heads + (pair % heads) / (heads / kv_heads)
    first = op.Reshape(kv_pair * length, op.Concat(batch, heads, one, one, one, axis=0))
    return rows, first


@script(DOMAIN, default_opset=op)
def BlockSoftmax(q, k, v, q_index, k_index, keep, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, K) int32
    with -1 for padding, keep bool that expands to (B, H, R, nb, Cq, K): which pairs count ->
    round_out (B, H, R, N, Dv), round_lse (B, H, R, N), fp32: each round's own softmax; 0 and -inf where a row meets no
    key in a round."""
    nought = op.Constant(value_int=0)
    minus_one = op.Constant(value_int=-1)
    one = op.Constant(value_ints=[1])
    zero = op.Constant(value_float=0.0)
    infinity = op.Constant(value_float=float("inf"))
    batch = op.Shape(q, start=0, end=1)
    heads = op.Shape(q, start=1, end=2)
    n = op.Shape(q, start=2, end=3)
    q_slots = op.Cast(q_index, to=INT64)
    k_slots = op.Cast(k_index, to=INT64)

    pairs = batch * heads
    pair = op.Range(nought, op.Squeeze(pairs), op.Constant(value_int=1))
    q_rows = op.Max(q_slots, nought) + op.Reshape(pair * n, op.Concat(batch, heads, one, one, one, axis=0))
    flat_q = op.Reshape(op.Cast(q, to=FP32), op.Concat(pairs * n, op.Shape(q, start=3), axis=0))
    flat_k, first_key = KeyValueRows(k, heads)
    flat_v, _first_value = KeyValueRows(v, heads)
    empty_row = op.Shape(flat_k, start=0, end=1) - 1
    k_rows = op.Where(k_slots < 0, empty_row, k_slots + first_key)
    blocks_q = op.Gather(flat_q, q_rows, axis=0)  # [B, H, R, nb, Cq, D]
    blocks_k = op.Gather(flat_k, k_rows, axis=0)  # [B, H, R, nb, K, D]
    blocks_v = op.Gather(flat_v, k_rows, axis=0)  # [B, H, R, nb, K, Dv]

    scaled = blocks_q * op.Constant(value_float=scale)
    scores = op.MatMul(scaled, op.Transpose(blocks_k, perm=[0, 1, 2, 3, 5, 4]))  # [B, H, R, nb, Cq, K]
    scores = op.Where(keep, scores, op.Neg(infinity))
    top = op.ReduceMax(scores, [-1], keepdims=1)
    top = op.Where(op.IsInf(top, detect_positive=0), zero, top)  # no key: exp(-inf - 0) is 0, where -inf - -inf is NaN
    weights = op.Exp(scores - top)
    total = op.ReduceSum(weights, [-1], keepdims=1)
    some = op.Where(op.Equal(total, zero), zero + 1.0, total)
    block_out = op.MatMul(weights, blocks_v) / some  # [B, H, R, nb, Cq, Dv]
    block_lse = top + op.Log(total)

    # where each row stands in each round: a scatter of slot numbers, with one column more for the padding
    rounds = op.Shape(q_index, start=2, end=3)
    slots = op.Shape(q_index, start=3, end=4) * op.Shape(q_index, start=4, end=5)
    per_round = op.Concat(batch, heads, rounds, slots, axis=0)
    rows = op.Reshape(op.Where(q_slots < 0, n, q_slots), per_round)
    nowhere = op.Expand(minus_one, op.Concat(batch, heads, rounds, n + 1, axis=0))
    slot = op.Range(nought, op.Squeeze(slots), op.Constant(value_int=1))
    place = op.ScatterElements(nowhere, rows, op.Expand(slot, per_round), axis=3)
    place = op.Slice(place, [0], n, [3])  # [B, H, R, N]
    stretch = op.Range(nought, op.Squeeze(pairs * rounds), op.Constant(value_int=1)) * slots
    source = op.Max(place, nought) + op.Reshape(stretch, op.Concat(batch, heads, rounds, one, axis=0))

    all_slots = pairs * rounds * slots
    round_out = op.Gather(op.Reshape(block_out, op.Concat(all_slots, op.Shape(v, start=3), axis=0)), source, axis=0)
    round_lse = op.Gather(op.Reshape(block_lse, all_slots), source, axis=0)
    round_out = op.Where(op.Unsqueeze(place < 0, [4]), zero, round_out)  # [B, H, R, N, Dv]
    round_lse = op.Where(place < 0, op.Neg(infinity), round_lse)  # [B, H, R, N]
    return round_out, round_lse


@script(DOMAIN, default_opset=op)
def MergeRounds(round_out, round_lse):
    """round_out (B, H, R, N, Dv) and round_lse (B, H, R, N), fp32 -> out (B, H, N, Dv), lse (B, H, N), fp32: the rounds
    together as one softmax over all keys that were met."""
    zero = op.Constant(value_float=0.0)
    highest = op.ReduceMax(round_lse, [2], keepdims=1)
    highest = op.Where(op.IsInf(highest, detect_positive=0), zero, highest)
    share = op.Exp(round_lse - highest)
    mass = op.ReduceSum(share, [2], keepdims=1)
    share = share / op.Where(op.Equal(mass, zero), zero + 1.0, mass)
    out = op.ReduceSum(round_out * op.Unsqueeze(share, [4]), [2], keepdims=0)
    lse = op.Squeeze(highest + op.Log(mass), [2])
    return out, lse


OP = ExportedOp(functions=(KeyValueRows, BlockSoftmax, MergeRounds))
