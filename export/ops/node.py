"""What a file of this folder makes of an op: nodes, their bodies, and the torch op that becomes such a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import opset18
from onnxscript.values import Op

from fastattn.export.ops import domain

INT = OpSchema.AttrType.INT
INTS = OpSchema.AttrType.INTS
FLOAT = OpSchema.AttrType.FLOAT

_FLOATS = ["tensor(float)", "tensor(float16)"]


class NotExportable(ValueError):
    """A call of our op that no node of ours stands for."""


@dataclass(frozen=True)
class ExportedOp:
    """functions: the bodies that stand in this file; those that they call stand in their own. translations: torch op ->
    function that emits our node, for torch.onnx.export. settings: what a node is set to besides its attributes."""

    functions: tuple[Any, ...]
    translations: Mapping[Callable[..., Any], Callable[..., Any]] = field(default_factory=dict)
    settings: Callable[[ir.Node], dict[str, Any]] = lambda node: {}


def node(name: str, inputs: str, outputs: str, attributes: Mapping[str, OpSchema.AttrType]) -> Op:
    """A bare node, to be called in a translation: the exporter would write a function used there out into its parts.

    inputs, outputs: names, each with ":float", ":int32", ":int64" or ":bool" after it where its type is not that of all
        others, fp32 or fp16, and with "?" where it may be absent: "q k v key_mask?:bool".
    """
    schema = OpSchema(
        name,
        domain.NAME,
        domain.VERSION,
        inputs=[_parameter(word) for word in inputs.split()],
        outputs=[_parameter(word) for word in outputs.split()],
        type_constraints=[("T", _FLOATS, "")],
        attributes=[OpSchema.Attribute(word, kind, "", required=True) for word, kind in attributes.items()],
    )
    return Op(domain.DOMAIN, name, schema)


def _parameter(word: str) -> OpSchema.FormalParameter:
    name, _, kind = word.partition(":")
    options = OpSchema.FormalParameterOption
    option = options.Optional if name.endswith("?") else options.Single
    return OpSchema.FormalParameter(name.rstrip("?"), f"tensor({kind})" if kind else "T", param_option=option)


def as_fp32(value: Any) -> Any:
    """A draw as our nodes take it: in fp32, also in a model in fp16."""
    return value if value.dtype == ir.DataType.FLOAT else opset18.Cast(value, to=TensorProto.FLOAT)


def shape_of(value: ir.Value | None) -> ir.Shape | None:
    """The shape of a draw, which :func:`as_fp32` may have cast."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return None if value is None else value.shape
