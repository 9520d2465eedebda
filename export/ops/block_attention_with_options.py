"""``fastattn::BlockAttentionWithOptions`` in standard ops: block attention as Reformer and causal SMYRF have it.

The definition, option by option, is :func:`fastattn.ops.block_attention.block_attention`. What stands here is the
signature: every input is always given, and what is not asked for has a form that takes no room.

T is fp32 or fp16; sums are fp32.

| input | shape | |
|---|---|---|
| q | (B, H, N, D) T | |
| k, v | (B, Hkv, S, D), (B, Hkv, S, Dv) T | |
| q_index, k_index | (B, H, R, nb, Cq), (B, H, R, nb, Ck) int32 | -1 is padding; a key mask is in k_index already |
| local_q_index, local_k_index | (B, H, 1, nb', Cq' or Ck') int32 | one round more, or a -1 of (1, 1, 1, 1, 1) |
| q_bucket, k_bucket | (B, H, R, N), (B, H, R, S) int32 | not read with across_buckets=1: (1, 1, 1, 1) then |
| n_used_blocks | (B,) int32, or (1,) for all alike | from 1 to nb; blocks from there on hold -1 alone |
| own_mask | (B, S) bool, or (1, 1) for all alike | whose own key takes part; read in self_mode 2 and 3 |

| attribute | |
|---|---|
| scale | float |
| look_back, look_ahead | int, blocks |
| wrap, is_causal, correct_duplicates | int, 0 or 1 |
| across_buckets | int, 0 or 1; 0: a pair counts only in a round in which both stand, and have one bucket |
| self_mode | int: 0 "attend", 1 "exclude", 2 "last_resort", 3 "once"; N = S with 2 and 3 |

Outputs: out (B, H, N, Dv) T, lse (B, H, N) fp32. A row that meets no key has out 0 and lse -inf.
"""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.block_softmax import BlockSoftmax, KeyValueRows, MergeRounds
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import FLOAT, INT, ExportedOp, node

BOOL = TensorProto.BOOL
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
FP32 = TensorProto.FLOAT
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def KeyWindows(slots, n_used_blocks, look_back: int, look_ahead: int, wrap: int, across_buckets: int):
    """slots (B, H, R, nb, C) int32: of each block of keys, n_used_blocks (B or 1,) -> (B, H, R, nb, W * C) int32: of
    the W = look_back + 1 + look_ahead blocks that a block of queries looks at; -1 where there is no such block."""
    batch_and_heads = op.Shape(slots, start=0, end=2)
    batch = op.Shape(slots, start=0, end=1)
    heads = op.Shape(slots, start=1, end=2)
    rounds = op.Shape(slots, start=2, end=3)
    n_blocks = op.Shape(slots, start=3, end=4)
    size = op.Shape(slots, start=4, end=5)
    nought = op.Constant(value_int=0)
    next_one = op.Constant(value_int=1)
    back = op.Constant(value_int=look_back)
    width = back + op.Constant(value_int=look_ahead) + 1
    used = op.Unsqueeze(op.Cast(n_used_blocks, to=INT64), [1, 2, 3])  # [B or 1, 1, 1, 1]
    here = op.Unsqueeze(op.Range(nought, op.Squeeze(rounds), next_one), [1, 2])  # [R, 1, 1]
    block = op.Unsqueeze(op.Range(nought, op.Squeeze(n_blocks), next_one), [1])  # [nb, 1]
    block = block + op.Range(nought, width, next_one) - back  # [nb, W]
    # the used blocks of all rounds are one ring
    place = (here * used + block) % (rounds * used)  # [B or 1, R, nb, W]
    there = place / used
    goes_round = op.Cast(op.Constant(value_int=wrap), to=BOOL)
    any_round = op.Cast(op.Constant(value_int=across_buckets), to=BOOL)
    inside = op.And(op.GreaterOrEqual(block, nought), op.Less(block, used))
    exists = op.And(op.Or(inside, goes_round), op.Or(op.Equal(there, here), any_round))

    number = op.Unsqueeze(there * n_blocks + place % used, [1])  # [B or 1, 1, R, nb, W]
    pair = op.Range(nought, op.Squeeze(batch * heads), next_one)
    first = op.Reshape(pair * rounds * n_blocks, op.Concat(batch, heads, [1], [1], [1], axis=0))
    flat = op.Reshape(slots, op.Concat(batch * heads * rounds * n_blocks, size, axis=0))
    windows = op.Gather(flat, first + number, axis=0)  # [B, H, R, nb, W, C]
    exists = op.Unsqueeze(exists, [1, 5])
    windows = op.Where(exists, windows, op.CastLike(op.Constant(value_int=-1), slots))
    wide = op.Reshape(width, [1]) * size
    return op.Reshape(windows, op.Concat(batch_and_heads, rounds, n_blocks, wide, axis=0))


