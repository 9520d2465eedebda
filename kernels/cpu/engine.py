"""Runs a kernel's launch on the CPU: builds it once for its argument types and constants, then calls it."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from ..errors import Unsupported
from ..launch import Launch, signature
from . import build, machine
from .emit import ENTRY, generate
from .frontend import ttir

_HERE = Path(__file__).parent
_SLOTS = {"fp32": "f4x", "fp64": "d", "i1": "q", "i8": "q", "i16": "q", "i32": "q", "i64": "q"}


class Built:
    """A kernel for one choice of argument types and constants."""

    def __init__(self, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> None:
        level = machine.supported_levels()[0]
        given = [(name, kind) for name, kind in types.items() if kind != "constexpr"]
        key = [kernel.cache_key, repr(sorted(types.items())), repr(sorted(constants.items())), *_versions(), level.name]

        def source() -> str:
            with _frontend_lock:
                text = ttir(kernel, types, constants)
            return generate(text, level.lanes)

        library = build.load(kernel.__name__, key, source, level)
        self.entry = ctypes.cast(getattr(library, ENTRY), ctypes.c_void_p)
        self.given = [(name, kind[0] == "*") for name, kind in given]  # name, and whether it is a tensor
        self.pack = struct.Struct("<" + "".join("q" if kind[0] == "*" else _SLOTS[kind] for _, kind in given)).pack

    def __call__(self, launch: Launch) -> None:
        args = launch.args
        slots = self.pack(*(args[name].data_ptr() if is_tensor else args[name] for name, is_tensor in self.given))
        grid = (ctypes.c_int32 * 3)(*launch.grid, *(1,) * (3 - len(launch.grid)))
        drive, parallel = _threads()
        drive(self.entry, slots, grid, torch.get_num_threads(), parallel)


_built: dict[Any, Built | Unsupported] = {}
_building: dict[Any, threading.Lock] = {}
_lock = threading.Lock()
_frontend_lock = threading.Lock()  # Triton's front end is not made for several threads


def run(launches: Sequence[Launch]) -> None:
    """Runs all programs of each launch, one launch after the other, and returns when they are done.

    What is missing is built first, several kernels at a time.

    Raises:
        Unsupported: a kernel uses what the engine doesn't cover, or it can't be built here; nothing was run then.
    """
    keys = [_key(launch) for launch in launches]
    missing = {key: launch for key, launch in zip(keys, launches, strict=True) if key not in _built}
    if len(missing) > 1:
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
            list(pool.map(_ensure, missing, missing.values()))
    ready = [_ensure(key, launch) for key, launch in zip(keys, launches, strict=True)]
    for built in ready:
        if isinstance(built, Unsupported):
            raise built
    for built, launch in zip(ready, launches, strict=True):
        if math.prod(launch.grid) > 0:
            built(launch)


def _key(launch: Launch) -> tuple[Any, ...]:
    types, constants = signature(launch)
    return (launch.kernel, *types.values(), *constants.values())


def _ensure(key: tuple[Any, ...], launch: Launch) -> Any:
    built = _built.get(key)
    if built is None:
        with _lock:
            mine = _building.setdefault(key, threading.Lock())
        with mine:
            built = _built.get(key)
            if built is None:
                built = _built[key] = _build(launch.kernel, *signature(launch))
    return built


def _build(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Built | Unsupported:
    try:
        return Built(kernel, types, constants)
    except Unsupported as error:
        return error  # kept, so that a compiler that fails is not called again and again


def forget() -> None:
    """Drops what this process has loaded or found impossible; the cache on disk stays."""
    _built.clear()
    _building.clear()
    _threads.cache_clear()


@lru_cache
def _versions() -> tuple[str, ...]:
    """Triton's version and a digest of the engine itself."""
    files = sorted([*_HERE.glob("*.py"), *_HERE.glob("*.h")])
    return triton.__version__, hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@lru_cache
def _threads() -> tuple[Callable[..., None], ctypes.c_void_p | None]:
    """(the function that spreads programs over threads, torch's OpenMP entry or None)."""
    source = (_HERE / "threads.cc").read_text()
    library = build.load("threads", [source], lambda: source, machine.BASELINE)
    drive = library.fastattn_drive
    drive.restype = None
    drive.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    try:
        parallel = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        parallel = None  # torch was built with another thread pool
    return drive, parallel
