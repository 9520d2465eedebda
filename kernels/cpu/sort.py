"""Stable argsort of rows on the CPU, by the radix sort that ONNX Runtime's custom ops use too."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from pathlib import Path

import torch

from . import build, engine, machine
from .plan import FAILURE, Steps

_HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.int16)


def stable_argsort(keys: torch.Tensor) -> torch.Tensor:
    """As :func:`fastattn.ops.argsort.stable_argsort`, for keys of :data:`DTYPES` on the CPU.

    Raises:
        Unsupported: the sort can't be built here.
    """
    keys = keys.contiguous()
    order = torch.empty_like(keys, dtype=torch.int32)
    if order.numel() == 0:
        return order
    n = keys.shape[-1]
    slots = struct.pack("<6q", 0, 0, n, keys.dtype == torch.int16, 1, 0)
    steps = Steps()
    steps.add(_entry(), (keys.numel() // n,), slots, [(0, 0), (1, 1), (5, FAILURE)])
    if steps.drive(engine.driver(), 2)([keys, order]):
        raise MemoryError(f"no memory to sort {n} keys")
    return order


@lru_cache
def _entry() -> int | None:
    library = build.load(recipe())
    return ctypes.cast(library.fastattn_sort_rows, ctypes.c_void_p).value


def recipe() -> build.Recipe:
    text = "".join((_HERE / name).read_text() for name in ("sort.h", "sort.cc"))
    source = text.replace('#include "sort.h"\n', "").replace("#pragma once\n", "")
    return build.Recipe("sort", (source,), lambda: source, machine.BASELINE)
