"""From torch ops of ours to ONNX nodes of ours, and the functions that give these a body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from onnx.defs import OpSchema
from onnxscript import opset18 as op
from onnxscript.values import Op

from fastattn.export.ops import domain
from fastattn.export.ops.smyrf_attention import FUNCTIONS
from fastattn.methods import smyrf as _defines_the_torch_op  # noqa: F401

_FLOATS = ["tensor(float)"]


class NotExportable(ValueError):
    """A call of our op that no node of ours stands for."""


def _node(name: str, inputs: str, masks: str, outputs: str, attributes: dict[str, OpSchema.AttrType]) -> Op:
    """A bare node: the exporter would write a function used here out into its parts."""
    schema = OpSchema(
        name,
        domain.NAME,
        domain.VERSION,
        inputs=[
            *(OpSchema.FormalParameter(word, "T") for word in inputs.split()),
            *(OpSchema.FormalParameter(word, "tensor(bool)") for word in masks.split()),
        ],
        outputs=[OpSchema.FormalParameter(word, "T") for word in outputs.split()],
        type_constraints=[("T", _FLOATS, "")],
        attributes=[OpSchema.Attribute(word, kind, "", required=True) for word, kind in attributes.items()],
    )
    return Op(domain.DOMAIN, name, schema)


_SMYRF = _node(
    "SmyrfAttention",
    "q k v projections",
    "key_mask query_mask",
    "out lse",
    {
        "q_cluster_size": OpSchema.AttrType.INT,
        "k_cluster_size": OpSchema.AttrType.INT,
        "scale": OpSchema.AttrType.FLOAT,
        "packed": OpSchema.AttrType.INT,
    },
)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """torch op -> function that emits our node, for torch.onnx.export."""
    return {torch.ops.fastattn.smyrf_attention.default: _smyrf}


def _smyrf(
    q: Any,
    k: Any,
    v: Any,
    projections: Any = None,
    key_mask: Any = None,
    query_mask: Any = None,
    q_cluster_size: int = 64,
    k_cluster_size: int | None = None,
    scale: float = 1.0,
    n_hashes: int = 1,
    is_causal: bool = False,
    correct_duplicates: bool = False,
    local_window: int = 0,
) -> Any:
    unknown = {
        "is_causal=True": is_causal,
        "correct_duplicates=True": correct_duplicates,
        f"local_window={local_window}": local_window > 0,
        "directions='principal'": projections is None,
    }
    if named := ", ".join(name for name, is_set in unknown.items() if is_set):
        raise NotExportable(f"smyrf_attention can't be exported to ONNX with {named}: the node knows none of these")
    same_length = q.shape[2] == k.shape[2]
    if query_mask is None and not same_length and not all(isinstance(x.shape[2], int) for x in (q, k)):
        raise NotExportable(
            f"can't tell at export whether {q.shape[2]} queries and {k.shape[2]} keys are the same tokens: "
            "give a query_mask"
        )
    self_like = query_mask is None and same_length
    all_alike = op.Constant(value=helper.make_tensor("all", TensorProto.BOOL, [1, 1], [True]))
    key_mask = all_alike if key_mask is None else key_mask
    query_mask = query_mask if query_mask is not None else key_mask if self_like else all_alike
    return _SMYRF(
        q,
        k,
        v,
        projections,
        key_mask,
        query_mask,
        q_cluster_size=q_cluster_size,
        k_cluster_size=k_cluster_size or 0,
        scale=scale,
        packed=int(self_like and k_cluster_size in (None, q_cluster_size)),
    )


def check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int) or not domain.OLDEST_OPSET <= opset <= domain.NEWEST_OPSET:
        raise ValueError(f"opset must be an int from {domain.OLDEST_OPSET} to {domain.NEWEST_OPSET}, got {opset!r}")


def attach(model: ir.Model, opset: int) -> list[dict[str, Any]]:
    """Adds the bodies of our ops to ``model``, if it has nodes of ours; returns what these are set to, node by node."""
    nodes = [node for node in model.graph.all_nodes() if node.domain == domain.NAME]
    if nodes:
        model.opset_imports[domain.NAME] = domain.VERSION
        for function in FUNCTIONS:
            body = ir.serde.deserialize_function(function.to_function_proto())
            body.opset_imports[""] = opset
            model.functions[body.identifier()] = body
    return [_settings(node) for node in nodes]


def _settings(node: ir.Node) -> dict[str, Any]:
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    projections = node.inputs[3]
    rounds = None if projections is None or projections.shape is None else projections.shape[1]
    return {"op": node.op_type, "n_hashes": rounds, **settings}
