"""``fastattn::stable_argsort`` of torch is a standard op in ONNX; no node of ours stands for it."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18

from fastattn.export.ops.node import ExportedOp
from fastattn.ops import argsort as _defines_the_torch_op  # noqa: F401

op: Any = opset18  # its types are ONNX's


def _translate(keys: Any) -> Any:
    wide = op.Cast(keys, to=TensorProto.FLOAT)  # the other keys are int16, which TopK does not take
    _sorted, order = op.TopK(wide, op.Shape(keys, start=-1), axis=-1, largest=0, sorted=1)
    return op.Cast(order, to=TensorProto.INT32)


OP = ExportedOp(functions=(), translations={torch.ops.fastattn.stable_argsort.default: _translate})
