"""What a model has of our ops: its nodes, and those that the bodies of its nodes call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import AttributeProto, NodeProto, TensorProto, ValueInfoProto, helper

from fastattn.export.nodes import NODES
from fastattn.export.ops import domain
from fastattn.export.ort.needs import DTYPES, OPS, Call

_WITHOUT_DIMS = frozenset({"HammingKmeans", "SortedBlocks"})  # their inputs are hashes
_DTYPES: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}


def calls(path: str | Path) -> list[Call]:
    """The calls of ops of the library that a run of the model makes.

    Raises:
        ValueError: the model has no node of ours, or it was written for a later version of our domain, or it doesn't
            say the size or type of what one gets.
    """
    model = onnx.load(str(path), load_external_data=False)
    # ONNX Runtime takes an op that did not change since version 1 for every later one
    version = max((opset.version for opset in model.opset_import if opset.domain == domain.NAME), default=0)
    if version > domain.VERSION:
        raise ValueError(
            f"{path} is of version {version} of domain {domain.NAME}, and this fastattn knows those up to "
            f"{domain.VERSION}: use a newer one, or run the model without the library, on its bodies"
        )
    functions = {(function.domain, function.name): function for function in model.functions}
    graph = model.graph
    values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    values |= {tensor.name: _of_tensor(tensor) for tensor in graph.initializer}
    noted = _noted(model)
    found = [
        call
        for node in _nodes(graph.node)
        if node.domain == domain.NAME
        for call in _calls(node, functions, _Sizes(node, functions, values, noted.get(node.name, {})))
    ]
    if not found:
        raise ValueError(f"{path} has no node of domain {domain.NAME} that the library could run")
    return found


def _nodes(nodes: Any) -> Iterator[NodeProto]:
    """All nodes, those of subgraphs too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _noted(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """What the export wrote down of its nodes, by name; nothing where it is not there, or not as it was written."""
    text = next((item.value for item in model.metadata_props if item.key == NODES), "[]")
    try:
        return {row["name"]: row for row in json.loads(text)}
    except (ValueError, TypeError, KeyError):
        return {}


class _Sizes:
    """The types and head dims of what a node of the model gets: as the graph has them, or else as they were noted."""

    def __init__(
        self,
        node: NodeProto,
        functions: Mapping[Any, Any],
        values: Mapping[str, ValueInfoProto],
        noted: Mapping[str, Any],
    ) -> None:
        self._noted = noted
        function = functions.get((node.domain, node.op_type))
        names = list(function.input) if function is not None else []
        self._node = node
        self._given = {name: values[value] for name, value in zip(names, node.input, strict=False) if value in values}

    def of(self, *names: str) -> tuple[torch.dtype, int]:
        for name in names:
            if name not in self._given:
                continue
            kind = self._given[name].type.tensor_type
            size = kind.shape.dim[-1].dim_value if kind.shape.dim else 0
            if kind.elem_type in _DTYPES and size > 0:
                return _DTYPES[kind.elem_type], size
        dtype = DTYPES.get(self._noted.get("dtype", ""))
        size = self._noted.get("value_dim" if names[0] == "v" else "head_dim")
        if dtype is not None and isinstance(size, int) and size > 0:
            return dtype, size
        raise ValueError(
            f"the model does not say the type and the last dimension of {self._node.op_type}'s input {names[0]} "
            f"(node {self._node.name or self._node.output[0]}): infer its shapes (onnx.shape_inference) first"
        )


def _calls(
    node: NodeProto, functions: Mapping[Any, Any], sizes: _Sizes, outer: Mapping[str, Any] = {}
) -> Iterator[Call]:
    attributes = dict(outer) | {
        attribute.name: outer.get(attribute.ref_attr_name)
        if attribute.ref_attr_name
        else helper.get_attribute_value(attribute)
        for attribute in node.attribute
        if attribute.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    }
    if node.op_type in _WITHOUT_DIMS:
        yield Call(node.op_type, attributes=attributes)
        return
    if node.op_type in OPS:
        dtype, head_dim = sizes.of("q", "qk", "x")
        value_dtype, value_dim = sizes.of("v", "q", "qk", "x")
        yield Call(node.op_type, dtype, head_dim, value_dim, value_dtype, attributes)
        return
    function = functions.get((node.domain, node.op_type))
    others = {name: other for name, other in functions.items() if other is not function}  # none stands in itself
    for inner in _nodes(function.node) if function is not None else ():
        if inner.domain == domain.NAME:
            yield from _calls(inner, others, sizes, attributes)


def _of_tensor(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
