"""The cache on disk: whole files are read without a lock, and replaced in one step under one lock for the folder."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from fastattn.autotune.key import Key
from fastattn.autotune.schema import Entry, Row, Unreadable, dump, load, merge
from fastattn.kernels.settings import settings

LOCK_SECONDS = 60.0

_warned: set[tuple[Path, str]] = set()
_warned_lock = threading.Lock()


class Store:
    """A folder of cache files: ``<arch>--<device>/<kernel>.json``. Nothing is made before something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, key: Key) -> Path:
        """Where the rows of ``key`` are kept."""
        return self.folder / f"{_slug(key.arch)}--{_slug(key.device)}" / f"{_slug(key.kernel)}.json"

    def files(self, kernel: str | None = None, arch: str | None = None) -> list[Path]:
        """The files of a kernel and of an architecture; None is any."""
        pattern = f"{_slug(arch) if arch else '*'}--*/{_slug(kernel) if kernel else '*'}.json"
        return sorted(self.folder.glob(pattern))

    def read(self, kernel: str | None = None, arch: str | None = None) -> list[Entry]:
        """What those files hold; a file that cannot be read is left as it is, with one warning."""
        return [entry for file in self.files(kernel, arch) for entry in self._read(file)]

    def add(self, key: Key, rows: Iterable[Row]) -> None:
        """Writes rows; what other processes wrote meanwhile stays. A file that cannot be read is moved aside first.

        Raises TimeoutError where another process holds the lock for over a minute, OSError where the folder can't be
        written.
        """
        file = self.file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
        try:
            with lock:
                known = self._read(file, aside=True)
                _replace(file, dump(merge(known, [Entry(key=key, rows=list(rows))])))
        except Timeout as error:
            raise TimeoutError(f"another process holds {lock.lock_file} for over {LOCK_SECONDS:.0f} s") from error

    def _read(self, file: Path, aside: bool = False) -> list[Entry]:
        try:
            return load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except OSError as error:
            if aside:
                raise
            _warn_once(file, f"it cannot be read ({error})", "")
        except (Unreadable, UnicodeDecodeError) as error:
            kept = ""
            if aside:
                kept = f"; it is kept as {_move_aside(file).name}"
            _warn_once(file, str(error), kept)
        return []


def default_store() -> Store:
    """The user's cache."""
    return Store(settings().cache_dir / "tune")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")


def _replace(file: Path, text: str) -> None:
    # the lock is ours, so whoever left a temporary file behind is dead
    for leftover in file.parent.glob(f".{file.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
    os.replace(temporary, file)


def _move_aside(file: Path) -> Path:
    number = 1
    while (target := file.with_name(f"{file.name}.unreadable-{number}")).exists():
        number += 1
    file.rename(target)
    return target


def _warn_once(file: Path, reason: str, kept: str) -> None:
    with _warned_lock:
        if (file, kept) in _warned:
            return
        _warned.add((file, kept))
    warnings.warn(f"the tuning cache {file} is ignored: {reason}{kept}", RuntimeWarning, stacklevel=4)
