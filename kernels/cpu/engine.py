"""Runs launches on the CPU: builds each kernel once for its argument types and constants, then calls it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import Unsupported, UnsupportedNow
from ..launch import Launch, is_interpreted, signature
from . import build, machine
from .emit import ENTRY, generate, prelude
from .frontend import identity, ttir
from .plan import Driver, Plan

_HERE = Path(__file__).parent


def recipe(launch: Launch, level: machine.Level) -> build.Recipe:
    """The object for a launch's argument types and constants; its tensors may be on the ``meta`` device."""
    kernel = launch.kernel
    types, constants = signature(launch)

    def source() -> str:
        return generate(ttir(kernel, types, constants), level.lanes)

    key = (*identity(kernel), repr(sorted(types.items())), repr(sorted(constants.items())), _digest())
    return build.Recipe(kernel.__name__, key, source, level, prelude())


def driver_recipe() -> build.Recipe:
    """The object that spreads programs over threads."""
    source = (_HERE / "threads.cc").read_text()
    return build.Recipe("threads", (source,), lambda: source, machine.BASELINE)


class Built:
    """A kernel for one choice of argument types and constants.

    entry: the address of its function. tensors: (slot, name) of the arguments that are tensors.
    """

    def __init__(self, launch: Launch) -> None:
        types, _ = signature(launch)
        library = build.load(recipe(launch, machine.supported_levels()[0]))
        self.entry = ctypes.cast(getattr(library, ENTRY), ctypes.c_void_p).value
        self._given = [(name, kind) for name, kind in types.items() if kind != "constexpr"]
        self.tensors = [(at, name) for at, (name, kind) in enumerate(self._given) if kind[0] == "*"]

    def slots(self, args: Mapping[str, Any]) -> bytes:
        """The arguments as the kernel's function takes them, 8 bytes each; 0 for tensors."""
        return b"".join(_slot(kind, args[name]) for name, kind in self._given)


def _slot(kind: str, value: Any) -> bytes:
    if kind[0] == "*":
        return bytes(8)
    if kind == "fp32":
        return struct.pack("<f4x", ctypes.c_float(value).value)  # beyond fp32's range it is infinite
    return struct.pack("<q", value)


_built: dict[Any, Built | Unsupported] = {}
_building: dict[Any, threading.Lock] = {}
_plans: dict[Any, Plan] = {}
_MOST_PLANS = 1024  # of some 2 KiB a round; lengths may differ at every call
_lock = threading.Lock()


def run(launches: Sequence[Launch]) -> None:
    """Runs all programs of each launch, one launch after the other, and returns when they are done.

    What is missing is built first, several kernels at a time.

    Raises:
        Unsupported: a kernel uses what the engine doesn't cover, or it can't be built here; nothing was run then.
        ValueError: a row number is out of range; nothing was run then.
    """
    tensors = {id(x): x for launch in launches for x in launch.args.values() if isinstance(x, torch.Tensor)}
    numbers = {name: number for number, name in enumerate(tensors)}
    _plan(launches, lambda _, tensor: numbers[id(tensor)], len(tensors))(list(tensors.values()))


def planned(
    key: Hashable, tensors: Mapping[str, torch.Tensor], launches: Callable[[], Iterable[Launch]]
) -> Plan | None:
    """The plan of ``launches()``, made once for a key, whose tensors are its arguments in their order; None for the
    interpreter's kernels. See :func:`fastattn.kernels.launch.run_planned`."""
    plans = _plans  # what is made now must not be kept if forget() is called meanwhile
    plan = plans.get(key)
    if plan is None:
        made = list(launches())
        if any(is_interpreted(launch.kernel) for launch in made):
            return None
        names = list(tensors)

        def number(name: str, tensor: torch.Tensor) -> int:
            if tensors.get(name) is not tensor:
                raise ValueError(f"the tensor of argument {name} must be given by that name")
            return names.index(name)

        plan = _plan(made, number, len(names))
        with _lock:
            while len(plans) >= _MOST_PLANS:
                del plans[next(iter(plans))]  # the oldest
            plans[key] = plan
    return plan


def prepare(launches: Sequence[Launch]) -> list[Unsupported | None]:
    """Builds what is missing for launches, several kernels at a time, and runs nothing.

    Their tensors may be on the ``meta`` device. Returns for each launch why it can't run here, or None.
    """
    return [built if isinstance(built, Unsupported) else None for built in _kernels(launches)]


def _plan(launches: Sequence[Launch], number: Callable[[str, torch.Tensor], int], n_tensors: int) -> Plan:
    kernels = []
    for built in _kernels(launches):
        if isinstance(built, Unsupported):
            raise _bare(built)
        kernels.append(built)
    return Plan(launches, kernels, number, n_tensors, driver())


def _kernels(launches: Sequence[Launch]) -> list[Built | Unsupported]:
    keys = [_key(launch) for launch in launches]
    found: dict[Any, Any] = {key: _built.get(key) for key in keys}
    missing = {key: launch for key, launch in zip(keys, launches, strict=True) if found[key] is None}
    if missing:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            pool.submit(driver)
            found |= zip(missing, pool.map(_ensure, missing, missing.values()), strict=True)
    try:
        driver()
    except Unsupported as error:
        return [_bare(error)] * len(launches)
    return [found[key] for key in keys]


def _key(launch: Launch) -> tuple[Any, ...]:
    types, constants = signature(launch)
    return (launch.kernel, *types.values(), repr(constants))  # 1, 1.0 and True are equal, but not the same constant


def _ensure(key: tuple[Any, ...], launch: Launch) -> Any:
    with _lock:
        mine = _building.setdefault(key, threading.Lock())
    with mine:
        built = _built.get(key)
        if built is None:
            try:
                built = _built[key] = Built(launch)
            except UnsupportedNow as error:
                built = _bare(error)  # not kept: that may pass, and the builder knows when to try again
            except Unsupported as error:
                built = _built[key] = _bare(error)
    return built


def _bare(error: Unsupported) -> Unsupported:
    """The error without the frames that it was raised through, which would keep a call's tensors alive."""
    return type(error)(str(error))


def forget() -> None:
    """Drops what this process has loaded or found impossible; the cache on disk stays."""
    global _plans
    _plans = {}
    _built.clear()
    _building.clear()
    driver.cache_clear()
    build.forget()


@lru_cache
def _digest() -> str:
    """Of the engine itself."""
    files = sorted([*_HERE.glob("*.py"), *_HERE.glob("*.h")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@lru_cache
def driver() -> Driver:
    """What runs launches on several threads; built at the first call."""
    return Driver(build.load(driver_recipe()))
