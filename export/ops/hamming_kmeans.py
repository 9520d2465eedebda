"""``fastattn::HammingKmeans`` in standard ops: Lloyd's algorithm on binary codes; and the random numbers that it takes.

The draws are those of torch: Philox of a seed, which is a weight of the model, so that a file has the clusters that the
model has, at every length."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.hash_bits import PLACES
from fastattn.export.ops.node import ExportedOp

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
HALF_WORD, WORD, BEYOND_WORD, MOST = 2**16, 2**32 - 1, 2**32, 2**63 - 1
HALF_OF_CODES = 2**31 - 1
MULTIPLIERS, STEPS = [0xD2511F53, 0xCD9E8D57], [0x9E3779B9, 0xBB67AE85]
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def Philox(seed, counter):
    """seed () and counter (n,), int64 and not negative -> words (n, 4) int64, 0 to 2^32 - 1: Philox 4x32-10 of the
    counter's two words and two zeros."""
    half = op.Constant(value_int=HALF_WORD)
    word = op.Constant(value_int=WORD)
    beyond = op.Constant(value_int=BEYOND_WORD)
    multipliers = op.Unsqueeze(op.Constant(value_ints=MULTIPLIERS), [1])
    steps = op.Unsqueeze(op.Constant(value_ints=STEPS), [1])
    crosswise = op.Constant(value_ints=[1, 0])
    key = op.Concat(op.Reshape(op.BitwiseAnd(seed, word), [1, 1]), op.Reshape(seed / beyond, [1, 1]), axis=0)
    counter = op.Unsqueeze(counter, [0])
    even = op.Concat(op.BitwiseAnd(counter, word), counter - counter, axis=0)  # [2, n]: the words 0 and 2
    odd = op.Concat(counter / beyond, counter - counter, axis=0)  # the words 1 and 3
    for _ in range(10):
        # by halves of a word, for the whole product may have 64 bits, and what int64 makes of these no standard says
        above = even / half * multipliers
        below = op.BitwiseAnd(even, half - 1) * multipliers
        upper = (above + below / half) / half
        lower = op.BitwiseAnd(op.BitwiseAnd(above, half - 1) * half + below, word)
        even = op.BitwiseXor(op.BitwiseXor(op.Gather(upper, crosswise, axis=0), odd), key)
        odd = op.Gather(lower, crosswise, axis=0)
        key = op.BitwiseAnd(key + steps, word)
    words = op.Concat(op.Unsqueeze(even, [1]), op.Unsqueeze(odd, [1]), axis=1)  # [2, 2, n]
    return op.Transpose(op.Reshape(words, op.Concat([4], op.Shape(counter, start=1), axis=0)), perm=[1, 0])


