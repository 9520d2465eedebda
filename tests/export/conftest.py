"""ONNX Runtime sessions of single nodes, and a small patched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor

import fastattn
from fastattn.export import functions
from tests.export.element_types import TYPES


@pytest.fixture(scope="session")
def run_node() -> Callable[..., list[Tensor]]:
    """run_node("BlockAttention", inputs, {output: (dtype, rank)}, **attributes) -> outputs of one node, by its body.

    An input that is None is absent. A session serves all shapes of one rank."""
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(
        name: str, inputs: dict[str, Tensor | None], outputs: dict[str, tuple[torch.dtype, int]], **attributes: Any
    ) -> Any:
        names = [n if x is not None else "" for n, x in inputs.items()]
        given = {n: x for n, x in inputs.items() if x is not None}
        types = {n: (x.dtype, x.ndim) for n, x in given.items()}
        key = repr((name, names, types, outputs, attributes))
        if key not in sessions:
            node = helper.make_node(name, names, list(outputs), domain="fastattn", **attributes)
            sessions[key] = session_of(node, types, outputs)
        results = sessions[key].run(None, {n: x.contiguous().numpy() for n, x in given.items()})
        return [torch.from_numpy(np.asarray(result)) for result in results]

    return run


Types = dict[str, tuple[torch.dtype, int]]


def session_of(node: onnx.NodeProto, inputs: Types, outputs: Types) -> onnxruntime.InferenceSession:
    """Of a model of one node and the bodies that it reaches. inputs, outputs: dtypes and ranks by name."""
    graph = helper.make_graph(
        [node],
        node.op_type,
        *(
            [helper.make_tensor_value_info(n, TYPES[dtype], [None] * rank) for n, (dtype, rank) in values.items()]
            for values in (inputs, outputs)
        ),
    )
    model = helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(body) for body in functions.bodies({node.op_type})],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("fastattn", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def tokens(batch: int, length: int, lengths: list[int] | None = None) -> dict[str, Tensor]:
    ids = torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, real in enumerate(lengths or []):
        mask[row, real:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., dict[str, Tensor]]:
    """make_tokens(batch, length, lengths) -> input_ids and attention_mask, row i real up to lengths[i]."""
    return tokens


@pytest.fixture(scope="session")
def bert() -> Any:
    """A tiny random BERT, patched: 2 rounds, clusters of 16."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=99,
        max_position_embeddings=400,
        initializer_range=0.3,  # so large that attention matters
    )
    model = BertModel(config).eval()
    return fastattn.patch(model, "smyrf", n_hashes=2, q_cluster_size=16, min_length=0, impl="reference")


@pytest.fixture(scope="session")
def bert_file(bert, tmp_path_factory):
    """That model as a file."""
    from fastattn.export import to_onnx

    return to_onnx(bert, tokens(2, 40, [40, 25]), tmp_path_factory.mktemp("onnx") / "bert.onnx")
