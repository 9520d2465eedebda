"""What all generated code begins with, as g++ keeps a precompiled header: to read it is half of a kernel's build."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from . import machine, objects

# The first builds of a process do without: who builds so many will build more, and making it costs two of them.
BUILDS_BEFORE = 3
LIMIT_S = 60  # it takes two
HEADER = "prelude.h"

_known: dict[Path, Path | None] = {}  # None: it can't be had
_builds: Counter[Path] = Counter()
_making = threading.Lock()


def precompiled(
    text: str, command: Sequence[str], version: str, folder: Path, run: Callable[[Sequence[str], str], int]
) -> Path | None:
    """The precompiled header of ``text`` in the cache's ``folder``, made there if it is time for that, or None.

    command: the compiler with its flags. version: what it says of itself; only g++ takes a header in this form.
    run: runs a command in a folder and returns its exit status.
    """
    if not text or "clang" in version:
        return None
    key = "\0".join([text, *command, version, machine.fingerprint()])
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = folder / f"prelude-{name}.gch"
    if path not in _known and objects.is_whole(path):
        _known[path] = path
    if path in _known:
        if _known[path] is not None:
            objects.used(path)
        return _known[path]
    _builds[path] += 1
    if _builds[path] <= BUILDS_BEFORE or not _making.acquire(blocking=False):
        return None
    try:
        with objects.being_built(path, LIMIT_S):
            _known[path] = path if objects.is_whole(path) or _made(text, command, path, run) else None
    finally:
        _making.release()
    return _known[path]


def shortened(text: str, prelude: str, header: Path, folder: Path) -> Path:
    """A source in ``folder`` that means ``text``, whose beginning ``prelude`` it takes from ``header``.

    Where the compiler doesn't like that, for it is another one after all, it reads the plain header beside it.
    """
    (folder / HEADER).write_text(prelude)
    (folder / f"{HEADER}.gch").symlink_to(header)
    source = folder / "short.cc"
    source.write_text(f'#include "{HEADER}"\n{text.removeprefix(prelude)}')
    return source


def forget() -> None:
    """Lets the next build look again."""
    _known.clear()
    _builds.clear()


def _made(text: str, command: Sequence[str], path: Path, run: Callable[[Sequence[str], str], int]) -> bool:
    # whatever goes wrong here, the kernel's own build will tell
    with suppress(Exception), tempfile.TemporaryDirectory(prefix=objects.BUILD_PREFIX) as folder:
        built = Path(folder) / path.name
        source = built.with_suffix(".cc")
        source.write_text(text)
        if run([*command, "-x", "c++-header", source.name, "-o", built.name], folder) == 0:
            objects.put(built, path)
            return True
    return False
