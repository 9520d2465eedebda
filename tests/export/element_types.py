"""torch's element types as ONNX calls them."""

from __future__ import annotations

import torch
from onnx import TensorProto

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bool: TensorProto.BOOL,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
