"""Tuning for GPUs that are not here: searches of many groups at a time, on as many compilers as there are cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from types import ModuleType
from typing import Any

from fastattn.autotune.binaries import Binaries, Job
from fastattn.autotune.compile_pool import Pool
from fastattn.autotune.devices import Device
from fastattn.autotune.key import outdated
from fastattn.autotune.rooms import room_of
from fastattn.autotune.schema import OK, Entry, Row, merge
from fastattn.autotune.search import MOST_COMPILES, Case, Group, Report, Search
from fastattn.autotune.store import Store, read_file
from fastattn.autotune.store import replace as replace_file

LIMIT_S = 60.0  # of a compile; those of good candidates take up to 15 s
COMPILE = "fastattn.autotune.binaries:compile_job"


def groups_of(
    kernels: Sequence[str], devices: Sequence[Device], dtypes: Sequence[str], head_dims: Sequence[int], *,
    sizes_of: Callable[[ModuleType, int], Sequence[Any]] | None = None, plain: bool = False,
) -> list[Group]:  # fmt: skip
    """All groups, architecture by architecture. A row of the cache that several groups would write, for dtype or head
    dim say nothing to a kernel, is the first one's.

    dtypes: torch's names. sizes_of: the sizes for a room and a head dim, in place of the representative ones. plain:
    only the first of a kernel's flags.
    """
    seen: set[str] = set()
    found = []
    for _, same in groupby(sorted(devices, key=lambda device: device.arch), key=lambda device: device.arch):
        one = tuple(same)
        for kernel, dtype, head_dim in product(kernels, dtypes, head_dims):
            room, group = room_of(kernel), Group(kernel, dtype, head_dim, one)
            cases = []
            wanted = room.representative(head_dim) if sizes_of is None else sizes_of(room, head_dim)
            for flags, sizes in product(room.flags(kernel)[: 1 if plain else None], wanted):
                case = Case(sizes, flags)
                name = group.key(case, one[0]).identity()
                if name not in seen:
                    seen.add(name)
                    cases.append(case)
            if cases:
                found.append(replace(group, cases=tuple(cases)))
    return found


def tune_offline(
    groups: Iterable[Group],
    binaries: Binaries,
    on_report: Callable[[Report], object],
    *,
    workers: int,
    compiles: int = MOST_COMPILES,
    limit_s: float = LIMIT_S,
    compiler: str = COMPILE,
    on_compile: Callable[[Group], object] | None = None,
) -> None:
    """Tells ``on_report`` of each of ``groups`` as it is done; several are at work at a time.

    Whatever was compiled is in ``binaries`` at once, and is not compiled again by whoever asks next. workers: processes
    that compile. compiles: at most so many a group. limit_s: a compile that takes longer is killed, and its candidate
    gets a row that says so. compiler: the function that workers call on a
    :class:`~fastattn.autotune.binaries.Job`. on_compile: is told of the group of each compile that is done.

    Raises RuntimeError where workers cannot start, OSError where ``binaries`` can't be written.
    """
    waiting = iter(groups)
    ready: list[tuple[Search, Job]] = []
    under_way: dict[str, list[Search]] = {}  # recipes, and who else waits for them

    def advance(search: Search) -> None:
        job = search.next()
        if job is None or search.asked is None:
            on_report(search.report())
        elif (recipe := search.asked[1]) in under_way:
            under_way[recipe].append(search)
        else:
            under_way[recipe] = []
            ready.append((search, job))

    def jobs() -> tuple[Search, Job] | None:
        while not ready:
            group = next(waiting, None)
            if group is None:
                return None
            advance(Search(group, binaries, compiles))
        return ready.pop(0)

    with Pool[Search](compiler, workers, limit_s) as pool:
        for answer in pool.results(jobs):
            search = answer.name
            assert search.asked is not None
            waited = under_way.pop(search.asked[1])
            search.tell(answer.result, answer.reason, answer.seconds)
            if on_compile is not None:
                on_compile(search.group)
            advance(search)
            for other in waited:
                other.look()
                advance(other)


def ship(entries: Iterable[Entry], folder: Path, most: int) -> None:
    """Writes entries to a folder that comes with the package: the fastest row, with what is behind its time, and the
    next ones, ``most`` in all; where none is usable, one that says why.

    Their earlier rows go, and so does what other kernels or compilers than these left in a file.
    """
    store = Store(folder)
    for file, new in _by_file(store, entries).items():
        names = {entry.key.identity() for entry in new}
        kept = [entry for entry in read_file(file) if not outdated(entry.key) and entry.key.identity() not in names]
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, merge(kept, [_shortened(entry, most) for entry in new]))


def _by_file(store: Store, entries: Iterable[Entry]) -> dict[Path, list[Entry]]:
    found: dict[Path, list[Entry]] = {}
    for entry in entries:
        found.setdefault(store.file(entry.key), []).append(entry)
    return found


def _shortened(entry: Entry, most: int) -> Entry:
    usable = [row for row in entry.rows if row.verdict == OK]
    first, *others = usable[:most] or entry.rows[:1]
    short = [Row(config=x.config, label=x.label, time_us=x.time_us, written=x.written) for x in others]
    return entry.model_copy(update={"rows": [first, *short]})
