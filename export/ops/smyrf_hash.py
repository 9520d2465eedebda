"""``fastattn::SmyrfHash`` in standard ops: the sphere transforms of queries and keys on directions."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import ExportedOp, NotExportable, as_fp32, node
from fastattn.ops import smyrf_hash as _defines_the_torch_op  # noqa: F401

FP32 = TensorProto.FLOAT
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def SmyrfHash(q, k, projections, query_mask, key_mask):
    """q (B, H, N, D), k (B, Hkv, S, D) T, projections (D + 2, R) fp32, query_mask (B, N) and key_mask (B, S) bool ->
    q_hash (B, H, R, N), k_hash (B, H, R, S) fp32: the sphere transforms on the R directions."""
    q = op.Cast(q, to=FP32)
    k = op.Cast(k, to=FP32)
    zero = op.Constant(value_float=0.0)
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


_NODE = node(
    "SmyrfHash", "q k projections:float query_mask:bool key_mask:bool", "q_hash:float k_hash:float", {}
)  # fmt: skip


def _translate(
    q: Any, k: Any, projections: Any, query_mask: Any = None, key_mask: Any = None, fallback: bool = True
) -> Any:
    if len(projections.shape) > 2:
        raise NotExportable("smyrf_hash can't be exported to ONNX with projections for each head: the node has one set")
    keep = [_every_row(mask, x) for mask, x in ((query_mask, q), (key_mask, k))]
    return _NODE(q, k, as_fp32(projections), *keep)


def _every_row(mask: Any, x: Any) -> Any:
    """``mask``, or True for each row of x, as (B, N)."""
    return op.Expand(or_all(mask), op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3), axis=0))


OP = ExportedOp(functions=(SmyrfHash,), translations={torch.ops.fastattn.smyrf_hash.default: _translate})
