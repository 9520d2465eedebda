"""``fastattn::SmyrfAttention`` in standard ops: hash, cut into blocks, attend. The definition is in
:func:`fastattn.smyrf_attention`; three nested functions, each of which a library may replace."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.block_attention import BlockAttention
from fastattn.export.ops.domain import DOMAIN

op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def SmyrfHash(q, k, projections, query_mask, key_mask):
    """q (B, H, N, D), k (B, Hkv, S, D), projections (D + 2, R), query_mask (B, N) and key_mask (B, S) bool ->
    q_hash (B, H, R, N), k_hash (B, H, R, S): the sphere transforms on the R directions."""
    zero = op.CastLike(op.Constant(value_float=0.0), q)
    heads = op.Squeeze(op.Shape(q, start=1, end=2))
    kv_heads = op.Squeeze(op.Shape(k, start=1, end=2))
    kv_head = op.Range(op.Constant(value_int=0), heads, op.Constant(value_int=1)) / (heads / kv_heads)
    q_norm = op.ReduceSumSquare(q, [3], keepdims=0)  # [B, H, N]
    k_norm = op.Gather(op.ReduceSumSquare(k, [3], keepdims=0), kv_head, axis=1)  # [B, H, S]
    q_most = op.ReduceMax(op.Where(op.Unsqueeze(query_mask, [1]), q_norm, zero), [2], keepdims=1)
    k_most = op.ReduceMax(op.Where(op.Unsqueeze(key_mask, [1]), k_norm, zero), [2], keepdims=1)
    radius = q_most + k_most
    q_height = op.Unsqueeze(op.Sqrt(op.Relu(radius - q_norm)), [2])  # [B, H, 1, N]
    k_height = op.Unsqueeze(op.Sqrt(op.Relu(radius - k_norm)), [2])

    dim = op.Shape(q, start=3, end=4)
    turned = op.Transpose(projections, perm=[1, 0])  # [R, D + 2]
    directions = op.Slice(turned, [0], dim, [1])
    k_direction = op.Slice(turned, dim, dim + 1, [1])  # [R, 1]
    q_direction = op.Slice(turned, dim + 1, dim + 2, [1])
    q_part = op.MatMul(directions, op.Transpose(q, perm=[0, 1, 3, 2]))  # [B, H, R, N]
    k_part = op.Gather(op.MatMul(directions, op.Transpose(k, perm=[0, 1, 3, 2])), kv_head, axis=1)
    q_hash = q_part + q_direction * q_height
    k_hash = k_part + k_direction * k_height
    return q_hash, k_hash


@script(DOMAIN, default_opset=op)
def SortedBlocks(hashes, mask, n_blocks, block_size, packed: int):
    """hashes (B, H, R, N), mask (B, N) bool, n_blocks and block_size (1,) int64 -> (B, H, R, n_blocks, block_size)
    int32: the rows that take part, sorted by hash, cut into blocks; -1 where there is none.

    packed=1 fills one block after the other; 0 cuts at n_blocks quantiles. Equal hashes keep their order."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    n = op.Shape(hashes, start=3, end=4)
    infinity = op.CastLike(op.Constant(value_float=float("inf")), hashes)
    taking_part = op.Where(op.Unsqueeze(mask, [1, 2]), hashes, infinity)
    _sorted_hashes, order = op.TopK(taking_part, n, axis=-1, largest=0, sorted=1)  # [B, H, R, N]

    count = op.ReduceSum(op.Cast(mask, to=TensorProto.INT64), [1], keepdims=1)  # [B, 1]
    block = op.Range(op.Constant(value_int=0), op.Squeeze(n_blocks), op.Constant(value_int=1))  # [nb]
    is_packed = op.Cast(op.Constant(value_int=packed), to=TensorProto.BOOL)
    first = op.Where(is_packed, op.Min(block * block_size, count), block * count / n_blocks)  # [B, nb]
    last = op.Where(is_packed, op.Min((block + 1) * block_size, count), (block + 1) * count / n_blocks)
    slot = op.Range(op.Constant(value_int=0), op.Squeeze(block_size), op.Constant(value_int=1))
    rank = op.Unsqueeze(first, [2]) + slot  # [B, nb, C]
    inside = op.Less(rank, op.Unsqueeze(last, [2]))

    batch = op.Shape(hashes, start=0, end=1)
    heads_and_rounds = op.Shape(hashes, start=1, end=3)
    rank = op.Reshape(op.Min(rank, n - 1), op.Concat(batch, one, one, n_blocks * block_size, axis=0))
    rank = op.Expand(rank, op.Concat(batch, heads_and_rounds, n_blocks * block_size, axis=0))
    rows = op.GatherElements(order, rank, axis=3)
    rows = op.Reshape(rows, op.Concat(batch, heads_and_rounds, n_blocks, block_size, axis=0))
    return op.Cast(op.Where(op.Unsqueeze(inside, [1, 2]), rows, zero - 1), to=TensorProto.INT32)


@script(DOMAIN, default_opset=op)
def SmyrfAttention(
    q, k, v, projections, key_mask, query_mask, q_cluster_size: int, k_cluster_size: int, scale: float, packed: int
):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), projections (D + 2, R), key_mask (B, S) and query_mask
    (B, N) bool, or (1, 1) for "all alike" -> out (B, H, N, Dv), lse (B, H, N).

    k_cluster_size: 0 is as many keys as it takes. packed: queries and keys are the same tokens, with one mask and one
    cluster size, and fill their blocks one after the other; 0 cuts both at the same quantiles."""
    batch = op.Shape(q, start=0, end=1)
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    query_keep = op.Expand(query_mask, op.Concat(batch, n, axis=0))
    key_keep = op.Expand(key_mask, op.Concat(batch, s, axis=0))
    q_hash, k_hash = SmyrfHash(q, k, projections, query_keep, key_keep)

    is_packed = op.Cast(op.Constant(value_int=packed), to=TensorProto.BOOL)
    q_size = op.Reshape(op.Constant(value_int=q_cluster_size), [1])
    k_size = op.Reshape(op.Constant(value_int=k_cluster_size), [1])
    wanted = (n + q_size - 1) / q_size
    n_blocks = op.Where(is_packed, wanted, op.Min(wanted, s))
    # fewer keys than blocks: as many blocks as keys, of more queries
    q_size = op.Where(op.Less(n_blocks, wanted), (n + n_blocks - 1) / n_blocks, q_size)
    k_needed = op.Where(is_packed, q_size, (s + n_blocks - 1) / n_blocks)
    k_size = op.Where(op.Equal(k_size, 0), k_needed, k_size)

    q_index = SortedBlocks(q_hash, query_keep, n_blocks, q_size, packed=packed)
    k_index = SortedBlocks(k_hash, key_keep, n_blocks, k_size, packed=packed)
    out, lse = BlockAttention(q, k, v, q_index, k_index, scale=scale)
    return out, lse


FUNCTIONS = (SmyrfAttention, SmyrfHash, SortedBlocks, BlockAttention)
