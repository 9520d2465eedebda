"""``inspect`` says what is in a file, from the file alone."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fastattn
from fastattn.export import inspect, inspect_file


def test_a_file_tells_its_nodes_and_their_settings(bert_file):
    report = inspect(bert_file)
    assert (report.version, report.opset, report.weights) == (fastattn.__version__, 18, {})
    assert report.bytes == bert_file.stat().st_size
    assert {"SmyrfAttention", "BlockAttention"} <= set(report.functions)
    first, second = report.nodes
    assert (first.module, second.module) == ("encoder.layer.0.attention.self", "encoder.layer.1.attention.self")
    assert (first.op, first.heads, first.kv_heads, first.head_dim, first.value_dim) == ("SmyrfAttention", 4, 4, 8, 8)
    assert (first.dtype, first.form) == ("fp32", "function")
    assert (first.settings["n_hashes"], first.settings["q_cluster_size"]) == (2, 16)
    assert first.settings["scale"] == pytest.approx(8**-0.5)
    assert json.loads(json.dumps(report.as_dict()))["nodes"][1]["op"] == "SmyrfAttention"


def test_without_a_compiler_nothing_is_fused(bert_file, monkeypatch):
    monkeypatch.setattr("fastattn.kernels.cpu.build.find_compiler", lambda: None)
    report = inspect(bert_file)
    assert report.no_library == "there is no C++ compiler"
    assert not any(node.fused for node in report.nodes)


def test_the_whole_op_goes_before_its_parts():
    calls = {"Outer": {"Inner", "Standard"}, "Inner": {"Innermost"}, "Standard": set()}
    assert inspect_file._fused("Outer", calls, frozenset({"Outer", "Inner"})) == {"Outer"}
    assert inspect_file._fused("Outer", calls, frozenset({"Innermost"})) == {"Innermost"}
    assert inspect_file._fused("Outer", calls, frozenset()) == set()


def small_file(path, domain, metadata=()):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    node = helper.make_node("Something", ["x"], ["y"], "a node", domain=domain, size=3)
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("fastattn", 1)])
    helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
    return path


def test_a_node_that_the_metadata_has_not_is_told_all_the_same(tmp_path):
    """As where another tool dropped the metadata, or left a node without its body."""
    (node,) = inspect(small_file(tmp_path / "model.onnx", "fastattn")).nodes
    assert (node.name, node.op, node.form, node.settings) == ("a node", "Something", "bare", {"size": 3})
    assert (node.head_dim, node.dtype, node.fused) == (None, None, ())


def test_weights_in_files_of_their_own_are_counted_and_missed(tmp_path):
    path = small_file(tmp_path / "model.onnx", "fastattn")
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1000, np.float32), "w"))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    report = inspect(path)
    assert report.weights == {"weights.bin": 4000}
    assert report.bytes == path.stat().st_size + 4000
    (tmp_path / "weights.bin").unlink()
    assert inspect(path).weights == {"weights.bin": None}


def test_a_file_with_nothing_of_ours_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no node of fastattn's"):
        inspect(small_file(tmp_path / "model.onnx", "someone"))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.onnx is no ONNX file"):
        inspect(tmp_path / "text.onnx")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "missing.onnx")