@script(DOMAIN, default_opset=op)
def FirstRows(codes, mask, seed, n_clusters: int):
    """codes (B, H, N) int64, mask (B, N) or (1, 1) bool, seed () int64 -> initial (B, H, n_clusters) int32: random rows
    without repetition among those that the mask has, the same for all heads; -1 where there are fewer."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    word = op.Constant(value_int=WORD)
    most = op.Constant(value_int=MOST)
    n = op.Shape(codes, start=2, end=3)
    quarters = (n + 3) / 4
    # other counters than those of centroids without members; four words each
    counter = op.Range(zero, op.Squeeze(quarters), one) + op.Constant(value_int=BEYOND_WORD)
    words = op.Slice(op.Reshape(Philox(seed, counter), quarters * 4), [0], n, [0])
    keys = words / 2 * op.Constant(value_int=BEYOND_WORD) + op.Range(zero, op.Squeeze(n), one)  # all different
    keys = op.Where(mask, op.Unsqueeze(keys, [0]), most)  # [B or 1, N]

    wanted = op.Reshape(op.Constant(value_int=n_clusters), [1])
    there = op.Min(wanted, n)
    least, _places = op.TopK(keys, there, axis=1, largest=0, sorted=1)
    rows = op.Where(op.Equal(least, most), zero - 1, op.BitwiseAnd(least, word))
    none = op.Expand(zero - 1, op.Concat(op.Shape(rows, start=0, end=1), wanted - there, axis=0))
    rows = op.Unsqueeze(op.Concat(rows, none, axis=1), [1])
    return op.Cast(op.Expand(rows, op.Concat(op.Shape(codes, start=0, end=2), wanted, axis=0)), to=INT32)


@script(DOMAIN, default_opset=op)
def Signs(codes, n_bits: int):
    """codes (...) int64 -> (..., n_bits) fp32: 1 for each bit that is set, else -1."""
    places = op.Slice(op.Constant(value_ints=PLACES), [0], op.Reshape(op.Constant(value_int=n_bits), [1]), [0])
    is_set = op.Cast(op.BitwiseAnd(op.Unsqueeze(codes, [-1]), places), to=TensorProto.BOOL)
    return op.Where(is_set, op.Constant(value_float=1.0), op.Constant(value_float=-1.0))


@script(DOMAIN, default_opset=op)
def Nearest(signs, centroids, exists):
    """signs (B, H, N, n_bits + 1), the last of them 1, centroids (B, H, C, n_bits), exists (B, H, C, 1), 1 or 0, all
    fp32 -> (B, H, N) int64: the nearest of the centroids that exist, of equals the first; 0 if none does."""
    # the more bits agree, the larger is the dot product, which whole numbers make exact; it is -63 at least
    candidates = op.Concat(centroids * exists, (exists - 1.0) * 64.0, axis=3)
    agreement = op.MatMul(signs, op.Transpose(candidates, perm=[0, 1, 3, 2]))  # [B, H, N, C]
    return op.ArgMax(agreement, axis=3, keepdims=0, select_last_index=0)


@script(DOMAIN, default_opset=op)
def HammingKmeans(codes, initial, mask, seed, n_bits: int, n_iterations: int):
    """codes (B, H, N) int64, initial (B, H, C) int32, mask (B, N) bool or (1, 1) for "all", seed () int64 from 0 ->
    clusters (B, H, N) int32, 0 to C - 1, or -1 for rows that the mask does not have.

    n_bits: of a code, 1 to 63. n_iterations: assignments, at least 1. initial: the rows whose codes are the first
    centroids. One that is negative, or that a shorter sequence does not have, is a cluster that is never used; if all
    are, every row is in cluster 0. A row goes to the nearest centroid, of equals the first; a bit of a centroid is 1 if
    more than half of its members have it; a centroid c without members gets, in iteration i, the bits of the words 0
    and 1 of Philox(seed, i * C + c)."""
    zero = op.Constant(value_int=0)
    n = op.Shape(codes, start=2, end=3)
    n_clusters = op.Shape(initial, start=2, end=3)
    rows = op.Cast(initial, to=INT64)
    is_row = op.And(op.GreaterOrEqual(rows, zero), op.Less(rows, n))
    exists = op.Cast(op.Unsqueeze(is_row, [3]), to=FLOAT)  # [B, H, C, 1]
    first = op.GatherElements(codes, op.Where(is_row, rows, zero), axis=2)
    centroids = Signs(first, n_bits=n_bits)  # [B, H, C, n_bits]
    signs = Signs(codes, n_bits=n_bits)  # [B, H, N, n_bits]
    # one column more, which counts members, and keeps rows from clusters that are not there
    signs = op.Pad(signs, [0, 0, 0, 0, 0, 0, 0, 1], op.Constant(value_float=1.0))
    columns = op.Concat(op.Reshape(op.Constant(value_int=n_bits), [1]), [1], axis=0)
    takes_part = op.Unsqueeze(mask, [1])

    numbers = op.Range(zero, op.Squeeze(n_clusters), op.Constant(value_int=1))
    updates = op.Constant(value_int=n_iterations) - 1
    for iteration in range(updates):
        clusters = op.Where(takes_part, Nearest(signs, centroids, exists), zero - 1)
        member = op.Cast(op.Equal(op.Unsqueeze(clusters, [2]), op.Unsqueeze(numbers, [1])), to=FLOAT)  # [B, H, C, N]
        # bits that are set less those that are not, and members; exact up to 2^24 rows
        lead, members = op.Split(op.MatMul(member, signs), columns, axis=3)
        majority = op.Where(lead > 0.0, op.Constant(value_float=1.0), op.Constant(value_float=-1.0))
        words = Philox(seed, iteration * n_clusters + numbers)
        low = op.Squeeze(op.Slice(words, [0], [1], [1]), [1])
        high = op.BitwiseAnd(op.Squeeze(op.Slice(words, [1], [2], [1]), [1]), op.Constant(value_int=HALF_OF_CODES))
        drawn = Signs(low + high * op.Constant(value_int=BEYOND_WORD), n_bits=n_bits)  # [C, n_bits]
        centroids = op.Where(members > 0.0, majority, drawn)
    clusters = op.Where(takes_part, Nearest(signs, centroids, exists), zero - 1)
    return op.Cast(clusters, to=INT32)


OP = ExportedOp(functions=(HammingKmeans, Nearest, Signs, FirstRows, Philox))
