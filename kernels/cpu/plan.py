"""A list of launches made ready: one call into native code runs them all, and needs their tensors' addresses alone."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config import cdiv
from ..errors import Unsupported
from ..launch import Launch, rows_to_check, tensor_name
from ..rows import check_rows

if TYPE_CHECKING:
    from .engine import Built

_ROWS_A_PROGRAM = 8192  # 32 KiB, which a core reads in a microsecond
_WORDS_A_PROGRAM = 8192  # of 8 bytes
FAILURE = -1  # in place of a tensor


class Driver:
    """The functions of threads.cc, and torch's OpenMP entry, which is None where torch has another thread pool."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.check_rows = ctypes.cast(library.fastattn_check_rows, ctypes.c_void_p).value
        self.fill = ctypes.cast(library.fastattn_fill, ctypes.c_void_p).value
        self.drive: Any = library.fastattn_drive
        self.drive.restype = ctypes.c_int64
        self.drive.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
        try:
            self.parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
        except (AttributeError, OSError):
            self.parallel = None


class _Step(ctypes.Structure):  # threads.cc: Launch
    _fields_ = (
        ("run", ctypes.c_void_p), ("first", ctypes.c_int64), ("programs", ctypes.c_int64), ("grid", ctypes.c_int32 * 3),
    )  # fmt: skip


class _Plan(ctypes.Structure):  # threads.cc: Plan
    _fields_ = (
        ("steps", ctypes.c_void_p), ("n_steps", ctypes.c_int64),
        ("slots", ctypes.c_char_p), ("n_slots", ctypes.c_int64),
        ("places", ctypes.c_void_p), ("n_places", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )  # fmt: skip


class Steps:
    """Launches of native functions, one after the other, but for their tensors."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._slots = b""
        self._places: list[int] = []

    def add(self, entry: int | None, grid: tuple[int, ...], slots: bytes, tensors: Sequence[tuple[int, int]]) -> None:
        """entry: the function's address. slots: its arguments, 8 bytes each. tensors: (slot, number) of those arguments
        that are addresses: of the tensor of that number, or of the list's failure for :data:`FAILURE`."""
        if max(grid) >= 2**31:
            raise Unsupported(f"a grid must stay below 2**31 programs an axis, got {grid}")
        first = len(self._slots) // 8
        self._places += [number for at, tensor in tensors for number in (first + at, tensor)]
        self._slots += slots
        if math.prod(grid) > 0:
            self._steps.append(_Step(entry, first, math.prod(grid), (*grid, *(1,) * (3 - len(grid)))))

    def drive(self, driver: Driver, n_tensors: int) -> Callable[[Sequence[torch.Tensor]], int]:
        """What runs them on torch's threads with the tensors that it gets, and returns their failure, or 0."""
        steps = (_Step * len(self._steps))(*self._steps)
        places = (ctypes.c_int64 * len(self._places))(*self._places)
        plan = _Plan(
            ctypes.addressof(steps), len(steps), self._slots, len(self._slots) // 8, ctypes.addressof(places),
            len(places) // 2, driver.parallel,
        )  # fmt: skip
        memory = (plan, steps, places)
        address, drive, pack = ctypes.addressof(plan), driver.drive, struct.Struct(f"<{n_tensors}q").pack

        def run(tensors: Sequence[torch.Tensor], _memory: Any = memory) -> int:
            return drive(address, pack(*[tensor.data_ptr() for tensor in tensors]), torch.get_num_threads())

        return run


class Plan:
    """Launches but for their tensors, of which it keeps none. It never changes: any number of threads may call it.

    built: the kernel of each launch. number: the place of an argument's tensor, by the argument's name and the tensor,
    among those that a call gets.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        built: Sequence[Built],
        number: Callable[[str, torch.Tensor], int],
        n_tensors: int,
        driver: Driver,
    ) -> None:
        steps = Steps()
        self._rows: list[tuple[str, int, int]] = []  # name, number of the tensor, number of rows
        for name, index, length in rows_to_check(launches):
            if index.dtype != torch.int32 or not index.is_contiguous():
                given = f"{index.dtype} with strides {index.stride()}"
                raise TypeError(f"{name} must be contiguous and torch.int32, got {given}")
            self._rows.append((name, number(name, index), length))
            slots = struct.pack("<6q", 0, index.numel(), _ROWS_A_PROGRAM, min(length, 2**31), len(self._rows), 0)
            tensors = [(0, number(name, index)), (5, FAILURE)]
            steps.add(driver.check_rows, (cdiv(index.numel(), _ROWS_A_PROGRAM),), slots, tensors)
        for launch, kernel in zip(launches, built, strict=True):
            for name, value in launch.fill.items():
                tensor = launch.args[name]
                n_bytes = tensor.numel() * tensor.itemsize
                slots = struct.pack("<4q", 0, n_bytes, _WORDS_A_PROGRAM, _word(tensor.dtype, value))
                grid = (cdiv(n_bytes, 8 * _WORDS_A_PROGRAM),)
                steps.add(driver.fill, grid, slots, [(0, number(tensor_name(name), tensor))])
            tensors = [(at, number(tensor_name(name), launch.args[name])) for at, name in kernel.tensors]
            steps.add(kernel.entry, launch.grid, kernel.slots(launch.args), tensors)
        self._run = steps.drive(driver, n_tensors)

    def __call__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Runs the launches on torch's threads, and returns when they are done.

        Raises:
            ValueError: a row number is out of range; no kernel was run then.
        """
        failure = self._run(tensors)
        if failure:
            name, number, length = self._rows[failure - 1]
            check_rows(name, tensors[number], length)
            raise ValueError(f"{name} was written to while it was checked")


def _word(dtype: torch.dtype, value: float) -> int:
    """8 bytes full of ``value``."""
    return int(torch.full((8 // dtype.itemsize,), value, dtype=dtype).view(torch.int64).item())
