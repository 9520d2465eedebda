"""``fastattn::HashArgmax`` in standard ops: the buckets of Reformer's hash.

x (B, H, N, D) T (fp32 or fp16), rotations (H or 1, D, R, W) fp32, attribute factors (ints) -> buckets (B, H, R, N)
int32: of each row and round the place of the largest of [x R, -x R], the first where several are. Each of the factors
f0, f1, ... has its own f / 2 of the W columns, and the bucket is b0 + f0 * b1 + f0 * f1 * b2 + ... Products are fp32.
"""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from collections.abc import Sequence
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import INTS, ExportedOp, as_fp32, node
from fastattn.ops import hash_argmax as _defines_the_torch_op  # noqa: F401

op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def HashArgmax(x, rotations, factors: Sequence[int]):
    """Inputs, attributes and outputs: at the top of this file."""
    turned = op.Transpose(rotations, perm=[0, 2, 1, 3])  # [H or 1, R, D, W]
    rotated = op.MatMul(op.Unsqueeze(op.Cast(x, to=TensorProto.FLOAT), [2]), turned)  # [B, H, R, N, W]
    sizes = op.Constant(value_ints=factors)
    nought = op.Constant(value_ints=[0])
    first = nought
    weight = op.Constant(value_ints=[1])
    buckets = op.Expand(nought, op.Shape(rotated, start=0, end=4))
    n_factors = op.Size(sizes)
    for digit in range(n_factors):
        factor = op.Gather(sizes, op.Reshape(digit, [1]))
        part = op.Slice(rotated, first, first + factor / 2, [4])
        largest = op.ArgMax(op.Concat(part, op.Neg(part), axis=4), axis=4, keepdims=0, select_last_index=0)
        buckets = buckets + weight * largest
        weight = weight * factor
        first = first + factor / 2
    return op.Cast(buckets, to=TensorProto.INT32)


_NODE = node("HashArgmax", "x rotations:float", "buckets:int32", {"factors": INTS})


def _translate(x: Any, rotations: Any, factors: Sequence[int] = (2,), fallback: bool = True) -> Any:
    return _NODE(x, as_fp32(rotations), factors=list(factors))


OP = ExportedOp(functions=(HashArgmax,), translations={torch.ops.fastattn.hash_argmax.default: _translate})
