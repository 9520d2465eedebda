"""What a file says of its nodes of ours: one object a node, in its metadata as JSON."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from fastattn.export.ops import domain

VERSION, NODES = "fastattn.version", "fastattn.nodes"  # keys of the file's metadata
_SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's, on each node: the modules around the call, outermost first
_DTYPES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16"}


def ours(graph: ir.Graph) -> list[ir.Node]:
    """Calls of our methods, in subgraphs too; not what the bodies of our functions call."""
    return [node for node in graph.all_nodes() if node.domain == domain.NAME]


def describe(model: ir.Model, settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each node of ours: name, module (where the model calls it, if known), op, head_dim, value_dim, heads, kv_heads,
    dtype, and ``settings`` (op and every attribute). A size that is free, or not known, is None."""
    return [{**_described(model, node), **more} for node, more in zip(ours(model.graph), settings, strict=True)]


def _described(model: ir.Model, node: ir.Node) -> dict[str, Any]:
    function = model.functions.get((domain.NAME, node.op_type, ""))
    names = [value.name for value in function.inputs] if function is not None else []
    given = dict(zip(names, node.inputs, strict=False))
    q, k, v = given.get("q", given.get("qk")), given.get("k", given.get("qk")), given.get("v")
    return {
        "name": node.name,
        "module": _module(node),
        "head_dim": _size(q, -1),
        "value_dim": _size(v, -1),
        "heads": _size(q, 1),
        "kv_heads": _size(k, 1),
        "dtype": None if q is None or q.dtype is None else _DTYPES.get(q.dtype, q.dtype.name.lower()),
    }


def _size(value: ir.Value | None, axis: int) -> int | None:
    if value is None or value.shape is None:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _module(node: ir.Node) -> str | None:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))  # the last is the call itself
    return scopes[-2] if len(scopes) > 1 else None
