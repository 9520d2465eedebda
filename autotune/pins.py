"""Deterministic mode: configurations that stay as they are, whatever is tuned, on every machine that has the file.

A file of pins is a cache file whose entries have one row each. A pin holds for all devices of its architecture, for any
number of threads and any version of Triton: machines that differ in these run the same tiles in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch

from fastattn.autotune.choice import choose
from fastattn.autotune.device import DeviceName, describe
from fastattn.autotune.key import Key, outdated
from fastattn.autotune.schema import MEASURED, Entry, Row, best
from fastattn.autotune.shape import distance
from fastattn.autotune.store import default_store, read_file, replace, shipped_store
from fastattn.kernels.settings import settings

# What a pin does not ask of a call.
_ANY = frozenset({"device", "threads", "triton", "compiler"})


def default_file() -> Path:
    """Where the cache's own pins are; the file turns deterministic mode on by being there."""
    return default_store().folder / "pins.json"


def pins_in_force() -> tuple[Path, list[Entry]] | None:
    """The file that calls go by, and its pins: none of a file that is damaged or gone, with a warning. None where
    nothing is pinned, and what was tuned is used."""
    named = settings().pins
    file = default_file() if named is None else named
    if named is None and not os.path.lexists(file):
        return None
    return file, read_file(file, missing="it is not there")


def pin_for(key: Key, pins: Iterable[Entry]) -> tuple[Key, Row] | None:
    """The pin that serves a call of ``key``, at the nearest counts."""
    fits = []
    for pin in pins:
        apart, row = distance(key.shape, pin.key.shape), best(pin.rows)
        if set(key.differences(pin.key)) <= _ANY and apart < float("inf") and row is not None:
            fits.append((apart, pin.key.identity(), pin.key, row))
    return min(fits, key=lambda fit: fit[:2])[2:] if fits else None


def pins_of(own: Sequence[Entry], shipped: Sequence[Entry], here: Collection[DeviceName]) -> list[Entry]:
    """What lookups answer now, as pins: one for each kernel, dtype, shape and flags of every architecture.

    own, shipped: as for :func:`~fastattn.autotune.choice.choose`. Where devices of an architecture would get different
    configurations, measured ones come first, and then those of the machine's own devices, ``here``. Rows for other code
    than this installation's make no pins.
    """
    found: dict[str, tuple[tuple[object, ...], Entry]] = {}
    for key in {entry.key.identity(): entry.key for entry in [*own, *shipped]}.values():
        if not _is_current(key):
            continue
        row = choose(key, _of_same(key, own), lambda key=key: _of_same(key, shipped)).row
        if row is None:
            continue
        is_here = DeviceName(key.arch, key.device, key.threads) in here
        rank = (row.label != MEASURED, not is_here, key.identity())
        name = _identity(key)
        if name not in found or rank < found[name][0]:
            found[name] = (rank, Entry(key=key, rows=[row]))
    return [entry for _, entry in found.values()]


def pin_everything(file: Path, *, renew: bool = False) -> tuple[int, int]:
    """Writes what calls get now (:func:`pins_of`) to ``file``; pins that stand there stay, unless ``renew``.

    Returns (pins, those of them that are new or changed). Raises as :meth:`~fastattn.autotune.store.Store.add` does; a
    file that cannot be read is moved aside.
    """
    own, shipped = default_store().read(), shipped_store().read()
    here = [describe(torch.device("cpu"))]
    here += [describe(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    for folder in (file.parent, default_store().folder):
        folder.mkdir(parents=True, exist_ok=True)
    with default_store().locked():
        present = {_identity(pin.key): pin for pin in read_file(file, aside=True)}
        best_now = {_identity(pin.key): pin for pin in pins_of(own, shipped, here)}
        pins = present | best_now if renew else best_now | present
        replace(file, pins.values())
    return len(pins), sum(present.get(name) != pin for name, pin in pins.items())


def _identity(key: Key) -> str:
    """Equal for keys that one pin serves."""
    return json.dumps(key.model_dump(mode="json", exclude=set(_ANY)), sort_keys=True)


def _of_same(key: Key, entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if (entry.key.kernel, entry.key.arch) == (key.kernel, key.arch)]


def _is_current(key: Key) -> bool:
    try:
        return not outdated(key)
    except ValueError:  # a kernel that this fastattn does not have
        return False
