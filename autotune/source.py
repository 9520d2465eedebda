"""Kernels by name, and a hash of what they are made of: timings of another source are timings of another kernel."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from functools import cache
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

# Files of fastattn.kernels that hold tunable kernels. Names of kernels start with the name of their file.
ROOMS = (
    "block_attention",
    "hash_argmax",
    "smyrf_hash",
    "hamming",
    "cluster_attention",
    "topk_attention",
    "centroid_attention",
    "linear_attention",
    "linear_attention_step",
)


def kernel_named(name: str) -> Any:
    """The ``triton.jit`` function called ``name`` in a ``KERNELS`` table; imports its file, and Triton with it."""
    for room in ROOMS:
        if name.startswith(room):
            kernels = import_module(f"fastattn.kernels.{room}").KERNELS
            if name in kernels:
                return kernels[name]
    raise ValueError(f"kernel must be the name of a tunable kernel (in {', '.join(ROOMS)}), got {name!r}")


@cache
def source_hash(name: str) -> str:
    """:func:`hash_of` the kernel called ``name``."""
    return hash_of(kernel_named(name))


def hash_of(kernel: Any) -> str:
    """Hash of a kernel's source and of every jit helper and constant that it reaches (16 hex digits).

    Comments, docstrings and layout do not count, and neither does the place in the file: such edits keep timings.
    """
    parts: dict[str, str] = {}
    _collect(kernel, parts)
    return hashlib.sha256("\n".join(f"{key}: {parts[key]}" for key in sorted(parts)).encode()).hexdigest()[:16]


def _collect(kernel: Any, parts: dict[str, str]) -> None:
    function: FunctionType = kernel.fn
    label = f"{function.__module__}.{function.__qualname__}"
    if label in parts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    if ast.get_docstring(body, clean=False) is not None:
        body.body = body.body[1:] or [ast.Pass()]
    parts[label] = ast.unparse(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            _collect_value(ast.unparse(node), _resolve(node, function.__globals__), parts)


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """The global that ``name`` or ``module.name`` stands for; None for everything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _resolve(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
    return None


def _collect_value(name: str, value: Any, parts: dict[str, str]) -> None:
    if isinstance(getattr(value, "fn", None), FunctionType):
        # Triton's own library (tl.sum, tl.max, ...) comes with Triton, whose version is part of every key
        if not value.fn.__module__.startswith("triton."):
            _collect(value, parts)
        return
    value = getattr(value, "value", value)  # a tl.constexpr
    if isinstance(value, bool | int | float | str):
        parts[name] = repr(value)
