"""``fastattn::LinearAttentionStep`` in standard ops: one token of causal linear attention."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops import node as nodes
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.linear_attention import Features
from fastattn.export.ops.node import INT, ExportedOp, node
from fastattn.ops import linear_attention_step as _defines_the_torch_op  # noqa: F401
from fastattn.ops.linear_attention import FEATURE_MAPS

FLOAT = TensorProto.FLOAT
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def LinearAttentionStep(q, k, v, s, z, feature_map: int, eps: float):
    """q (B, H, 1, F) and k (B, Hkv, 1, F) of one type, v (B, Hkv, 1, Dv), each fp32 or fp16, s (B, H, F, Dv) and z
    (B, H, F) fp32 -> out (B, H, 1, Dv) in v's type, new_s and new_z as s and z.

    new_s = s + phi(k) v^T, new_z = z + phi(k), out = phi(q) new_s / (phi(q) . new_z + eps), 0 where that is divided by
    0. feature_map, the phi: 0 elu(x) + 1, 1 relu(x), 2 relu(x)^2, 3 x."""
    zero = op.Constant(value_float=0.0)
    lead = op.Shape(q, start=0, end=2)
    group = op.Shape(q, start=1, end=2) / op.Shape(k, start=1, end=2)
    grouped = op.Concat(op.Shape(k, start=0, end=2), group, axis=0)  # B, Hkv, G
    x = Features(op.Cast(q, to=FLOAT), feature_map=feature_map)  # [B, H, 1, F]
    y = Features(op.Cast(k, to=FLOAT), feature_map=feature_map)
    y = op.Expand(op.Unsqueeze(y, [2]), op.Concat(grouped, op.Shape(k, start=2), axis=0))
    y = op.Reshape(y, op.Concat(lead, op.Shape(k, start=2), axis=0))  # a key head for each query head
    values = op.Expand(op.Unsqueeze(op.Cast(v, to=FLOAT), [2]), op.Concat(grouped, op.Shape(v, start=2), axis=0))
    values = op.Reshape(values, op.Concat(lead, op.Shape(v, start=2), axis=0))
    new_s = s + op.Transpose(y, perm=[0, 1, 3, 2]) * values
    new_z = z + op.Squeeze(y, [2])
    den = op.MatMul(x, op.Unsqueeze(new_z, [3])) + op.Constant(value_float=eps)
    empty = op.Equal(den, zero)
    out = op.Where(empty, zero, op.MatMul(x, new_s) / op.Where(empty, zero + 1.0, den))
    return op.CastLike(out, v), new_s, new_z


_NODE = node(
    "LinearAttentionStep",
    "q k v s:float z:float",
    "out new_s:float new_z:float",
    {"feature_map": INT, "eps": nodes.FLOAT},
)


def _translate(q: Any, k: Any, v: Any, s: Any, z: Any, feature_map: str, eps: float) -> Any:
    return _NODE(q, k, v, s, z, feature_map=FEATURE_MAPS.index(feature_map), eps=eps)


OP = ExportedOp(
    functions=(LinearAttentionStep,),
    translations={torch.ops.fastattn.linear_attention_step.default: _translate},
)
