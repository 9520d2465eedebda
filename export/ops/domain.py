"""The domain of our ops in ONNX, and the opset that their bodies are written in."""

from __future__ import annotations

from onnxscript.values import Opset

NAME = "fastattn"
VERSION = 1
DOMAIN = Opset(NAME, VERSION)

# The bodies use no operator that changed its meaning between these.
OLDEST_OPSET = 18
NEWEST_OPSET = 23
