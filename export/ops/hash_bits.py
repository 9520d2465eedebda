"""``fastattn::HashBits`` in standard ops: on which side of each plane a row lies, as the bits of an integer."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.node import ExportedOp

PLACES = [2**bit for bit in range(63)]
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def HashBits(x, planes):
    """x (B, H, N, D) T, planes (n_bits, D + 1) fp32, n_bits from 1 to 63 -> codes (B, H, N) int64.

    Bit b of a code is [x . planes[b, :D] > planes[b, D]], in fp32; NaN lies above no threshold."""
    dim = op.Shape(x, start=3, end=4)
    n_bits = op.Shape(planes, start=0, end=1)
    normals = op.Slice(planes, [0], dim, [1])  # [n_bits, D]
    thresholds = op.Squeeze(op.Slice(planes, dim, dim + 1, [1]), [1])
    side = op.MatMul(op.Cast(x, to=TensorProto.FLOAT), op.Transpose(normals, perm=[1, 0]))  # [B, H, N, n_bits]
    places = op.Slice(op.Constant(value_ints=PLACES), [0], n_bits, [0])
    # a product, for ONNX Runtime's ReduceSum of int64 keeps 53 bits
    return op.MatMul(op.Cast(op.Greater(side, thresholds), to=TensorProto.INT64), places)


OP = ExportedOp(functions=(HashBits,))
