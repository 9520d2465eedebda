"""Which of the two ways a session takes, as the graph shows that it runs: bodies of standard ops, or our kernels."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest

from fastattn import export
from fastattn.kernels.cpu.build import find_compiler


@pytest.fixture
def options(tmp_path):
    """Of a session that leaves what it runs, after all its optimisations, in ``optimised.onnx``."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    return options


@pytest.fixture
def left(tmp_path):
    """() -> how many nodes of each op of ours are left there."""
    return lambda: Counter(
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node if node.domain == "fastattn"
    )


def test_without_the_library_all_bodies_are_inlined(bert_file, options, left):
    onnxruntime.InferenceSession(str(bert_file), options, providers=["CPUExecutionProvider"])
    assert not left()
    assert len(onnx.load(options.optimized_model_filepath).graph.node) > 100


@pytest.mark.skipif(find_compiler() is None, reason="the library is built by a C++ compiler")
class TestWithTheLibrary:
    def test_our_inner_ops_stay_and_are_those_that_inspect_names(self, bert_file, options, left):
        export.session(bert_file, options=options)
        found = left()
        # two layers; queries and keys are sorted apart
        assert found == {"SmyrfHash": 2, "SortedBlocks": 4, "BlockAttention": 2}
        report = export.inspect(bert_file)
        assert report.no_library is None
        assert {op for node in report.nodes for op in node.fused} == set(found)

    def test_it_computes_what_the_model_does(self, bert, bert_file, make_tokens):
        for sample in (make_tokens(3, 101, [101, 64, 1]), make_tokens(1, 17)):
            report = export.check(bert, bert_file, sample, fused=True)
            assert all(error.relative < 1e-5 for error in report.errors), report

    def test_what_it_runs_is_told_by_inspect_too(self, bert_file, options):
        export.session(bert_file, options=options)
        nodes = export.inspect(options.optimized_model_filepath).nodes
        assert Counter(node.form for node in nodes) == {"inlined": 2, "bare": 8}
        assert all(node.fused == (node.op,) for node in nodes if node.form == "bare")