@script(DOMAIN, default_opset=op)
def BlockNumbers(index, length):
    """index (B, H, R, nb, C) int32, length (1,) int64 -> (B, H, R, length) int32: the block in which each row stands in
    each round, -1 where in none."""
    before = op.Shape(index, start=0, end=3)
    slots = op.Shape(index, start=3, end=4) * op.Shape(index, start=4, end=5)
    per_round = op.Concat(before, slots, axis=0)
    rows = op.Cast(op.Reshape(index, per_round), to=INT64)
    rows = op.Where(rows < 0, length, rows)
    slot = op.Range(op.Constant(value_int=0), op.Squeeze(slots), op.Constant(value_int=1))
    number = op.Cast(slot / op.Shape(index, start=4, end=5), to=INT32)
    nowhere = op.Expand(op.Cast(op.Constant(value_int=-1), to=INT32), op.Concat(before, length + 1, axis=0))
    numbers = op.ScatterElements(nowhere, rows, op.Expand(number, per_round), axis=3)
    return op.Slice(numbers, [0], length, [3])


@script(DOMAIN, default_opset=op)
def AtRows(values, rows):
    """values (B, H, R or 1, L), rows (B, H, R, nb, C) int32 -> values at rows, of row 0 where there is none."""
    before = op.Shape(rows, start=0, end=3)
    slots = op.Shape(rows, start=3, end=4) * op.Shape(rows, start=4, end=5)
    at = op.Max(op.Reshape(rows, op.Concat(before, slots, axis=0)), op.CastLike(op.Constant(value_int=0), rows))
    of_round = op.Expand(values, op.Concat(before, op.Shape(values, start=3), axis=0))
    return op.Reshape(op.GatherElements(of_round, at, axis=3), op.Shape(rows))


@script(DOMAIN, default_opset=op)
def MetBefore(
    queries, keys, round_id, step, q_block, k_block, q_bucket, k_bucket, n_used_blocks,
    look_back: int, look_ahead: int, wrap: int, across_buckets: int, correct_duplicates: int,
):  # fmt: skip
    """queries (B, H, G, nb, C), keys (B, H, G, nb, K) int32 of the rounds round_id (G,), step (K,) int32: where in its
    query's window a key stands; q_block, q_bucket (B, H, R, N), k_block, k_bucket (B, H, R, S) int32 -> bool
    (B, H, G, nb, C, K): which pairs met in an earlier round, or in this one at an earlier step; none of them with
    correct_duplicates=0."""
    nought = op.Constant(value_int=0)
    minus_one = op.Cast(op.Constant(value_int=-1), to=INT32)
    zero = op.Cast(nought, to=INT32)
    rounds = op.Squeeze(op.Shape(q_block, start=2, end=3))
    back = op.Cast(op.Constant(value_int=look_back), to=INT32)
    neighbours = op.Constant(value_int=look_back) + op.Constant(value_int=look_ahead)
    width = op.Cast(neighbours + 1, to=INT32)
    any_round = op.Cast(op.Constant(value_int=across_buckets), to=BOOL)
    goes_round = op.Cast(op.Constant(value_int=wrap), to=BOOL)
    used = op.Unsqueeze(op.Cast(n_used_blocks, to=INT32), [1, 2, 3, 4, 5])
    ring = used * op.Cast(rounds, to=INT32)
    own = op.Unsqueeze(round_id, [1, 2, 3])  # [G, 1, 1, 1]
    met = op.Unsqueeze(op.Less(queries, minus_one), [5])  # none yet

    # a window may reach into every round's blocks if it goes round, is wider than its own block, and buckets allow it
    reaches = op.And(op.And(goes_round, any_round), op.Greater(neighbours, nought))
    reached = op.Where(reaches, rounds, nought + 1)
    trips = op.Constant(value_int=correct_duplicates) * rounds * reached
    met = op.Expand(met, op.Concat(op.Shape(queries), op.Shape(keys, start=4), axis=0))
    for trip in range(trips):
        here_round = trip / reached
        there_round = op.Where(reaches, trip % reached, here_round)
        here_at = op.Reshape(here_round, [1])
        there_at = op.Reshape(there_round, [1])
        here = op.Unsqueeze(AtRows(op.Gather(q_block, here_at, axis=2), queries), [5])
        there = op.Unsqueeze(AtRows(op.Gather(k_block, there_at, axis=2), keys), [4])
        between = op.Cast(there_round - here_round, to=INT32) * used + back
        at = there + (between - here)  # the step at which they meet
        at = op.Where(goes_round, at % ring, at)
        limit = op.Where(op.Equal(own, here_round), step, op.Where(op.Less(here_round, own), width, zero))
        found = op.And(op.GreaterOrEqual(at, zero), op.Less(at, limit))
        found = op.And(found, op.And(op.GreaterOrEqual(here, zero), op.GreaterOrEqual(there, zero)))
        bucket = op.Unsqueeze(AtRows(op.Gather(q_bucket, here_at, axis=2), queries), [5])
        other = op.Unsqueeze(AtRows(op.Gather(k_bucket, there_at, axis=2), keys), [4])
        found = op.And(found, op.Or(any_round, op.Equal(bucket, other)))
        met = op.Or(met, found)
    return met


