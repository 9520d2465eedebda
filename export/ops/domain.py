"""The domain of our ops in ONNX, and the opset that their bodies are written in."""

from __future__ import annotations

from onnxscript.values import Opset

NAME = "fastattn"
VERSION = 1
DOMAIN = Opset(NAME, VERSION)

# The bodies use no operator that changed its meaning between these.
OLDEST_OPSET = 18
NEWEST_OPSET = 23


def ir_version(opset: int) -> int:
    """The oldest version of ONNX's format that has ``opset``: what a newer one adds is not used, and an ONNX Runtime
    that has the operators may lack the format (1.17 has opset 20, of format 9, and not format 10)."""
    return {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}[opset]
