"""Looking after caches: what of one is still of use, and in what two of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from fastattn.autotune.key import Key, outdated
from fastattn.autotune.schema import MEASURED, MODELLED, OK, Entry, Row, Unreadable, best, load
from fastattn.autotune.source import ROOMS
from fastattn.autotune.store import Store


@dataclass
class Report:
    """What a file has. error: why it cannot be read, or None. entries, rows: how many. unused: rows that are not for
    use, by reason: their verdict, or what does not fit their kernel. stale: entries for other code than this
    installation's, by what differs."""

    file: Path
    error: str | None = None
    entries: int = 0
    rows: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    stale: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Difference:
    """What two caches have for one key. first, second: the row that each would give; None where it has none."""

    key: Key
    first: Row | None
    second: Row | None

    @property
    def same_config(self) -> bool:
        return self.first is not None and self.second is not None and self.first.config == self.second.config

    @property
    def ratio(self) -> float | None:
        """The second's time over the first's."""
        if self.first is None or self.second is None or not self.first.time_us or not self.second.time_us:
            return None
        return self.second.time_us / self.first.time_us


def entries_at(place: Path) -> list[Entry]:
    """All entries of a cache file, of a folder of them, or of a cache folder with its ``tune/``.

    Raises FileNotFoundError where there is nothing, :class:`~fastattn.autotune.schema.Unreadable`, which names it, for
    a file that is damaged: what is to be merged or compared is not read by half.
    """
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    files = [place] if place.is_file() else store_at(place).files()
    found = []
    for file in files:
        try:
            found += load(file.read_text(encoding="utf-8"))
        except (Unreadable, UnicodeDecodeError) as error:
            raise Unreadable(f"{file}: {error}") from error
    return found


def store_at(folder: Path) -> Store:
    """The store in a folder, or in its ``tune/``, as the cache folder has it."""
    return Store(folder / "tune" if (folder / "tune").is_dir() else folder)


def chosen(rows: Iterable[Row]) -> Row | None:
    """The row that a lookup of their own key would give: the best measured one, else the best modelled one."""
    rows = list(rows)
    return best(rows, MEASURED) or best(rows, MODELLED)


def staleness(key: Key) -> str | None:
    """Why rows under ``key`` serve nobody here any more, in words; None where they do."""
    try:
        changed = outdated(key)
    except (ValueError, ImportError) as error:
        return str(error)
    return f"for another {' and '.join(changed)}" if changed else None


def check(file: Path) -> Report:
    """Reads a file and looks at all that it has. Never raises for what is wrong with it."""
    report = Report(file)
    try:
        entries = load(file.read_text(encoding="utf-8"))
    except (OSError, Unreadable, UnicodeDecodeError) as error:
        report.error = str(error)
        return report
    for entry in entries:
        report.entries += 1
        report.rows += len(entry.rows)
        why = staleness(entry.key)
        if why is not None:
            report.stale[why] += 1
        report.unused.update(reason for row in entry.rows if (reason := _unused(entry.key, row, why is None)))
    return report


def _unused(key: Key, row: Row, is_current: bool) -> str | None:
    if row.verdict != OK:
        return row.verdict
    if row.config.model_extra:
        return f"unknown knobs ({', '.join(sorted(row.config.model_extra))})"
    if row.time_us is None:
        return "without a time"
    if is_current and set(row.config.blocks) != _block_names(key.kernel):
        return "with other blocks than its kernel's"
    return None


def _block_names(kernel: str) -> set[str]:
    spaces = [import_module(f"fastattn.kernels.{room}").TUNING.get(kernel) for room in ROOMS]
    return {name for space in spaces if space is not None for name in space.blocks}


def differences(first: Iterable[Entry], second: Iterable[Entry]) -> list[Difference]:
    """Every key for which one of two caches has a usable row, with what each would give."""
    sides = [{entry.key.identity(): entry for entry in side} for side in (first, second)]
    found = []
    for name in sorted({*sides[0], *sides[1]}):
        entries = [side.get(name) for side in sides]
        key = next(entry.key for entry in entries if entry is not None)
        rows = [None if entry is None else chosen(entry.rows) for entry in entries]
        if rows != [None, None]:
            found.append(Difference(key, *rows))
    return found
