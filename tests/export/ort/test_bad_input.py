"""What does not fit is an error of ONNX Runtime's that names it; never a crash, and never a wrong answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fastattn.kernels.cpu.build import find_compiler
from tests.export.ort.nodes import Node, library, nodes, smyrf_hash_node
from tests.export.ort.test_ops import sorted_blocks

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
NODES = {node.op: node for node in nodes() if torch.float16 not in node.outputs.values()}
NODES["SmyrfHash"] = smyrf_hash_node(torch.float32, 40, 30)
NODES["SortedBlocks"] = sorted_blocks(torch.zeros(2, 3, 4, 50), torch.ones(2, 50, dtype=torch.bool), 5, 16, 1)


def refused(node: Node) -> str:
    with pytest.raises(Exception, match="fastattn") as error:
        node.run(library())
    return str(error.value)


def with_input(op: str, name: str, change: Any) -> Node:
    node = NODES[op]
    return replace(node, inputs={**node.inputs, name: change(node.inputs[name].clone())})


def with_attribute(op: str, name: str, value: Any) -> Node:
    return replace(NODES[op], attributes={**NODES[op].attributes, name: value})


def put(value: int) -> Any:
    def change(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[-1] = value
        return x

    return change


@pytest.mark.parametrize(
    "op, name, value, message",
    [
        ("BlockAttention", "q_index", 133, "q_index must hold numbers from -1 to 132"),
        ("BlockAttention", "k_index", -2, "k_index must hold numbers from -1 to 132"),
        ("BlockAttentionWithOptions", "n_used_blocks", 6, "n_used_blocks must hold numbers from 1 to 5"),
        ("BlockAttentionWithOptions", "n_used_blocks", 0, "n_used_blocks must hold numbers from 1 to 5"),
        ("ClusterSums", "clusters", 7, "clusters must hold numbers from -1 to 6"),
        ("TopkAttention", "clusters", 2**31 - 1, "clusters must hold numbers from -1 to 6"),
        ("TopkAttention", "topk_index", 1500, "topk_index must hold numbers from -1 to 1499"),
    ],
)
def test_rows_out_of_range_are_refused_before_they_are_followed(op: str, name: str, value: int, message: str) -> None:
    assert message in refused(with_input(op, name, put(value)))


@pytest.mark.parametrize(
    "op, name, message",
    [
        ("BlockAttention", "q", "q must have shape (any, any, any, any), got (4, 133, 20)"),
        ("BlockAttention", "k", "k must have shape (2, any, any, 20), got (2, 133, 20)"),
        ("LinearAttention", "v", "v must have shape (2, 2, 133, any), got (2, 133, 12)"),
        ("SmyrfHash", "projections", "projections must have shape (22, any), got (5)"),
        ("SortedBlocks", "n_blocks", "n_blocks must have shape (1), got ()"),
        ("HammingKmeans", "codes", "codes must have shape (any, any, any), got (4, 1500)"),
    ],
)
def test_a_wrong_rank_is_refused_by_name(op: str, name: str, message: str) -> None:
    assert message in refused(with_input(op, name, lambda x: x[0]))


@pytest.mark.parametrize("op", [op for op, node in NODES.items() if "k" in node.inputs])
def test_key_heads_that_do_not_divide_the_query_heads_are_refused(op: str) -> None:
    node = NODES[op]
    inputs = {n: torch.cat([x, x[:, :1]], 1) if n in ("k", "v") else x for n, x in node.inputs.items()}
    assert "q must have a multiple of k's 3 heads, got 4" in refused(replace(node, inputs=inputs))


@pytest.mark.parametrize(
    "op, name, value, message",
    [
        ("BlockAttention", "scale", float("nan"), "scale must be finite"),
        ("BlockAttentionWithOptions", "look_back", -1, "look_back must be at least 0, got -1"),
        ("BlockAttentionWithOptions", "look_back", 2**62, "more blocks of a window than can be counted"),
        ("BlockAttentionWithOptions", "self_mode", 4, "self_mode must be at most 3"),
        ("BlockAttentionWithOptions", "wrap", 2, "wrap must be 0 or 1, got 2"),
        ("ClusterSums", "n_clusters", 0, "n_clusters must be at least 1, got 0"),
        ("CentroidAttention", "top_k", -5, "top_k must be at least 0, got -5"),
        ("HammingKmeans", "n_bits", 64, "codes must have 1 to 63 bits, got 64"),
        ("HashArgmax", "factors", [3, 4], "factors must be even and positive, got 3"),
        ("HashArgmax", "factors", [2**30, 2**30], "more buckets than can be counted"),
        ("LinearAttention", "feature_map", 4, "feature_map must be at most 3, got 4"),
        ("SortedBlocks", "packed", -1, "packed must be at least 0, got -1"),
    ],
)
def test_a_wild_attribute_is_refused_by_name(op: str, name: str, value: Any, message: str) -> None:
    assert message in refused(with_attribute(op, name, value))


def test_a_missing_attribute_is_named() -> None:
    assert "attribute scale is missing" in refused(replace(NODES["BlockAttention"], attributes={}))


@pytest.mark.parametrize("name, value", [("n_blocks", 2**61), ("block_size", -(2**63)), ("block_size", 2**40)])
def test_blocks_that_no_memory_holds_are_refused(name: str, value: int) -> None:
    with pytest.raises(Exception, match="SortedBlocks"):
        with_input("SortedBlocks", name, put(value)).run(library())


def test_a_kernel_that_was_not_compiled_is_named_with_what_builds_it() -> None:
    node = NODES["BlockAttention"]
    narrow = {n: x[..., :16] if n in ("q", "k") else x for n, x in node.inputs.items()}
    message = refused(replace(node, inputs=narrow))
    assert "this library has no block_attention_forward(" in message and "HEAD_DIM=16, VALUE_DIM=12" in message
    assert "fastattn.export.session" in message and "fastattn build --ort" in message


@pytest.mark.parametrize("op", ["BlockAttention", "LinearAttention", "HashArgmax", "SmyrfHash", "SortedBlocks"])
def test_an_empty_batch_has_empty_results(op: str) -> None:
    node = NODES[op]
    inputs = {n: x if n in ("projections", "rotations", "n_blocks", "block_size", "initial") else x[:0]
              for n, x in node.inputs.items()}  # fmt: skip
    assert all(len(x) == 0 for x in replace(node, inputs=inputs).run(library()))


def test_rows_in_no_block_have_nothing() -> None:
    out, lse = with_input("BlockAttention", "q_index", lambda x: x.fill_(-1)).run(library())
    assert not out.any() and (lse == -torch.inf).all()
