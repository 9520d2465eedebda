"""``fastattn::SortedBlocks`` in standard ops: rows in the order of their hashes, cut into blocks."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def SortedBlocks(hashes, mask, n_blocks, block_size, packed: int):
    """hashes (B, H, R, N) fp32, mask (B, N) bool, n_blocks and block_size (1,) int64 -> (B, H, R, n_blocks, block_size)
    int32: the rows that take part, sorted by hash, cut into blocks; -1 where there is none.

    packed=1 fills one block after the other; 0 cuts at n_blocks quantiles. Equal hashes keep their order."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    n = op.Shape(hashes, start=3, end=4)
    infinity = op.Constant(value_float=float("inf"))
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


OP = ExportedOp(functions=(SortedBlocks,))
