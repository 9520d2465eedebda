"""How our nodes take a mask: a boolean one, (batch, length), or one value for all rows, (1, 1)."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper
from onnxscript import opset18 as op


def or_all(mask: Any) -> Any:
    """``mask``, or, in a translation, the constant that means "all take part" where it is None."""
    if mask is not None:
        return mask
    return op.Constant(value=helper.make_tensor("all", TensorProto.BOOL, [1, 1], [True]))
