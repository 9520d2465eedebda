"""The folder of built objects: the user's own, shared by processes, bounded, and safe to lose at any time.

An entry is three files of one name: the object (.so, .o for what is yet to be linked, or .gch for a precompiled
header), its source (.cc, for people) and its checksum (.sha256). The time of the object is that of its last use.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import Unsupported
from ..settings import settings

# An object takes some 60 KiB with its source: thousands of kernels, a small part of any disk.
BOUND_BYTES = 512 * 2**20
# Objects that came with the package; `fastattn build --cpu --output` fills such a folder.
SHIPPED = Path(__file__).parent / "prebuilt"
BUILD_PREFIX = "fastattn-build-"
_STAGING_PREFIX = "build-"
_LEFT_OVER_S = 3600  # longer than any build may take
_OBJECTS = (".so", ".o", ".gch")
_SUFFIXES = (".cc", *_OBJECTS, ".sha256")


def place() -> Path:
    """Where the folder of built objects is, or will be."""
    return settings().cache_dir / "cpu"


def cache_folder() -> Path:
    """:func:`place`, made if missing.

    Loading an object is running code, so the folder must be the user's own (or root's) and writable by no one else.

    Raises:
        Unsupported: the folder belongs to, or can be written by, somebody else.
        OSError: there is none and it can't be made.
    """
    folder = place()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    open_to_others = state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if hasattr(os, "getuid") and (state.st_uid not in (os.getuid(), 0) or open_to_others):
        raise Unsupported(f"the cache folder {folder} is not this user's own, or others can write to it")
    return folder


def private_folder() -> Path:
    """A folder for this process alone, for what the cache can't take; it goes when the process ends."""
    return _folder_of(os.getpid())


@lru_cache
def _folder_of(owner: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fastattn-"))

    def remove() -> None:
        if os.getpid() == owner:  # a forked child leaves what its parent has
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def is_whole(path: Path) -> bool:
    """Whether the object is there as it was built: loading a truncated one can end the process."""
    try:
        return _checksum(path) == path.with_suffix(".sha256").read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def used(path: Path) -> None:
    """Marks an object as used now."""
    with suppress(OSError):
        os.utime(path)


@contextmanager
def being_built(path: Path, limit_s: float) -> Iterator[None]:
    """Lets one process at a time build ``path``: the others wait until it has, or has died, or ``limit_s`` is over.

    Where there can be no lock there is none: then both build, and the later one replaces the same with the same.
    """
    lock = FileLock(path.with_suffix(".lock"), timeout=limit_s)
    with suppress(OSError, NotImplementedError, Timeout):
        lock.acquire(poll_interval=0.05)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):
                os.unlink(lock.lock_file)  # whoever waited for it finds the object
            lock.release()


def put(built: Path, path: Path) -> None:
    """Moves the object ``built``, with the source beside it, to ``path``, so that nobody ever sees half of it.

    Raises OSError where it can't be written.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_STAGING_PREFIX) as staging:
        staged = Path(staging) / path.name
        shutil.copyfile(built.with_suffix(".cc"), staged.with_suffix(".cc"))
        shutil.copy(built, staged)
        staged.with_suffix(".sha256").write_text(_checksum(built))
        for suffix in (".cc", path.suffix, ".sha256"):  # the checksum makes an entry whole
            os.replace(staged.with_suffix(suffix), path.with_suffix(suffix))


@dataclass(frozen=True)
class Entry:
    """files: all of one object. used: when it was built or last loaded, in seconds since the epoch."""

    files: tuple[Path, ...]
    size: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """What ``folder`` holds, the least recently used first; empty where it can't be read."""
    found: dict[str, list[tuple[Path, os.stat_result]]] = defaultdict(list)
    with suppress(OSError), os.scandir(folder) as files:
        for file in files:
            path = Path(file.path)
            if path.suffix in _SUFFIXES:
                with suppress(OSError):  # gone since
                    found[path.stem].append((path, file.stat()))
    every = [
        Entry(
            files=tuple(path for path, _ in files),
            size=sum(state.st_size for _, state in files),
            used=max((state.st_mtime for path, state in files if path.suffix in _OBJECTS), default=0.0),
        )
        for files in found.values()
    ]
    return sorted(every, key=lambda entry: entry.used)


def tidy(built: Path) -> None:
    """What follows a build in the cache: keeps its folder within bounds, and removes what killed builds left behind."""
    evict(built.parent, built)
    _sweep(built.parent)


def evict(folder: Path, keep: Path) -> None:
    """Removes the least recently used entries until the rest fits the bound; never ``keep``, and never with an error.

    A process that has loaded an object keeps it: its file goes when the last one lets go.
    """
    every = entries(folder)
    excess = sum(entry.size for entry in every) - BOUND_BYTES
    for entry in every:
        if excess <= 0:
            return
        if keep not in entry.files:
            excess -= entry.size
            for path in sorted(entry.files):  # .cc, .sha256, .so: without its checksum no one takes it for whole
                with suppress(OSError):
                    path.unlink()


@lru_cache
def _sweep(folder: Path) -> None:
    """Removes what killed builds left behind in ``folder`` and among temporary files; once in a process."""
    with suppress(OSError):
        for place, prefix in ((folder, _STAGING_PREFIX), (Path(tempfile.gettempdir()), BUILD_PREFIX)):
            for left in place.glob(f"{prefix}*"):
                if left.is_dir() and not left.is_symlink() and time.time() - left.stat().st_mtime > _LEFT_OVER_S:
                    shutil.rmtree(left, ignore_errors=True)
