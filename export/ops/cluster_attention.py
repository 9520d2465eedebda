"""``fastattn::ClusterSums`` and ``fastattn::ClusterBroadcast`` in standard ops: rows to clusters and back."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def ClusterSums(x, clusters, n_clusters: int):
    """x (B, H, N, F) T, clusters (B, H, N) int32, 0 to n_clusters - 1, or -1 for rows of none, which may hold anything,
    NaN too -> sums (B, H, n_clusters, F) fp32 and counts (B, H, n_clusters) int32 of each cluster's members."""
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    numbers = op.Range(zero, op.Constant(value_int=n_clusters), one)
    is_member = op.Equal(op.Unsqueeze(op.Cast(clusters, to=INT64), [2]), op.Unsqueeze(numbers, [1]))  # [B, H, C, N]
    member = op.Cast(is_member, to=FLOAT)
    has_cluster = op.Unsqueeze(op.GreaterOrEqual(op.Cast(clusters, to=INT64), zero), [3])
    rows = op.Where(has_cluster, op.Cast(x, to=FLOAT), op.Constant(value_float=0.0))
    sums = op.MatMul(member, rows)
    counts = op.Cast(op.ReduceSum(member, [3], keepdims=0), to=INT32)
    return sums, counts


@script(DOMAIN, default_opset=op)
def HeadRows(x):
    """x (B, H, N, F) -> table (B * H * N + 1, F), first (B, H, 1) int64, none (1,) int64: all rows, one head after the
    other, and last a row of zeros; which is the first of each head; and which is the one of zeros."""
    lead = op.Shape(x, start=0, end=2)
    n = op.Shape(x, start=2, end=3)
    width = op.Shape(x, start=3, end=4)
    heads = op.Shape(x, start=0, end=1) * op.Shape(x, start=1, end=2)
    nothing = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), op.Concat([1], width, axis=0))
    table = op.Concat(op.Reshape(x, op.Concat(heads * n, width, axis=0)), nothing, axis=0)
    head = op.Range(op.Constant(value_int=0), op.Squeeze(heads), op.Constant(value_int=1))
    first = op.Reshape(head * n, op.Concat(lead, [1], axis=0))
    return table, first, heads * n


@script(DOMAIN, default_opset=op)
def ClusterBroadcast(values, clusters):
    """values (B, H, C, F) fp32 or fp16, clusters (B, H, N) int32, 0 to C - 1, or -1 -> out (B, H, N, F) in values'
    type: the row of its cluster for each row, and 0 for rows of none."""
    table, first, none = HeadRows(values)
    number = op.Cast(clusters, to=INT64)
    return op.Gather(table, op.Where(op.Less(number, op.Constant(value_int=0)), none, number + first), axis=0)


OP = ExportedOp(functions=(ClusterSums, ClusterBroadcast, HeadRows))
