"""The harness itself: what is wrong in a generated file or in a kernel is reported, and what is right is not."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.cpu import machine
from fastattn.kernels.launch import Launch
from tests.sanitize.sanitized import (
    PLACES,
    POISON,
    WIDTHS,
    Reported,
    knows,
    program_of,
    programs_of,
    run_program,
    why_not,
)

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@triton.jit
def reach_kernel(x, y, n, whole_load, whole_store, load, store, gather, scatter, BLOCK: tl.constexpr):
    # each access, moved by so many elements from where it is right
    i = tl.arange(0, BLOCK)
    tl.store(y + i + whole_store, tl.load(x + i + whole_load))
    tl.store(y + i + store, tl.load(x + i + load, mask=i < n), mask=i < n)
    tl.store(y + (i ^ 5) + scatter, tl.load(x + (i ^ 5) + gather, mask=i < n), mask=i < n)


ACCESSES = ("whole_load", "whole_store", "load", "store", "gather", "scatter")


def reach(**shifts: int) -> Launch:
    shifts = dict.fromkeys(ACCESSES, 0) | shifts
    args = {"x": torch.ones(32), "y": torch.zeros(32), "n": 32, **shifts, "BLOCK": 32}
    return Launch(reach_kernel, (1,), args, Config())


@pytest.mark.parametrize("level", WIDTHS, ids=attrgetter("name"))
def test_one_element_beyond_a_tensor_or_before_it_is_reported(level: machine.Level, folder: Path):
    (program,) = programs_of([reach()], level, folder)

    def reported(place: str, **shifts: int) -> bool:
        try:
            run_program(program, reach(**shifts), place)
        except Reported as report:
            assert "AddressSanitizer" in str(report)
            return True
        return False

    assert not any(reported(place) for place in PLACES)
    for access in ACCESSES:
        for shift, place in ((1, "before"), (-1, "behind")):
            assert reported(place, **{access: shift}), (access, shift)
            if "whole" in access:  # on the heap nobody sees the masked ones of AVX-512
                assert reported("heap", **{access: shift}), (access, shift)


WRONG = """
#include <cstdint>
#include <cstring>
extern "C" void fastattn_run(const int64_t* args, const int32_t*, int64_t, int64_t) {
  char* memory = (char*)args[0];
  const int64_t n = args[1];
  volatile int64_t sink;
  alignas(64) float buffer[16];
  switch (args[2]) {
    case 0: sink = n; break;
    case 1: sink = (int32_t)1 << n; break;
    case 2: *(int32_t*)(memory + 1) = 1; break;
    case 3: sink = n / (n - 64); break;
    case 4: sink = *(volatile bool*)memory; break;
    case 5: memset((char*)buffer + n - 60, 1, 64); sink = ((volatile float*)buffer)[0]; break;
    case 6: sink = *(int32_t*)(n - 64); break;
    case 7: memcpy(memory, buffer, sizeof buffer); break;
  }
}
"""
SAID = {
    1: "shift exponent 64 is too large",
    2: "misaligned address",
    3: "division by zero",
    4: "load of value 2",
    5: "stack-buffer-overflow",
    6: "SEGV on unknown address",
}


def wrong(case: int, memory: torch.Tensor) -> Launch:
    # the signature alone is taken of the kernel: the program is WRONG
    return Launch(wrong_kernel, (1,), {"memory": memory, "n": 64, "case": case}, Config())


@triton.jit
def wrong_kernel(memory, n, case):
    pass


@pytest.fixture(scope="module")
def wrong_program(folder: Path) -> Path:
    return program_of(WRONG, "wrong", machine.BASELINE, folder)


@pytest.mark.parametrize("case", SAID, ids=SAID.get)
def test_undefined_behaviour_is_reported_with_what_it_is(case: int, wrong_program: Path):
    memory = torch.full((64,), 2, dtype=torch.uint8)
    run_program(wrong_program, wrong(0, memory), "heap")
    with pytest.raises(Reported, match=SAID[case]):
        run_program(wrong_program, wrong(case, memory), "heap")


def test_a_buffer_that_nobody_filled_holds_what_no_kernel_computes(wrong_program: Path):
    if not knows(POISON):
        pytest.skip("this compiler can't fill buffers with a pattern")
    memory = torch.zeros(16)
    run_program(wrong_program, wrong(7, memory), "heap")
    assert (memory.isnan() | (memory.abs() > 1e38)).all()
