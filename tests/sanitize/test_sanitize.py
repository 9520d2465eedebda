"""Every kernel of ours, as generated code, has no undefined behaviour and touches nothing beyond its tensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastattn.autotune.source import ROOMS
from fastattn.kernels.cpu.machine import Level
from fastattn.kernels.launch import Launch
from tests.sanitize.sanitized import WIDTHS, check, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

# by room and kernel: launches on small, odd inputs, made anew for each run
CASES: dict[str, dict[str, Callable[[str, torch.dtype], list[Launch]]]] = {
    kernel: cases for room in ROOMS for kernel, cases in import_module(f"tests.sanitize.{room}").CASES.items()
}
BEST = WIDTHS[0]
# every case at the best level; the first one of a kernel also at the other widths and on 16-bit inputs
RUNS = [
    pytest.param(kernel, case, level, dtype, id=f"{kernel}-{case}-{level.name}-{str(dtype).removeprefix('torch.')}")
    for kernel, cases in CASES.items()
    for case in cases
    for level in WIDTHS
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (level is BEST) + (dtype is torch.float32) + (case == next(iter(cases))) >= 2
]


def test_every_kernel_of_ours_has_a_case():
    ours = {name for room in ROOMS for name in import_module(f"fastattn.kernels.{room}").KERNELS}
    assert ours == CASES.keys()


@pytest.mark.parametrize(("kernel", "case", "level", "dtype"), RUNS)
def test_a_kernel_of_ours_keeps_to_its_tensors(kernel: str, case: str, level: Level, dtype: torch.dtype, folder: Path):
    check(CASES[kernel][case](kernel, dtype), level, folder)