@script(DOMAIN, default_opset=op)
def MayMeet(queries, keys, is_causal: int, self_mode: int):
    """queries (B, H, R, nb, C), keys (B, H, R, nb, K) int32 -> bool (B, H, R, nb, C, K): which pairs count by their
    rows alone."""
    i = op.Unsqueeze(queries, [5])
    j = op.Unsqueeze(keys, [4])
    nobody = op.Cast(op.Constant(value_int=-1), to=INT32)
    last_of_all = op.Cast(op.Constant(value_int=2147483647), to=INT32)
    latest = op.Where(op.Cast(op.Constant(value_int=is_causal), to=BOOL), i, last_of_all)
    left_out = op.Where(op.Cast(op.Constant(value_int=self_mode), to=BOOL), i, nobody)
    real = op.Greater(j, nobody)
    return op.And(op.And(real, op.LessOrEqual(j, latest)), op.Not(op.Equal(j, left_out)))


@script(DOMAIN, default_opset=op)
def OwnKeys(q, k, v, own_mask, q_block, local_q_block, scale: float):
    """q_block (B, H, R, N) and local_q_block (B, H, 1, N) int32 -> own_value (B, H, N, Dv), own_lse (B, H, N) fp32: as
    if each row's own key were all that it met; 0 and -inf for rows in no block and rows whose own key is masked."""
    batch = op.Shape(q, start=0, end=1)
    heads = op.Shape(q, start=1, end=2)
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    nought = op.Constant(value_int=0)
    infinity = op.Constant(value_float=float("inf"))
    in_a_round = op.ReduceMax(q_block, [2], keepdims=0)
    place = op.Max(in_a_round, op.Squeeze(local_q_block, [2]))
    # with another number of keys there is no own key, and nobody asks for one
    row = op.Min(op.Range(nought, op.Squeeze(n), op.Constant(value_int=1)), s - 1)
    mask = op.Gather(op.Expand(own_mask, op.Concat(batch, s, axis=0)), row, axis=1)
    has_own = op.And(op.GreaterOrEqual(place, op.CastLike(nought, place)), op.Unsqueeze(mask, [1]))  # [B, H, N]
    flat_k, first_key = KeyValueRows(k, heads)
    flat_v, _first_value = KeyValueRows(v, heads)
    empty_row = op.Shape(flat_k, start=0, end=1) - 1
    rows = op.Where(has_own, row + op.Squeeze(first_key, [3, 4]), empty_row)  # [B, H, N]
    score = op.ReduceSum(op.Cast(q, to=FP32) * op.Gather(flat_k, rows, axis=0), [3], keepdims=0)
    own_lse = op.Where(has_own, score * op.Constant(value_float=scale), op.Neg(infinity))
    return op.Gather(flat_v, rows, axis=0), own_lse


