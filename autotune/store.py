"""The cache on disk: whole files are read without a lock, and replaced in one step under one lock for the folder."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
        """The files of a kernel and of an architecture; None is any. A folder that can't be read gives one warning."""
        start = "" if arch is None else f"{_slug(arch)}--"
        name = None if kernel is None else f"{_slug(kernel)}.json"
        folders = [
            self.folder / folder for folder in _names(self.folder) if "--" in folder and folder.startswith(start)
        ]
        return [folder / file for folder in folders for file in _names(folder) if _is_cache(file, name)]

    def read(self, kernel: str | None = None, arch: str | None = None) -> list[Entry]:
        """What those files hold; a file that cannot be read is left as it is, with one warning."""
        return [entry for file in self.files(kernel, arch) for entry in read_file(file)]

    def add(self, key: Key, rows: Iterable[Row]) -> None:
        """Writes rows; what other processes wrote meanwhile stays. A file that cannot be read is moved aside first.

        When it returns, the rows are on disk, whatever becomes of this process. Raises TimeoutError where another
        process holds the lock for over a minute, OSError where the folder can't be written: then all is as it was.
        """
        self.add_entries([Entry(key=key, rows=list(rows))])

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """:meth:`add` of many keys: a file is rewritten once."""
        by_file: dict[Path, list[Entry]] = {}
        for entry in entries:
            by_file.setdefault(self.file(entry.key), []).append(entry)
        for file, new in by_file.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with self.locked():
                replace(file, merge(read_file(file, aside=True), new))

    def take_out(self, unwanted: Callable[[Entry], bool], backup: Path) -> list[Entry]:
        """Moves entries into the file ``backup``, beside those that are there, and returns them. Raises as :meth:`add`
        does."""
        if not self.folder.exists():
            return []
        taken: list[Entry] = []
        with self.locked():
            for file in self.files():
                known = [(entry, unwanted(entry)) for entry in read_file(file)]
                out = [entry for entry, goes in known if goes]
                if out:
                    replace(backup, merge(read_file(backup, aside=True), out))
                    kept = [entry for entry, goes in known if not goes]
                    if kept:
                        replace(file, kept)
                    else:
                        file.unlink()
                    taken += out
        return taken

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While nobody else writes into the folder, which exists. Raises as :meth:`add` does."""
        lock = FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire(poll_interval=0.005)
        except Timeout as error:
            raise TimeoutError(f"another process holds {lock.lock_file} for over {LOCK_SECONDS:.0f} s") from error
        except NotImplementedError as error:
            raise OSError(f"the file system of {self.folder} has no locks: keep the cache elsewhere") from error
        try:
            yield
        finally:
            lock.release()


def read_file(file: Path, aside: bool = False, missing: str | None = None) -> list[Entry]:
    """The entries of a cache file; none, with one warning, of one that cannot be read. aside: such a file is given
    another name, to make room for a new one; OSError where even that can't be done. missing: what the warning says of a
    file that is not there; None gives no warning."""
    try:
        return load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing:
            _warn_once(file, missing, "")
    except OSError as error:
        if aside:
            raise
        _warn_once(file, f"it cannot be read ({error})", "")
    except (Unreadable, UnicodeDecodeError) as error:
        kept = f"; it is kept as {move_aside(file, 'unreadable').name}" if aside else ""
        _warn_once(file, str(error), kept)
    return []


def default_store() -> Store:
    """The user's cache."""
    return Store(settings().cache_dir / "tune")


def shipped_store() -> Store:
    """The cache that comes with the package; it is only read."""
    return Store(Path(__file__).parent / "shipped")


def move_aside(file: Path, why: str) -> Path:
    """Gives a file the name ``<name>.<why>-<number>``, which is free, and returns it."""
    number = 1
    while (target := file.with_name(f"{file.name}.{why}-{number}")).exists():
        number += 1
    file.rename(target)
    return target


def replace(file: Path, entries: Iterable[Entry]) -> None:
    """Writes a cache file in one step: a reader sees the old one or the new one, whole. Who writes holds the folder's
    lock."""
    # so whoever left a temporary file behind is dead
    for leftover in file.parent.glob(f".{file.name}.*.tmp"):
        leftover.unlink(missing_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(dump(entries))
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(temporary, file)
    except BaseException:  # a full disk, or the user's Ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")


def _is_cache(file: str, name: str | None) -> bool:
    return file == name if name is not None else file.endswith(".json") and not file.startswith(".")


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        _warn_once(folder, f"it cannot be read ({error})", "")
        return []


def _warn_once(file: Path, reason: str, kept: str) -> None:
    with _warned_lock:
        if (file, kept) in _warned:
            return
        _warned.add((file, kept))
    warnings.warn(f"the tuning cache {file} is ignored: {reason}{kept}", RuntimeWarning, stacklevel=4)
