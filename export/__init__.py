"""A model with methods of this package, taken to one .onnx file and compared there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.export.compare import CheckReport, check
    from fastattn.export.convert import to_onnx

__all__ = ["CheckReport", "check", "to_onnx"]

# Imported at first use: onnx and onnxscript are an extra, and slow to import.
_LAZY = {"to_onnx": "convert", "check": "compare", "CheckReport": "compare"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastattn.export' has no attribute {name!r}")
    value = getattr(import_module(f"fastattn.export.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
