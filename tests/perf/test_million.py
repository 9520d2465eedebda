"""The run of a million tokens, on fewer: it tells time by stage and memory, and notices a wrong row."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from perf import million


@pytest.fixture(autouse=True)
def threads_as_they_were():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", million.METHODS)
def test_a_run_tells_time_by_stage_and_peak_memory_and_checks_rows(method: str, capsys: pytest.CaptureFixture[str]):
    million.main(["--method", method, "--tokens", "1024", "--threads", "1"])
    said = capsys.readouterr().out
    assert re.search(rf"{method} forward: [\d.]+ s", said)
    assert "fastattn." in said and "all others" in said
    assert re.search(r"peak memory of the process, inputs and result included: [\d.]+ GB", said)
    assert re.search(r"rows checked: \d+, off by \S+ of the largest value at most", said)
    assert "goal" not in said  # which is for a million


@pytest.mark.parametrize("method", million.METHODS)
def test_a_wrong_result_is_noticed(method: str):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, million.HEADS, 512, million.HEAD_DIM, generator=generator) for _ in range(3))
    attention, check = million.METHODS[method](512, generator)
    out = attention(q, k, v)
    assert check(q, k, v, out)
    off: Tensor = out + 1e-3 * out.abs().max()
    with pytest.raises(RuntimeError, match="the result is wrong"):
        check(q, k, v, off)


def test_clusters_out_of_order_are_noticed():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, million.HEADS, 512, million.HEAD_DIM, generator=generator) for _ in range(2))
    projections = torch.randn(million.HEAD_DIM + 2, million.ROUNDS, generator=generator)
    index = torch.arange(512).view(1, 1, 1, 8, 64).expand(1, million.HEADS, million.ROUNDS, 8, 64)
    with pytest.raises(RuntimeError, match="not in the order of its hashes"):
        million.check_order(q, k, projections, index, index, generator)
