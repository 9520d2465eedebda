"""Which configuration a call gets, and why: measured before modelled, this very device before its relatives."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from fastattn.kernels.config import Config
from fastattn.kernels.settings import fingerprint

if TYPE_CHECKING:
    from fastattn.autotune.device import DeviceName
    from fastattn.autotune.key import Key
    from fastattn.autotune.schema import Entry, Row
    from fastattn.autotune.store import Store

_T = TypeVar("_T")
_MOST_ANSWERS = 4096  # shapes may differ at every call
_generations = count()


@dataclass(frozen=True)
class _Known:
    """What was read and answered since the last :func:`forget`, which puts a new one in place: whoever is still at work
    with the old one writes into what nobody asks any more, and no lock is needed.

    answers: by call. One call in a program's life reads files; the others end here. contents: of files, by what was
    asked of them.
    """

    generation: int = field(default_factory=lambda: next(_generations))
    answers: dict[tuple[Any, ...], Config | None] = field(default_factory=dict)
    contents: dict[Hashable, Any] = field(default_factory=dict)


_known = _Known()


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
    known = _known
    call = (kernel, device, dtype, *shape, *shape.values(), *flags, *flags.values(), stamp())
    try:
        return known.answers[call]
    except KeyError:
        pass
    config = explain(kernel, device, dtype, shape, flags).config
    if len(known.answers) >= _MOST_ANSWERS:
        known.answers.clear()
    known.answers[call] = config
    return config


def stamp() -> tuple[object, ...]:
    """Changes whenever :func:`lookup` may answer a question differently: who keeps its answers keeps this with them."""
    return _known.generation, torch.get_num_threads(), fingerprint()


def explain(
    kernel: str, device: torch.device | DeviceName, dtype: torch.dtype, shape: Mapping[str, int],
    flags: Mapping[str, Any],
) -> Choice:  # fmt: skip
    """What :func:`lookup` answers, with its reason; for a device that is not in this machine too, by its name."""
    # kernels need Triton, and the files' format needs pydantic: neither is for an import of fastattn to load
    try:
        from fastattn.autotune.device import describe
        from fastattn.autotune.key import key_for

        name = describe(device) if isinstance(device, torch.device) else device
        key = key_for(kernel, name, dtype, shape, flags)
    except ImportError as error:
        return Choice(None, f"no kernel can run here: {error}")
    from fastattn.autotune.pins import pin_for, pins_in_force
    from fastattn.autotune.store import default_store, shipped_store

    pinned = _read_once("pins", pins_in_force)
    if pinned is not None:
        file, pins = pinned
        found = pin_for(key, pins)
        if found is None:  # a heuristic is as steady as a pin, and what was tuned is not
            return Choice(None, f"not pinned in {file}, and while that is there, nothing tuned is used")
        return Choice(found[1].launch_config(), f"pinned in {file}", *found)

    def rows_of(store: Callable[[], Store]) -> list[Entry]:
        return _read_once((store, kernel, key.arch), lambda: store().read(kernel, key.arch))

    return choose(key, rows_of(default_store), lambda: rows_of(shipped_store))


def choose(key: Key, own: Sequence[Entry], shipped: Callable[[], Sequence[Entry]] = tuple) -> Choice:
    """The best row for ``key``. own: the user's entries. shipped: gives those that came with the package; asked only
    where nothing of one's own was measured on this very device.

    What was measured comes before what was modelled, and each on the same device before another of its architecture
    (of a CPU: first with another number of threads); of equals, one's own before shipped ones. Of the entries that are
    then left, the nearest length; of that, the fastest row. Results that were once found wrong, at whatever size, rule
    a configuration out, and a failure rules out what was only modelled.
    """
    from fastattn.autotune.schema import MEASURED, MODELLED

    places = {"": _fitting(key, own)}
    for why, label, may_differ in (
        ("measured on this device", MEASURED, set()),
        ("measured on this device with another number of threads", MEASURED, {"threads"}),
        ("measured on another device of this architecture", MEASURED, {"threads", "device"}),
        ("modelled for this device", MODELLED, {"threads"}),
        ("modelled for another device of this architecture", MODELLED, {"threads", "device"}),
    ):
        for place in ("", ", as shipped with fastattn"):
            if place not in places:
                places[place] = _fitting(key, shipped())
            near = [fit for fit in places[place] if fit.differ <= may_differ]
            found = _best(near, label, _ruled_out(chain(*places.values()), label))
            if found is not None:
                entry, row = found
                counts = f", at other lengths or counts ({_counts(entry.key)})" if entry.key.shape != key.shape else ""
                return Choice(row.launch_config(), why + place + counts, entry.key, row)
    return Choice(None, _why_not(key, [*own, *shipped()]))


def forget() -> None:
    """Lets the next lookup read the files anew."""
    global _known
    _known = _Known()


def _read_once(what: Hashable, read: Callable[[], _T]) -> _T:
    """``read()``, at most once for ``what`` and a place of the cache until :func:`forget`."""
    contents, name = _known.contents, (what, fingerprint())
    if name not in contents:
        contents[name] = read()
    return contents[name]


class _Fit(NamedTuple):
    """An entry for the code that a key names. apart: how far its shape is off; differ: which fields of its key do."""

    apart: float
    identity: str
    entry: Entry
    differ: set[str]


def _fitting(key: Key, entries: Iterable[Entry]) -> list[_Fit]:
    """Those of ``entries`` that may serve a call of ``key`` at all, the nearest first."""
    from fastattn.autotune.shape import distance

    found = []
    for entry in entries:
        fit = _Fit(distance(key.shape, entry.key.shape), entry.key.identity(), entry, _differences(key, entry.key))
        if fit.differ <= {"threads", "device"} and fit.apart < float("inf"):
            found.append(fit)
    return sorted(found, key=lambda fit: fit[:2])


def _differences(key: Key, other: Key) -> set[str]:
    """Fields in which two keys differ; one chip may have several names."""
    from fastattn.autotune.devices import devices

    differ = set(key.differences(other))
    names = {key.device, other.device}
    if differ == {"device"} and any(names <= {device.title, *device.also} for device in devices().values()):
        return set()
    return differ


def _ruled_out(fits: Iterable[_Fit], label: str) -> set[Config]:
    from fastattn.autotune.schema import MODELLED, OK, WRONG

    rows = [row for fit in fits for row in fit.entry.rows if not row.config.model_extra]
    return {row.launch_config() for row in rows if row.verdict == WRONG or (label == MODELLED and row.verdict != OK)}


def _best(fits: Iterable[_Fit], label: str, ruled_out: set[Config]) -> tuple[Entry, Row] | None:
    """The best row of the first entry that has one."""
    from fastattn.autotune.schema import best

    for fit in fits:
        row = best((row for row in fit.entry.rows if row.launch_config() not in ruled_out), label)
        if row is not None:
            return fit.entry, row
    return None


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
