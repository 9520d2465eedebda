"""``pytest --device cuda``: what test files create stands on that device; the rest of the suite stays on the CPU.

A test says ``torch.randn(2, 4, 37, 16)`` and need not know where it runs: while it does, tensors that the files of
``tests`` create, with no device of their own, are made on the device asked for. Random numbers are drawn on the CPU and
moved, so that they are the same everywhere and may come of a CPU's generator. Calls inside fastattn are left alone: a
tensor that it forgets to put beside its inputs is an error on the device, as it is for users.

What tests something of the CPU, of files or of other processes is listed in :data:`CPU_ONLY`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

TESTS = Path(__file__).parent

_VALUES = "values out of range: elsewhere the device's own assertion fails, and the process with it"
_SPARSE = "a sparse file as memory"
# Folders, files and tests that have nothing to run on another device, and why.
CPU_ONLY = {
    "autotune": "caches, the device table and the tuner, which perf.gpu runs on the device itself",
    "cli": "commands, in processes of their own",
    "export": "ONNX models, run by ONNX Runtime on the CPU",
    "fuzz": "random kernels on the CPU engine",
    "kernels": "the CPU engine, Triton's interpreter and compiles ahead of time",
    "methods/test_bad_input.py": _VALUES,
    "methods/test_clustered_bad_input.py": _VALUES,
    "methods/test_linear_bad_input.py": _VALUES,
    "methods/test_memory.py": "resident memory of the process",
    "methods/test_reformer_bad_input.py": _VALUES,
    "ops/test_argsort.py": "the CPU's radix sort; elsewhere it is torch.sort",
    "ops/test_bad_input.py": _VALUES,
    "ops/test_block_attention.py::TestChoiceOfImplementation::test_tuned_configurations_reach_the_kernel": "the CPU's",
    "ops/test_block_attention.py::test_rows_out_of_range_are_refused": _VALUES,
    "ops/test_block_attention.py::test_rows_that_stand_beyond_two_to_the_31_elements_are_found": _SPARSE,
    "ops/test_block_attention_in_torch.py::test_compiled_call_refuses_rows_out_of_range": _VALUES,
    "ops/test_hamming_kmeans.py::test_is_named": _VALUES,
    "ops/test_topk_attention.py::test_keys_out_of_range_are_refused": _VALUES,
    "ops/test_topk_attention.py::test_rows_that_stand_beyond_two_to_the_31_elements_are_found": _SPARSE,
    "ops/test_topk_attention_in_torch.py::test_what_is_wrong_is_named": _VALUES,
    "perf": "benchmarks, which perf.gpu runs on the device itself",
    "sanitize": "sanitizers in code of the CPU engine",
    "ttsem": "an interpreter of Triton's IR",
    "test_device.py": "this option itself",
    "test_house.py": "packages and imports",
    "test_readme.py": "what the README prints, in processes of their own",
}

_RANDOM = frozenset({torch.rand, torch.randint, torch.randn, torch.randperm})
_CREATING = _RANDOM | {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.scalar_tensor,
    torch.tensor, torch.zeros,
}  # fmt: skip


def cpu_only(path: Path, node: str = "") -> str | None:
    """Why a file of tests, or one of its tests by its id, stays on the CPU; None if it does not."""
    if not path.is_relative_to(TESTS):
        return "no test of fastattn's parts"
    place = path.relative_to(TESTS)
    test = "::".join([str(place), *node.partition("[")[0].split("::")[1:]])
    return next((CPU_ONLY[name] for name in (test, *map(str, (place, *place.parents))) if name in CPU_ONLY), None)


def device_type() -> str:
    """Of the device that the test which runs now was asked to run on: what ``torch.autocast`` wants to know."""
    return torch.empty(0).device.type


class OnDevice(TorchFunctionMode):
    """Puts on ``device`` what files below ``folder`` create, while :attr:`active`."""

    def __init__(self, device: torch.device, folder: Path = TESTS) -> None:
        super().__init__()
        self.device = device
        self.folder = f"{folder}/"
        self.active = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # compiled code is traced through here, and must not look at frames
        if torch.compiler.is_compiling() or not self.active or func not in _CREATING or "device" in kwargs:
            return func(*args, **kwargs)
        if not sys._getframe(1).f_code.co_filename.startswith(self.folder):
            return func(*args, **kwargs)
        if func not in _RANDOM:
            return func(*args, **kwargs, device=self.device)
        requires_grad = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(requires_grad)
