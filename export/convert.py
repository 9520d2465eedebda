"""From a patched model to one .onnx file."""

from __future__ import annotations

import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn.export import outputs

if TYPE_CHECKING:
    import onnx_ir
    from torch.export import ExportedProgram

_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def need_onnx() -> None:
    """Raises ImportError, saying what to install, where the extra is missing."""
    for name in _NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"ONNX export needs {name}: pip install fastattn[onnx]") from error


def to_onnx(
    model: nn.Module,
    sample: Mapping[str, Tensor],
    path: str | Path,
    *,
    opset: int = 18,
    dynamic_shapes: Mapping[str, Any] | None = None,
    external_data: bool | None = None,
    portable: bool = False,
    metadata: Mapping[str, Any] | None = None,
    check: bool = False,
) -> Path:
    """Write ``model``, in evaluation mode, to ``path`` as ONNX; returns the path.

    Each call of a method of this package is one node of domain ``fastattn``, with a function body of standard ops, so
    that the file runs in a plain ONNX Runtime. The random draws are among the weights. The graph takes any batch size
    and length that the model takes. Metadata: ``fastattn.version`` and ``fastattn.nodes`` (JSON: a list with each
    node's op, sizes, dtype and attributes, see :func:`fastattn.export.inspect`).

    model: patched with ``min_length=0`` (a graph does not choose by length), or any module that calls our methods; fp32
        or fp16.
    sample: example inputs by name, with a batch and a length of at least 2 (torch.export takes a size of 1 for a
        constant). The file takes these inputs and no others: give an attention mask if it shall take one.
    opset: version of the standard ops, 18 to 23.
    dynamic_shapes: free sizes as in torch.export.export, by input name; None: "batch" is dimension 0 of every input,
        and "sequence" dimension 1 of those with 2 or 3 dimensions.
    external_data: weights in a file of their own, ``path`` + ".data"; None: only when the model is larger than 2 GB.
    portable: write the bodies out in the place of our nodes. The file then has standard ops alone, for tools that know
        no model-local functions, and no library can take over.
    metadata: more of it, written as JSON under "fastattn." and the name; "method" and "knobs" are what
        ``fastattn export`` writes.
    check: compare with torch on ``sample`` afterwards (see :func:`fastattn.export.check`).

    Raises ImportError without the onnx extra; TypeError, ValueError for bad arguments, for a model in training mode or
    in bf16, and for a graph without one node of ours; RuntimeError if ``check`` fails.
    """
    need_onnx()
    from fastattn.export import functions, nodes
    from fastattn.export.ops import domain

    _check_arguments(model, sample)
    extra = {f"fastattn.{name}": json.dumps(value) for name, value in (metadata or {}).items()}
    if taken := sorted({nodes.VERSION, nodes.NODES} & extra.keys()):
        raise ValueError(f"metadata has {', '.join(taken)}, which is written anyway")
    # torch.onnx trips over the guards that it makes for the strides of a slice
    sample = {name: value.contiguous() for name, value in sample.items()}
    functions.check_opset(opset)
    shapes = dict(dynamic_shapes) if dynamic_shapes is not None else _free_batch_and_length(sample)
    path = Path(path)
    with _quiet():
        program = _traced(model, sample, shapes)
        onnx_program = _translated(program, opset, outputs.names(model, sample))
    graph = onnx_program.model
    settings = functions.attach(graph, opset)
    if not settings:
        raise ValueError(
            f"the graph of {type(model).__name__} has no fastattn node: patch the model first, with min_length=0"
        )
    _name_free_sizes(graph, ("batch", "sequence") if dynamic_shapes is None else ("batch",))
    graph.metadata_props[nodes.VERSION] = fastattn.__version__
    graph.metadata_props[nodes.NODES] = json.dumps(nodes.describe(graph, settings))
    graph.metadata_props.update(extra)
    _forget_this_machine(graph)
    graph.ir_version = domain.ir_version(opset)
    if portable:
        _inline(graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_program.save(path, external_data=external_data)
    if check:
        from fastattn.export.compare import check as compare

        report = compare(model, path, sample)
        if not report.ok:
            raise RuntimeError(f"{path} does not compute what the model does: {report}")
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines of torch's and onnxscript's own making, such as that torchvision is not installed."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_arguments(model: Any, sample: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(sample, Mapping) or not sample:
        raise TypeError(f"sample must be a mapping of input names to tensors, got {type(sample).__name__}")
    for name, value in sample.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"sample[{name!r}] must be a tensor, got {type(value).__name__}")
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    held = (*model.parameters(), *model.buffers(), *sample.values())
    unfit = {value.dtype for value in held if value.is_floating_point()} - {torch.float32, torch.float16}
    if unfit:
        names = ", ".join(sorted(map(str, unfit)))
        raise ValueError(
            f"only models in fp32 and fp16 can be exported; the model or its sample has {names}: "
            "call model.float() or model.half() first"
        )


