"""``fastattn::BlockAttention`` in standard ops: blocks of gathered queries attend to blocks of gathered keys."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN

INT64 = TensorProto.INT64
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def BlockAttention(q, k, v, q_index, k_index, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, Ck)
    int32 with -1 for padding -> out (B, H, N, Dv), lse (B, H, N). A row that meets no key has out 0 and lse -inf."""
    one = op.Constant(value_ints=[1])
    nought = op.Constant(value_int=0)
    minus_one = op.Constant(value_int=-1)
    zero = op.CastLike(op.Constant(value_float=0.0), q)
    batch = op.Shape(q, start=0, end=1)
    heads = op.Shape(q, start=1, end=2)
    kv_heads = op.Shape(k, start=1, end=2)
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    q_slots = op.Cast(q_index, to=INT64)
    k_slots = op.Cast(k_index, to=INT64)

    # every (batch, head) is a stretch of rows; leading dimensions are always spelt out, for a -1 there would take up
    # whatever doesn't divide and mix the heads
    pairs = batch * heads
    pair = op.Range(op.Constant(value_int=0), op.Squeeze(pairs), op.Constant(value_int=1))
    group = op.Squeeze(heads / kv_heads)
    kv_pair = (pair / op.Squeeze(heads)) * op.Squeeze(kv_heads) + (pair % op.Squeeze(heads)) / group
    per_pair = op.Concat(batch, heads, one, one, one, axis=0)
    q_rows = op.Max(q_slots, nought) + op.Reshape(pair * op.Squeeze(n), per_pair)
    key_is_real = op.Greater(k_slots, minus_one)  # [B, H, R, nb, Ck]
    kv_size = batch * kv_heads * s
    k_rows = op.Where(key_is_real, k_slots + op.Reshape(kv_pair * op.Squeeze(s), per_pair), kv_size)
    flat_q = op.Reshape(q, op.Concat(pairs * n, op.Shape(q, start=3), axis=0))
    # padding reads a row of zeros: whatever stands in rows that take no part, NaN too, has no effect
    flat_k = op.Reshape(k, op.Concat(kv_size, op.Shape(k, start=3), axis=0))
    flat_k = op.Concat(flat_k, op.Expand(zero, op.Concat(one, op.Shape(k, start=3), axis=0)), axis=0)
    flat_v = op.Reshape(v, op.Concat(kv_size, op.Shape(v, start=3), axis=0))
    flat_v = op.Concat(flat_v, op.Expand(zero, op.Concat(one, op.Shape(v, start=3), axis=0)), axis=0)
    blocks_q = op.Gather(flat_q, q_rows, axis=0)  # [B, H, R, nb, Cq, D]
    blocks_k = op.Gather(flat_k, k_rows, axis=0)  # [B, H, R, nb, Ck, D]
    blocks_v = op.Gather(flat_v, k_rows, axis=0)  # [B, H, R, nb, Ck, Dv]

    scaled = blocks_q * op.CastLike(op.Constant(value_float=scale), q)
    scores = op.MatMul(scaled, op.Transpose(blocks_k, perm=[0, 1, 2, 3, 5, 4]))  # [B, H, R, nb, Cq, Ck]
    infinity = op.CastLike(op.Constant(value_float=float("inf")), q)
    scores = op.Where(op.Unsqueeze(key_is_real, [4]), scores, op.Neg(infinity))
    top = op.ReduceMax(scores, [-1], keepdims=1)
    top = op.Where(op.IsInf(top), zero, top)  # no key in the block: exp(-inf - 0) is 0, where -inf - -inf is NaN
    weights = op.Exp(scores - top)
    total = op.ReduceSum(weights, [-1], keepdims=1)
    some = op.Where(op.Greater(total, zero), total, zero + 1.0)
    block_out = op.MatMul(weights, blocks_v) / some  # [B, H, R, nb, Cq, Dv]
    block_lse = top + op.Log(total)

    # where each row stands in each round: a scatter of slot numbers, with one column more for the padding
    rounds = op.Shape(q_index, start=2, end=3)
    slots = op.Shape(q_index, start=3, end=4) * op.Shape(q_index, start=4, end=5)
    per_round = op.Concat(batch, heads, rounds, slots, axis=0)
    rows = op.Reshape(op.Where(q_slots < 0, op.Squeeze(n), q_slots), per_round)
    nowhere = op.Expand(minus_one, op.Concat(batch, heads, rounds, n + 1, axis=0))
    slot = op.Range(op.Constant(value_int=0), op.Squeeze(slots), op.Constant(value_int=1))
    place = op.ScatterElements(nowhere, rows, op.Expand(slot, per_round), axis=3)
    place = op.Slice(place, [0], n, [3])  # [B, H, R, N]
    stretch = op.Range(op.Constant(value_int=0), op.Squeeze(pairs * rounds), op.Constant(value_int=1)) * op.Squeeze(
        slots
    )
    source = op.Max(place, nought) + op.Reshape(stretch, op.Concat(batch, heads, rounds, one, axis=0))

    all_slots = pairs * rounds * slots
    round_out = op.Gather(op.Reshape(block_out, op.Concat(all_slots, op.Shape(v, start=3), axis=0)), source, axis=0)
    round_lse = op.Gather(op.Reshape(block_lse, all_slots), source, axis=0)
    round_lse = op.Where(place < 0, op.Neg(infinity), round_lse)  # [B, H, R, N]

    # the rounds together are one softmax over all keys that were met
    highest = op.ReduceMax(round_lse, [2], keepdims=1)
    highest = op.Where(op.IsInf(highest), zero, highest)
    share = op.Exp(round_lse - highest)
    mass = op.ReduceSum(share, [2], keepdims=1)
    share = share / op.Where(op.Greater(mass, zero), mass, zero + 1.0)
    out = op.ReduceSum(round_out * op.Unsqueeze(share, [4]), [2], keepdims=0)
    met_a_key = op.Unsqueeze(op.Greater(op.Squeeze(mass, [2]), zero), [3])
    out = op.Where(met_a_key, out, zero)
    lse = op.Squeeze(highest + op.Log(mass), [2])
    return out, lse
