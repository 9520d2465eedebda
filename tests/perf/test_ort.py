"""The benchmark of ONNX Runtime runs on sizes that take no time, and says what its rows are about."""

from __future__ import annotations

import sys

import pytest

from fastattn.kernels.cpu.build import find_compiler
from perf import bench_ort


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_kernels_are_measured_against_dense_attention_and_against_bodies():
    pytest.importorskip("onnxruntime")
    rows = list(bench_ort.rows({256: 0.1}))
    rivals = [row.what.split(", against ")[1] for row in rows]
    assert rivals == 2 * [bench_ort.DENSE, bench_ort.BODIES]
    assert all(row.value > 0 and row.goal is None for row in rows)


def test_the_goals_are_for_the_lengths_that_are_measured():
    assert set(bench_ort.GOALS) == set(bench_ort.SECONDS)


def test_without_onnx_runtime_rows_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    rows = list(bench_ort.rows())
    assert [row.verdict for row in rows] == 3 * ["not measured"] and "onnxruntime" in rows[0].detail
