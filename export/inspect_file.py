"""What is in an .onnx file of ours, and what of it kernels would run here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.export.convert import need_onnx

if TYPE_CHECKING:
    import onnx

DOMAIN = "fastattn"
# of what a node says about itself, all but its settings
_SIZES = ("name", "module", "op", "head_dim", "value_dim", "heads", "kv_heads", "dtype")


@dataclass(frozen=True)
class NodeReport:
    """name: of the node. module: the model's that calls it. op, head_dim, value_dim, heads, kv_heads, dtype: None where
    the file doesn't say. settings: its attributes. form: "function", a node with a body of standard ops; "inlined",
    that body in the node's place; "bare", a node without a body, which runs with the library alone. fused: the ops of
    it, itself or what its body calls, that the library's kernels would run on this machine."""

    name: str
    op: str
    module: str | None
    head_dim: int | None
    value_dim: int | None
    heads: int | None
    kv_heads: int | None
    dtype: str | None
    settings: dict[str, Any]
    form: str
    fused: tuple[str, ...]


@dataclass(frozen=True)
class FileReport:
    """version: of fastattn, that wrote it. method, knobs: of ``fastattn export``, where that wrote it. opset: of the
    standard ops. functions: ours, whose bodies it holds. bytes: with its weights. weights: bytes of each file beside it
    that holds some, None where that is missing. no_library: why no kernels run here; None if they can be built."""

    path: str
    version: str | None
    method: str | None
    knobs: dict[str, Any] | None
    opset: int
    bytes: int
    weights: dict[str, int | None]
    functions: tuple[str, ...]
    no_library: str | None
    nodes: tuple[NodeReport, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | Path) -> FileReport:
    """Read the .onnx file at ``path``, not its weights; nothing of it is run, and nothing is built.

    The nodes are those that the file was written with, and whatever other nodes of ours a tool has left in it.

    Raises ImportError without the onnx extra; OSError for a file that can't be read; ValueError for one that is no
    ONNX, or has nothing of ours.
    """
    need_onnx()
    path = Path(path)
    model = _loaded(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    calls = {function.name: _ops_of_ours(function.node) for function in model.functions if function.domain == DOMAIN}
    left = {node.name or node.output[0]: node for node in _all_nodes(model.graph.node) if node.domain == DOMAIN}
    said = {name: {"name": name, "op": node.op_type, **_attributes(node)} for name, node in left.items()}
    said |= {node["name"]: node for node in json.loads(metadata.get("fastattn.nodes", "[]"))}
    if not said:
        raise ValueError(f"{path} has no node of fastattn's, and no word of any")
    no_library = _why_no_library()
    library = _library_ops() if no_library is None else frozenset()
    weights = {name: _size(path.parent / name) for name in sorted(set(_weight_files(model)))}
    return FileReport(
        path=str(path),
        version=metadata.get("fastattn.version"),
        method=json.loads(metadata.get("fastattn.method", "null")),
        knobs=json.loads(metadata.get("fastattn.knobs", "null")),
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        bytes=path.stat().st_size + sum(size or 0 for size in weights.values()),
        weights=weights,
        functions=tuple(sorted(calls)),
        no_library=no_library,
        nodes=tuple(_report(node, set(left), calls, library) for node in said.values()),
    )


def _loaded(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is no ONNX file: {error}") from error


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _all_nodes(graph.node)


def _ops_of_ours(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {node.op_type for node in _all_nodes(nodes) if node.domain == DOMAIN}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _weight_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value for weight in model.graph.initializer for entry in weight.external_data if entry.key == "location"
    }


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.exists() else None


def _why_no_library() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    from fastattn.kernels.cpu.build import find_compiler

    return None if find_compiler() is not None else "there is no C++ compiler"


def _library_ops() -> frozenset[str]:
    from fastattn.export.ort.needs import OPS

    return OPS


def _report(said: dict[str, Any], left: set[str], calls: Mapping[str, set[str]], library: frozenset[str]) -> NodeReport:
    op = said["op"]
    form = "inlined" if said["name"] not in left else "function" if op in calls else "bare"
    settings = {name: value for name, value in said.items() if name not in _SIZES}
    sizes: dict[str, Any] = {name: said.get(name) for name in _SIZES}
    fused = () if form == "inlined" else tuple(sorted(_fused(op, calls, library)))
    return NodeReport(**sizes, settings=settings, form=form, fused=fused)


def _fused(op: str, calls: Mapping[str, set[str]], library: frozenset[str]) -> set[str]:
    """``op``, if the library has it; otherwise what it has of the ops that the body calls, and their bodies."""
    if op in library:
        return {op}
    return {name for part in calls.get(op, ()) for name in _fused(part, calls, library)}
