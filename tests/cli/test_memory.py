"""The measure of memory that the demo and the benchmarks rest on."""

from __future__ import annotations

import sys

import pytest
import torch

from fastattn.cli.memory import extra_memory

MIB = 2**20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="high-water marks are read from /proc")


@pytest.mark.parametrize("kept", [False, True], ids=["freed-inside", "returned"])
def test_a_peak_of_known_size_is_seen(kept: bool):
    size = 192 * MIB

    def call() -> torch.Tensor | None:
        block = torch.ones(size, dtype=torch.uint8)
        return block if kept else None

    call()
    measured = extra_memory(call)
    assert measured is not None
    assert 0.95 * size < measured < 1.1 * size + 8 * MIB


def test_an_earlier_peak_is_not_seen():
    torch.ones(192 * MIB, dtype=torch.uint8)
    measured = extra_memory(lambda: torch.ones(MIB, dtype=torch.uint8))
    assert measured is not None and measured < 24 * MIB


def test_memory_that_python_frees_during_the_call_still_counts():
    def call() -> None:
        for _ in range(4):
            torch.ones(96 * MIB, dtype=torch.uint8)

    call()
    measured = extra_memory(call)
    assert measured is not None
    assert 90 * MIB < measured < 150 * MIB  # one at a time, not four
