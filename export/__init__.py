"""A model with methods of this package, taken to one .onnx file and compared there."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.export.compare import CheckReport, check
    from fastattn.export.convert import to_onnx
    from fastattn.export.inspect_file import FileReport, inspect
    from fastattn.export.ort.session import custom_ops_library, session

__all__ = ["CheckReport", "FileReport", "check", "custom_ops_library", "inspect", "session", "to_onnx"]

# Imported at first use: onnx and onnxscript are an extra, and slow to import.
_LAZY = {"to_onnx": "convert", "check": "compare", "CheckReport": "compare", "inspect": "inspect_file"}
_LAZY |= {"FileReport": "inspect_file", "custom_ops_library": "ort.session", "session": "ort.session"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastattn.export' has no attribute {name!r}")
    value = getattr(import_module(f"fastattn.export.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
