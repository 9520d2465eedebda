"""Under ttsem every kernel of ours keeps to its tensors, has no races and uses nothing that nobody wrote.

Run by tests/ttsem/job.py, in an environment that has ttsem.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ttsem.memory import Memory  # pyright: ignore[reportMissingImports]
from ttsem.sanitize import KernelFault, Session, Unjudged, session  # pyright: ignore[reportMissingImports]

from fastattn.autotune.source import ROOMS
from fastattn.kernels import launch as door
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.ttsem.cases import CASES, METHODS, by_the_engine, tensors

# every case in fp32; the first one of a kernel also on 16-bit inputs
RUNS = [
    pytest.param(kernel, case, dtype, id=f"{kernel}-{case}-{str(dtype).removeprefix('torch.')}")
    for kernel, cases in CASES.items()
    for case in cases
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if dtype is torch.float32 or case == next(iter(cases))
]
# of a tensor's largest value, for cases hold numbers that cancel: sums run in another order than in the engine, and
# what is rounded to 16 bits on the way may then fall to the other side
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def engine() -> Iterator[ProcessPoolExecutor]:
    """A process for the engine: ttsem changes how Triton prints its IR, for as long as a process lives."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(autouse=True, scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@contextmanager
def watched() -> Iterator[Session]:
    """Launches are executed by ttsem; lanes that a load leaves open hold NaN, or a number that is no row."""
    load = Memory.load

    def loud(self: Memory, addrs: np.ndarray, mask: np.ndarray | None, other: object, dtype: Any) -> np.ndarray:
        if other is None:
            kind = np.dtype(dtype)
            other = np.nan if kind.kind == "f" else True if kind.kind == "b" else np.iinfo(kind).max - 90
        return load(self, addrs, mask, other, dtype)

    with pytest.MonkeyPatch.context() as patch, session(cuda_is_cpu=False) as state:
        patch.setattr(Memory, "load", loud)
        yield state


def run_on_gpu(launch: Launch) -> None:
    """What ``door.run`` does for each launch on a GPU."""
    door._fill(launch)
    door._run_on_gpu(launch)


def execute(launches: list[Launch]) -> None:
    """Raises KernelFault: what ttsem found."""
    with watched() as state:
        for launch in launches:
            try:
                run_on_gpu(launch)
            except Unjudged as stop:
                why = ", ".join(stop.unsupported) or str(stop)
                pytest.skip(f"ttsem can't run {launch.kernel.__name__}: {why}")
    assert state.launches == len(launches)
    assert state.races_unchecked == 0


@pytest.mark.parametrize(("kernel", "case", "dtype"), RUNS)
def test_a_kernel_of_ours_is_clean_and_computes_what_the_engine_does(
    kernel: str, case: str, dtype: torch.dtype, engine: ProcessPoolExecutor
):
    expected = engine.submit(by_the_engine, kernel, case, dtype)
    launches = CASES[kernel][case](kernel, dtype)
    execute(launches)
    for left, wanted in zip(tensors(launches), expected.result(), strict=True):
        for name, x in left.items():
            tolerance = TOLERANCE[dtype] if x.is_floating_point() else 0.0
            largest = max(1.0, wanted[name].double().nan_to_num(posinf=0.0, neginf=0.0).abs().max().item())
            band = {"rtol": tolerance, "atol": tolerance * largest, "equal_nan": True}
            torch.testing.assert_close({name: x}, {name: wanted[name]}, **band)


def test_no_kernel_is_left_out():
    assert {name for room in ROOMS for name in import_module(f"fastattn.kernels.{room}").KERNELS} == CASES.keys()


# ---- whole methods, on memory that starts as NaN


@contextmanager
def by_ttsem() -> Iterator[Session]:
    """ttsem in the engine's place; and what torch allocates without writing to it holds NaN, or the largest integer."""

    def run(launches: Iterable[Launch]) -> None:
        for launch in launches:
            run_on_gpu(launch)

    nothing_planned = SimpleNamespace(run=run, planned=lambda *_: None)
    with pytest.MonkeyPatch.context() as patch, watched() as state:
        patch.setattr(door, "_engine", lambda: nothing_planned)
        torch.use_deterministic_algorithms(True)
        try:
            yield state
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_forward_and_backward_uses_nothing_that_nobody_wrote(name: str):
    wanted = METHODS[name]("reference")
    with by_ttsem() as state:
        assert torch.empty(1).isnan()
        try:
            got = METHODS[name]("triton")
        except Unjudged as stop:
            pytest.skip(f"ttsem can't run {name}: {', '.join(stop.unsupported) or stop}")
    assert state.launches > 0
    assert state.races_unchecked == 0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# ---- that it would tell


@triton.jit
def add_one(x_ptr, y_ptr, n, STEP: tl.constexpr, MASKED: tl.constexpr, OPEN: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = places < n
    x = tl.load(x_ptr + places, mask=mask & (places != 3)) if OPEN else tl.load(x_ptr + places, mask=mask, other=0.0)
    tl.store(y_ptr + places, x + tl.program_id(0), mask=mask if MASKED else None)


def _add_one(n: int, step: int = 16, masked: bool = True, open_: bool = False) -> torch.Tensor:
    x, y = torch.zeros(n), torch.zeros(n)
    args = {"x_ptr": x, "y_ptr": y, "n": n, "STEP": step, "MASKED": masked, "OPEN": open_}
    execute([Launch(add_one, (2,), args, Config({"BLOCK": 16}))])
    return y


def test_a_sound_kernel_passes():
    assert _add_one(30).tolist() == [0.0] * 16 + [1.0] * 14


def test_a_store_beyond_a_tensor_is_told():
    with pytest.raises(KernelFault, match=r"2 element\(s\) past the end of the tensor passed as `y_ptr`"):
        _add_one(30, masked=False)


def test_two_programs_that_write_to_one_place_are_told():
    with pytest.raises(KernelFault, match="both touch element"):
        _add_one(24, step=8)


def test_a_lane_that_a_load_leaves_open_shows():
    assert _add_one(30, open_=True)[3].isnan()