@script(DOMAIN, default_opset=op)
def BlockAttentionWithOptions(
    q, k, v, q_index, k_index, local_q_index, local_k_index, q_bucket, k_bucket, n_used_blocks, own_mask,
    scale: float, look_back: int, look_ahead: int, wrap: int, is_causal: int, self_mode: int, across_buckets: int,
    correct_duplicates: int,
):  # fmt: skip
    """Inputs, attributes and outputs: at the top of this file."""
    batch = op.Shape(q, start=0, end=1)
    heads = op.Shape(q, start=1, end=2)
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    rounds = op.Shape(q_index, start=2, end=3)
    nought = op.Constant(value_int=0)
    next_one = op.Constant(value_int=1)
    infinity = op.Constant(value_float=float("inf"))
    any_round = op.Cast(op.Constant(value_int=across_buckets), to=BOOL)
    q_buckets = op.Expand(q_bucket, op.Concat(batch, heads, rounds, n, axis=0))
    k_buckets = op.Expand(k_bucket, op.Concat(batch, heads, rounds, s, axis=0))
    no_blocks = op.Concat(batch, heads, [1], [1], [1], axis=0)
    local_queries = op.Expand(local_q_index, no_blocks)
    local_keys = op.Expand(local_k_index, no_blocks)
    q_block = BlockNumbers(q_index, n)
    k_block = BlockNumbers(k_index, s)

    # the hashed rounds
    keys = KeyWindows(
        k_index, n_used_blocks, look_back=look_back, look_ahead=look_ahead, wrap=wrap, across_buckets=across_buckets
    )
    keep = MayMeet(q_index, keys, is_causal=is_causal, self_mode=self_mode)
    key_bucket = KeyWindows(
        AtRows(k_buckets, k_index),
        n_used_blocks,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=wrap,
        across_buckets=across_buckets,
    )
    query_bucket = AtRows(q_buckets, q_index)
    same_bucket = op.Equal(op.Unsqueeze(query_bucket, [5]), op.Unsqueeze(key_bucket, [4]))
    keep = op.And(keep, op.Or(same_bucket, any_round))
    slot = op.Range(nought, op.Squeeze(op.Shape(keys, start=4, end=5)), next_one)
    step = op.Cast(slot / op.Shape(k_index, start=4, end=5), to=INT32)
    round_id = op.Range(nought, op.Squeeze(rounds), next_one)
    before = MetBefore(
        q_index, keys, round_id, step, q_block, k_block, q_buckets, k_buckets, n_used_blocks,
        look_back=look_back, look_ahead=look_ahead, wrap=wrap, across_buckets=across_buckets,
        correct_duplicates=correct_duplicates,
    )  # fmt: skip
    keep = op.And(keep, op.Not(before))
    hashed_out, hashed_lse = BlockSoftmax(q, k, v, q_index, keys, keep, scale=scale)

    # the local round
    own_step = op.Cast([0], to=INT32)
    keep = MayMeet(local_queries, local_keys, is_causal=is_causal, self_mode=self_mode)
    before = MetBefore(
        local_queries, local_keys, rounds, own_step, q_block, k_block, q_buckets, k_buckets, n_used_blocks,
        look_back=look_back, look_ahead=look_ahead, wrap=wrap, across_buckets=across_buckets,
        correct_duplicates=correct_duplicates,
    )  # fmt: skip
    keep = op.And(keep, op.Not(before))
    local_out, local_lse = BlockSoftmax(q, k, v, local_queries, local_keys, keep, scale=scale)

    # a row's own key, once
    own_value, own_score = OwnKeys(q, k, v, own_mask, q_block, BlockNumbers(local_queries, n), scale=scale)
    mode = op.Constant(value_int=self_mode)
    is_once = op.Equal(mode, 3)
    once_value = op.Where(is_once, own_value, op.Constant(value_float=0.0))  # else NaN would count, times no weight
    once_lse = op.Where(is_once, own_score, op.Neg(infinity))
    round_out = op.Concat(hashed_out, local_out, op.Unsqueeze(once_value, [2]), axis=2)
    round_lse = op.Concat(hashed_lse, local_lse, op.Unsqueeze(once_lse, [2]), axis=2)
    out, lse = MergeRounds(round_out, round_lse)

    # ... or as a last resort
    alone = op.And(op.Equal(mode, 2), op.IsInf(lse, detect_positive=0))
    out = op.Where(op.Unsqueeze(alone, [3]), own_value, out)
    lse = op.Where(alone, own_score, lse)
    return op.CastLike(out, q), lse


NODE = node(
    "BlockAttentionWithOptions",
    "q k v q_index:int32 k_index:int32 local_q_index:int32 local_k_index:int32 q_bucket:int32 k_bucket:int32"
    " n_used_blocks:int32 own_mask:bool",
    "out lse:float",
    {
        "scale": FLOAT,
        "look_back": INT,
        "look_ahead": INT,
        "wrap": INT,
        "is_causal": INT,
        "self_mode": INT,
        "across_buckets": INT,
        "correct_duplicates": INT,
    },
)

OP = ExportedOp(functions=(BlockAttentionWithOptions, KeyWindows, MetBefore, MayMeet, BlockNumbers, AtRows, OwnKeys))
