"""Which configuration a call gets, and why: from this very device, or else from another of its architecture."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastattn.kernels.config import Config
from fastattn.kernels.settings import CACHE_DIR_VARIABLE

if TYPE_CHECKING:
    from fastattn.autotune.key import Key
    from fastattn.autotune.schema import Entry, Row

# Answers by call. One call in a program's life reads files; the others end here.
_answers: dict[tuple[Any, ...], Config | None] = {}
_MOST_ANSWERS = 4096  # shapes may differ at every call
_entries: dict[tuple[str | None, str, str], list[Entry]] = {}
_lock = threading.Lock()
_generation = 0  # of the files that answers came from; forget() begins a new one


@dataclass(frozen=True)
class Choice:
    """config: None where there is no row to go by. row, key: what it was taken from. why: in words."""

    config: Config | None
    why: str
    key: Key | None = None
    row: Row | None = None


def lookup(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: Mapping[str, int], flags: Mapping[str, Any]
) -> Config | None:
    """The tuned configuration for a call, or None: then the kernel's heuristic serves. Never raises for a bad cache.

    shape: sizes by name; see :func:`fastattn.autotune.shape.bucket` for how they are rounded. flags: whatever else
    selects other code. Give names in one order. The cache's files are read once for a kernel; what other processes
    write later is seen after :func:`forget`.
    """
    call = (kernel, device, dtype, *shape.items(), *flags.items(), stamp())
    try:
        return _answers[call]
    except KeyError:
        pass
    config = explain(kernel, device, dtype, shape, flags).config
    with _lock:
        if len(_answers) >= _MOST_ANSWERS:
            _answers.clear()
        _answers[call] = config
    return config


def stamp() -> tuple[object, ...]:
    """Changes whenever :func:`lookup` may answer a question differently: who keeps its answers keeps this with them."""
    return _generation, torch.get_num_threads(), os.environ.get(CACHE_DIR_VARIABLE)


def explain(
    kernel: str, device: torch.device, dtype: torch.dtype, shape: Mapping[str, int], flags: Mapping[str, Any]
) -> Choice:
    """What :func:`lookup` answers, with its reason."""
    # kernels need Triton, and the files' format needs pydantic: neither is for an import of fastattn to load
    try:
        from fastattn.autotune.device import describe
        from fastattn.autotune.key import key_for

        key = key_for(kernel, describe(device), dtype, shape, flags)
    except ImportError as error:
        return Choice(None, f"no kernel can run here: {error}")
    return choose(key, _entries_of(kernel, key.arch))


def choose(key: Key, entries: list[Entry]) -> Choice:
    """The best row for ``key`` among ``entries``.

    Rows that were measured on the same device come first, then those of another device of the same architecture (of a
    CPU: first with another number of threads). Of equals, the nearest length; of that, the fastest row.
    """
    from fastattn.autotune.schema import MEASURED, best
    from fastattn.autotune.shape import distance

    tiers = {
        "measured on this device": set(),
        "measured on this device with another number of threads": {"threads"},
        "measured on another device of this architecture": {"threads", "device"},
    }
    for why, may_differ in tiers.items():
        near = [
            (distance(key.shape, entry.key.shape), entry.key.identity(), entry)
            for entry in entries
            if set(key.differences(entry.key)) <= may_differ
        ]
        for apart, _, entry in sorted(near, key=lambda item: item[:2]):
            row = best(entry.rows, MEASURED)
            if apart == float("inf") or row is None:
                continue
            if apart:
                why += f", at other lengths or counts ({_counts(entry.key)})"
            return Choice(row.launch_config(), why, entry.key, row)
    return Choice(None, _why_not(key, entries))


def forget() -> None:
    """Lets the next lookup read the files anew."""
    global _generation
    with _lock:
        _generation += 1
        _entries.clear()
        _answers.clear()


def _entries_of(kernel: str, arch: str) -> list[Entry]:
    from fastattn.autotune.store import default_store

    name = (os.environ.get(CACHE_DIR_VARIABLE), kernel, arch)
    with _lock:
        if name not in _entries:
            _entries[name] = default_store().read(kernel, arch)
        return _entries[name]


def _counts(key: Key) -> str:
    from fastattn.autotune.shape import COUNTS

    return ", ".join(f"{name} {size}" for name, size in key.shape.items() if name in COUNTS)


def _why_not(key: Key, entries: list[Entry]) -> str:
    if not entries:
        return f"nothing was tuned for {key.kernel} on {key.arch}"
    nearest = min(entries, key=lambda entry: (len(key.differences(entry.key)), entry.key.identity()))
    other = key.differences(nearest.key)
    sizes = {name for name in {*key.shape, *nearest.key.shape} if key.shape.get(name) != nearest.key.shape.get(name)}
    there, here = nearest.key.model_dump(), key.model_dump()
    said = [f"{name} is {here.get(name)!r} here and {there.get(name)!r} there" for name in other]
    said += [f"{name} is {key.shape.get(name)} here and {nearest.key.shape.get(name)} there" for name in sorted(sizes)]
    return "no row fits; the nearest differs: " + ("; ".join(said) or "it has no usable row")
