"""``fastattn::CentroidAttention`` and ``fastattn::TopkKeys`` in standard ops: a few queries, such as the means of
clusters, attend to all keys; and the keys that each weighs most."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def CentroidLogits(q, k, key_mask, scale: float):
    """q (B, H, C, D), k (B, Hkv, S, D) T, key_mask (B, S) or (1, 1) bool -> (B, H, C, S) fp32: scale * q . k, and -inf
    for keys that the mask does not have, which may hold anything, NaN too."""
    zero = op.Constant(value_float=0.0)
    # the query heads of a key head follow one another: side by side they are one product
    rows_of_group = op.Shape(q, start=1, end=2) / op.Shape(k, start=1, end=2) * op.Shape(q, start=2, end=3)
    grouped = op.Concat(op.Shape(k, start=0, end=2), rows_of_group, op.Shape(q, start=3, end=4), axis=0)
    rows = op.Reshape(op.Cast(q, to=FLOAT), grouped)  # [B, Hkv, H / Hkv * C, D]
    keys = op.Where(op.Unsqueeze(key_mask, [1, 3]), op.Cast(k, to=FLOAT), zero)
    logits = op.MatMul(rows, op.Transpose(keys, perm=[0, 1, 3, 2])) * op.Constant(value_float=scale)
    logits = op.Reshape(logits, op.Concat(op.Shape(q, start=0, end=3), op.Shape(k, start=2, end=3), axis=0))
    return op.Where(op.Unsqueeze(key_mask, [1, 2]), logits, op.Constant(value_float=float("-inf")))


@script(DOMAIN, default_opset=op)
def Largest(logits, top_k: int):
    """logits (B, H, C, S) fp32 -> (B, H, C, min(top_k, S)) int32: where the largest stand, largest first, of equals
    the first; -1 for -inf."""
    wanted = op.Min(op.Reshape(op.Constant(value_int=top_k), [1]), op.Shape(logits, start=3, end=4))
    best, index = op.TopK(logits, wanted, axis=3, largest=1, sorted=1)
    return op.Cast(op.Where(op.IsInf(best, detect_positive=0), op.Constant(value_int=-1), index), to=INT32)


@script(DOMAIN, default_opset=op)
def TopkKeys(q, k, key_mask, top_k: int, scale: float):
    """topk_index of CentroidAttention alone."""
    return Largest(CentroidLogits(q, k, key_mask, scale=scale), top_k=top_k)


@script(DOMAIN, default_opset=op)
def CentroidAttention(q, k, v, key_mask, top_k: int, scale: float):
    """q (B, H, C, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) T, key_mask (B, S) bool or (1, 1) for "all" -> out
    (B, H, C, Dv) and lse (B, H, C) fp32, topk_index (B, H, C, min(top_k, S)) int32.

    The softmax is over scale * q . k of the keys that the mask has; where there is none, out is 0 and lse -inf. What
    masked keys and values hold, NaN too, has no effect. topk_index: the keys of the largest logits, -1 where fewer keys
    take part. Here the largest come first, and of equal ones the first key; a kernel may order them as it likes."""
    zero = op.Constant(value_float=0.0)
    logits = CentroidLogits(q, k, key_mask, scale=scale)
    index = Largest(logits, top_k=top_k)
    top = op.ReduceMax(logits, [3], keepdims=1)
    top = op.Where(op.IsInf(top), zero, top)  # no key: exp(-inf - 0) is 0, where -inf - -inf is NaN
    weights = op.Exp(logits - top)
    total = op.ReduceSum(weights, [3], keepdims=1)  # [B, H, C, 1]
    lse = op.Squeeze(top + op.Log(total), [3])

    values = op.Where(op.Unsqueeze(key_mask, [1, 3]), op.Cast(v, to=FLOAT), zero)
    rows_of_group = op.Shape(q, start=1, end=2) / op.Shape(k, start=1, end=2) * op.Shape(q, start=2, end=3)
    grouped = op.Concat(op.Shape(k, start=0, end=2), rows_of_group, op.Shape(k, start=2, end=3), axis=0)
    sums = op.MatMul(op.Reshape(weights, grouped), values)  # [B, Hkv, H / Hkv * C, Dv]
    sums = op.Reshape(sums, op.Concat(op.Shape(q, start=0, end=3), op.Shape(v, start=3, end=4), axis=0))
    out = sums / op.Where(total > zero, total, zero + 1.0)
    return out, lse, index


OP = ExportedOp(functions=(CentroidAttention, TopkKeys, CentroidLogits, Largest))
