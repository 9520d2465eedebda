"""``fastattn::LocalBlocks`` in standard ops: the local round of hashing methods, blocks of consecutive positions."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def LocalBlocks(heads, query_mask, key_mask, window: int):
    """heads (1,) int64, query_mask and key_mask (B, N) bool -> q_index, k_index (B, H, 1, nb, w) int32: blocks of w =
    min(window, N) consecutive positions, counted over the rows that take part as query or as key; -1 where a row does
    not. window=0: one block of one place that holds -1."""
    batch = op.Shape(query_mask, start=0, end=1)
    n = op.Shape(query_mask, start=1, end=2)
    one = op.Constant(value_ints=[1])
    nowhere = op.Constant(value_int=-1)
    wanted = op.Constant(value_int=window)
    is_wanted = op.Greater(wanted, 0)
    size = op.Max(op.Min(wanted, n), one)
    n_blocks = op.Where(is_wanted, (n + size - 1) / size, one)
    slots = n_blocks * size

    taking_part = op.Or(query_mask, key_mask)
    rank = op.CumSum(op.Cast(taking_part, to=INT64), op.Constant(value_int=1)) - 1
    # one place more, for those that stand in no block
    rank = op.Where(op.And(taking_part, is_wanted), rank, slots)
    row = op.Range(op.Constant(value_int=0), op.Squeeze(n), op.Constant(value_int=1))
    empty = op.Expand(nowhere, op.Concat(batch, slots + 1, axis=0))
    blocks = op.Concat(batch, one, one, n_blocks, size, axis=0)
    every_head = op.Concat(batch, heads, one, n_blocks, size, axis=0)
    queries = op.ScatterElements(empty, rank, op.Where(query_mask, row, nowhere), axis=1)
    keys = op.ScatterElements(empty, rank, op.Where(key_mask, row, nowhere), axis=1)
    q_index = op.Expand(op.Reshape(op.Slice(queries, [0], slots, [1]), blocks), every_head)
    k_index = op.Expand(op.Reshape(op.Slice(keys, [0], slots, [1]), blocks), every_head)
    return op.Cast(q_index, to=INT32), op.Cast(k_index, to=INT32)


OP = ExportedOp(functions=(LocalBlocks,))