def _free_batch_and_length(sample: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    shapes: dict[str, dict[int, Any]] = {}
    for name, value in sample.items():
        axes = range(2 if value.ndim in (2, 3) else min(value.ndim, 1))
        if any(value.shape[axis] < 2 for axis in axes):
            raise ValueError(f"sample[{name!r}] has shape {tuple(value.shape)}: batch and length must be at least 2")
        shapes[name] = {axis: torch.export.Dim.DYNAMIC for axis in axes}
    return shapes


def _traced(model: nn.Module, sample: Mapping[str, Tensor], shapes: dict[str, Any]) -> ExportedProgram:
    from torch._dynamo.exc import UserError

    # traced here and not by torch.onnx.export, which would try several ways and bury what a model of ours complains of
    with torch.no_grad():
        try:
            return torch.export.export(model, (), dict(sample), dynamic_shapes=shapes, strict=False)
        except UserError as error:
            free = ", ".join(f"{name}: {sorted(axes)}" for name, axes in shapes.items() if isinstance(axes, dict))
            raise ValueError(
                f"{type(model).__name__} can't be traced with these dimensions free: {free or 'as given'}; "
                f"name those that are with dynamic_shapes=. torch says: {error}"
            ) from error


def _translated(program: ExportedProgram, opset: int, output_names: list[str]) -> torch.onnx.ONNXProgram:
    from fastattn.export import functions
    from fastattn.export.ops.node import NotExportable

    try:
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            output_names=output_names,
            custom_translation_table=functions.translations(),
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, NotExportable):
                raise cause from None  # what is wrong, without torch's pages on how to report a bug
            cause = cause.__cause__
        raise
    assert onnx_program is not None
    return onnx_program


def _name_free_sizes(graph: onnx_ir.Model, axes: Sequence[str]) -> None:
    """Symbols as torch calls them (s31) get the name of the first axis that they are the size of, one symbol a name."""
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        for size, name in zip(value.shape or (), axes, strict=False):
            symbol = "" if isinstance(size, int) else str(size.value)
            if re.fullmatch(r"s\d+", symbol) and symbol not in names and name not in names.values():
                names[symbol] = name
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size.value) in names:
                value.shape[axis] = names[str(size.value)]


def _forget_this_machine(graph: onnx_ir.Model) -> None:
    """Without the exporter's notes on which line of which file on this disk called a node."""
    for node in graph.graph.all_nodes():
        for name in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"):
            node.metadata_props.pop(name, None)


def _inline(graph: onnx_ir.Model) -> None:
    from onnx_ir.passes import common

    from fastattn.export import nodes
    from fastattn.export.ops import domain

    for node in nodes.ours(graph.graph):
        node.metadata_props.clear()  # every node of its body would get a copy: most of the file of a small model
    common.InlinePass()(graph)
    common.RemoveUnusedFunctionsPass()(graph)
    common.RemoveUnusedOpsetsPass()(graph)
    assert not graph.functions and not nodes.ours(graph.graph) and domain.NAME not in graph.opset_imports
