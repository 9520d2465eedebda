"""The benchmarks run, on sizes that take no time, and report the rows that the goals are for."""

from __future__ import annotations

import pytest
import torch

from perf import bench_block_attention, bench_launch, bench_smyrf, peers, versus
from perf.__main__ import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_measured_forward_and_backward_and_by_memory(name: str):
    bench = METHODS[name]
    assert tuple(bench.seconds) == versus.LENGTHS
    rows = list(bench.rows((256,), {256: 0.05}))
    speeds, memory = ([row for row in rows if row.unit == unit] for unit in ("x", "MB"))
    assert [row.what.split(", against")[0].endswith("backward") for row in speeds] == len(speeds) // 2 * [False, True]
    assert len(memory) in (0, len(speeds))  # none where it can't be read
    assert all(row.value > 0 and row.low <= row.value <= row.high for row in rows)
    assert all(row.goal is None for row in rows)


@pytest.mark.parametrize("name", METHODS)
def test_the_rivals_of_a_method_are_torch_or_peers_that_there_are(name: str):
    assert METHODS[name].methods
    for rival in (rival for method in METHODS[name].methods for rival in method.rivals):
        assert rival.attention is not None or rival.name in peers.PEERS


def test_every_length_of_the_goals_has_its_goal():
    for goals in bench_smyrf.GOALS.values():
        assert set(goals) == set(bench_smyrf.BENCH.seconds)
    assert set(bench_block_attention.BLOCK_LENGTHS) <= set(bench_block_attention.SECONDS)


def test_the_engine_is_measured_dense_by_blocks_and_backward(monkeypatch):
    monkeypatch.setattr(bench_block_attention, "BLOCK_LENGTHS", (512,))
    monkeypatch.setattr(bench_block_attention, "MM_SIZE", 128)
    rows = list(bench_block_attention.rows((512,), {512: 0.2}))
    assert [row.goal for row in rows] == [None, 80.0, 45.0, 55.0, 62.0, 45.0]
    assert [row.unit for row in rows] == ["x", "%", "%", "%", "%", "%"]  # first the yardstick itself
    assert all(row.value > 0 for row in rows)


def test_measuring_the_yardstick_leaves_the_threads_as_they_were(monkeypatch):
    monkeypatch.setattr(bench_block_attention, "MM_SIZE", 64)
    before = torch.get_num_threads()
    next(bench_block_attention.rows((256,), {256: 0.1}))
    assert torch.get_num_threads() == before


def test_a_launch_is_measured_against_an_op_that_does_nothing_and_threads_against_one():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = list(bench_launch.rows(256, 0.1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert [(row.unit, row.goal) for row in rows] == [("us", 15.0), ("us", 15.0), ("x", 1.8), ("x", 1.8)]
    assert all(row.low <= row.value <= row.high for row in rows)
    assert rows[0].value > 0  # a launch is more than nothing
