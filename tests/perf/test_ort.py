"""The benchmark of ONNX Runtime runs on sizes that take no time, and says what its rows are about."""

from __future__ import annotations

import sys

import pytest

from fastattn.kernels.cpu.build import find_compiler
from perf import bench_ort, bench_ort_encoder


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_kernels_and_bodies_are_measured_against_dense_attention():
    pytest.importorskip("onnxruntime")
    rows = list(bench_ort.rows({256: 0.1}))
    methods = (bench_ort.SMYRF, bench_ort.CLUSTERED, bench_ort.LINEAR)
    assert [row.what for row in rows] == [
        f"{method}, {form}, {on}, against {bench_ort.DENSE}"
        for on in ("1 thread", "2 threads")
        for method in methods
        for form in (bench_ort.BODIES, bench_ort.KERNELS)
    ]
    assert all(row.value > 0 and row.goal is None for row in rows)


def test_the_goals_are_for_the_lengths_that_are_measured():
    assert all(set(goals) <= set(bench_ort.SECONDS) for goals in bench_ort.GOALS.values())


def test_without_onnx_runtime_rows_say_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    rows = list(bench_ort.rows())
    assert [row.verdict for row in rows] == 4 * ["not measured"] and "onnxruntime" in rows[0].detail


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_patched_encoder_is_measured_against_its_dense_export():
    pytest.importorskip("onnxruntime")
    rows = list(bench_ort_encoder.rows({128: 0.1}))
    assert [row.what.split(", ")[2] for row in rows] == [bench_ort_encoder.BODIES, bench_ort_encoder.KERNELS]
    assert all(row.value > 0 and row.what.endswith(bench_ort_encoder.DENSE) for row in rows)
