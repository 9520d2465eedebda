"""From torch ops of ours to ONNX nodes of ours, and the functions that give these a body."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import onnx_ir as ir

from fastattn.export.ops import domain

# one file an op: its functions, what becomes such a node, and how
_FILES = (
    "block_attention",
    "block_attention_with_options",
    "block_softmax",
    "centroid_attention",
    "cluster_attention",
    "clustered_attention",
    "hamming_kmeans",
    "hash_argmax",
    "hash_bits",
    "improved_clustered_attention",
    "linear_attention",
    "linear_attention_step",
    "local_blocks",
    "lsh_attention",
    "smyrf_attention",
    "smyrf_hash",
    "sorted_blocks",
    "stable_argsort",
    "topk_attention",
)
_OPS = tuple(import_module(f"fastattn.export.ops.{name}").OP for name in _FILES)
FUNCTIONS = {function.name: function for op in _OPS for function in op.functions}
_SETTINGS = {function.name: op.settings for op in _OPS for function in op.functions}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch op -> function that emits our node, for torch.onnx.export."""
    return {torch_op: emit for op in _OPS for torch_op, emit in op.translations.items()}


def check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int) or not domain.OLDEST_OPSET <= opset <= domain.NEWEST_OPSET:
        raise ValueError(f"opset must be an int from {domain.OLDEST_OPSET} to {domain.NEWEST_OPSET}, got {opset!r}")


def attach(model: ir.Model, opset: int) -> list[dict[str, Any]]:
    """Adds the bodies that ``model``'s nodes of ours reach; returns what these nodes are set to, one by one."""
    nodes = [node for node in model.graph.all_nodes() if node.domain == domain.NAME]
    if nodes:
        model.opset_imports[domain.NAME] = domain.VERSION
        for body in bodies({node.op_type for node in nodes}, opset):
            model.functions[body.identifier()] = body
    return [_settings(node) for node in nodes]


def bodies(names: set[str], opset: int = domain.OLDEST_OPSET) -> list[ir.Function]:
    """The functions of these names and all that they call."""
    found: dict[str, ir.Function] = {}
    missing = sorted(names)
    while missing:
        name = missing.pop()
        found[name] = body = ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        # onnxscript looks for neither in the bodies of loops
        body.opset_imports.update({"": opset, domain.NAME: domain.VERSION})
        called = {node.op_type for node in body.all_nodes() if node.domain == domain.NAME}
        missing += sorted(called - found.keys() - set(missing))
    return list(found.values())


def _settings(node: ir.Node) -> dict[str, Any]:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return {"op": node.op_type, **_SETTINGS[node.op_type](node), **attributes}
