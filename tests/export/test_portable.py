"""``portable=True``: nothing of ours is left in the file but what it computes, and a word of what it was."""

from __future__ import annotations

import json

import onnx
import pytest

from fastattn.export import check, to_onnx


@pytest.fixture(scope="module")
def portable_file(bert, make_tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("portable") / "bert.onnx"
    return to_onnx(bert, make_tokens(2, 40, [40, 25]), path, portable=True, metadata={"method": "smyrf"})


def nodes_below(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_below(inner)


def test_nothing_but_standard_ops_is_left(portable_file):
    model = onnx.load(portable_file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in nodes_below(model.graph)} <= {"", "ai.onnx"}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]


def test_it_computes_what_the_model_does(bert, portable_file, make_tokens):
    for sample in (make_tokens(3, 101, [101, 64, 1]), make_tokens(1, 17)):
        report = check(bert, portable_file, sample)
        assert all(error.relative < 1e-5 for error in report.errors), report


def test_it_still_says_what_it_was_made_with(portable_file):
    metadata = {entry.key: entry.value for entry in onnx.load(portable_file).metadata_props}
    assert json.loads(metadata["fastattn.method"]) == "smyrf"
    assert [node["op"] for node in json.loads(metadata["fastattn.nodes"])] == ["SmyrfAttention"] * 2


def test_neither_form_says_where_it_was_made(bert_file, portable_file):
    """The exporter notes on each node which line of which file on this disk called it."""
    for path in (bert_file, portable_file):
        assert b"site-packages" not in path.read_bytes()
