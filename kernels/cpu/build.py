"""Builds shared objects with the machine's C++ compiler, unless they were built before, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ..errors import Unsupported, UnsupportedNow
from . import machine, objects, prelude

# -fwrapv: Triton's integers wrap. Contraction to fma is wanted; every other liberty with floats is not.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fwrapv", "-fno-strict-aliasing",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w",
)  # fmt: skip
TIME_LIMIT_S = 120  # a kernel takes 1 s


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str  # the first line of what it says of itself


def find_compiler() -> Compiler | None:
    """The C++ compiler: ``$CXX``, else the first of g++, clang++, c++ on the PATH that answers."""
    return _find_compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@lru_cache
def _find_compiler(chosen: str, path: str) -> Compiler | None:
    for name in [chosen] if chosen else ["g++", "clang++", "c++"]:
        place = shutil.which(name, path=path)
        if place is None:
            continue
        try:
            said = _run([place, "--version"], limit_s=20)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if said.returncode == 0:
            return Compiler(place, said.stdout.splitlines()[0] if said.stdout else "unknown")
    return None


def require_compiler() -> Compiler:
    compiler = find_compiler()
    if compiler is None:
        raise Unsupported("no C++ compiler was found (g++, clang++ or $CXX)")
    return compiler


def _run(command: Sequence[str], limit_s: float, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """``subprocess.run``, but with all that it started stopped when its time is over: g++'s work is done by cc1plus."""
    environment = os.environ | {"LC_ALL": "C"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=limit_s)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@dataclass(frozen=True)
class Recipe:
    """What a shared object is made from.

    name: for people who look into the folder. key: everything that the source depends on. source: makes the C++ text,
    where the object is not there yet. level: the instruction set. prelude: what the text begins with, where other
    recipes' texts begin so too. flags: more of the compiler's. suffix: ".so", or ".o" for an object that is to be
    linked, with "-c" among the flags.
    """

    name: str
    key: tuple[str, ...]
    source: Callable[[], str]
    level: machine.Level
    prelude: str = ""
    flags: tuple[str, ...] = ()
    suffix: str = ".so"

    def file_name(self, *more: str) -> str:
        parts = [*self.key, platform.machine(), self.level.name, *more]
        return f"{self.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}{self.suffix}"


def load(recipe: Recipe) -> ctypes.CDLL:
    """The shared object of ``recipe``: one that came with the package, or from the cache, or built now.

    Its key in the cache also holds the compiler, its flags and the processor. What the cache can't take (it is full, or
    read-only) serves this process from a temporary folder.

    Raises:
        Unsupported: there is no compiler, or what it builds can't be loaded.
        UnsupportedNow: the compiler fails or takes longer than :data:`TIME_LIMIT_S`, or nothing can be written.
    """
    # without a compiler, what narrower instruction sets give is better than nothing
    for level in [recipe.level] if find_compiler() else machine.supported_levels():
        path = objects.SHIPPED / replace(recipe, level=level).file_name()
        if objects.is_whole(path):
            with suppress(OSError):  # it may want another C library
                return ctypes.CDLL(str(path))
    for _ in range(3):
        path = _from_cache(recipe)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            if not path.exists():
                continue  # another process has just made room
            why = str(error).removeprefix(f"{path}: ")
            raise Unsupported(f"what {require_compiler().path} built can't be loaded: {why}") from error
        objects.used(path)
        return library
    raise UnsupportedNow("the cache of built kernels loses them at once")


def made(recipe: Recipe) -> Path:
    """Where the object is: in the cache, or in this process's own folder; built now if it was not there.

    Raises:
        Unsupported: as :func:`load`.
    """
    path = _from_cache(recipe)
    objects.used(path)
    return path


def is_built(recipe: Recipe, folder: Path | None = None) -> bool:
    """Whether the object is there: in ``folder``, or else where :func:`load` would find it."""
    if folder is not None:
        return objects.is_whole(folder / recipe.file_name())
    return objects.is_whole(objects.SHIPPED / recipe.file_name()) or objects.is_whole(_place(recipe))


def build(recipe: Recipe, folder: Path | None = None) -> None:
    """Builds the object without loading it, into the cache, or into ``folder`` for other machines of its level.

    Raises:
        Unsupported: as :func:`load`; also where it can't be written, for then it would be lost.
    """
    path = _place(recipe) if folder is None else folder / recipe.file_name()
    if _whole(recipe, path) != path:
        raise UnsupportedNow(f"{path.parent} can't be written")
    if folder is None:
        objects.tidy(path)


def _place(recipe: Recipe) -> Path:
    """Where the cache has the object, or would."""
    compiler = require_compiler()
    try:
        folder = objects.cache_folder()
    except OSError:
        folder = _private_folder()
    more = (compiler.path, compiler.version, *FLAGS, *recipe.level.flags, *recipe.flags, machine.fingerprint())
    return folder / recipe.file_name(*more)


def _private_folder() -> Path:
    try:
        return objects.private_folder()
    except OSError as error:
        raise UnsupportedNow(f"there is no place for temporary files: {error.strerror}") from error


def _from_cache(recipe: Recipe) -> Path:
    """The object's place, where it is now for certain whole."""
    path = _place(recipe)
    if objects.is_whole(path):
        return path
    path = _whole(recipe, path)
    objects.tidy(path)
    return path


def _whole(recipe: Recipe, path: Path) -> Path:
    """``path``, once some process has built the object there, or where this one had to put it."""
    with objects.being_built(path, TIME_LIMIT_S):
        return path if objects.is_whole(path) else _compile(recipe, path)


def _compile(recipe: Recipe, path: Path) -> Path:
    """Builds the object and puts it at ``path``, or into this process's own folder. Returns where it is."""
    compiler = require_compiler()
    # an object that can't be built does not stand for others, but a compiler that hangs would do so again
    _failures.check(str(path), compiler.path)
    text = recipe.source()
    start = time.monotonic()
    try:
        # apart from the cache, which may be full, read-only or far away
        with tempfile.TemporaryDirectory(prefix=objects.BUILD_PREFIX) as folder:
            built = Path(folder) / path.name
            source = built.with_suffix(".cc")
            source.write_text(text)
            command = [compiler.path, *FLAGS, *recipe.level.flags]
            sources = [source]
            # a folder for other machines gets objects alone
            place = path.parent if path.parent == objects.place() else _private_folder()
            header = prelude.precompiled(recipe.prelude, command, compiler.version, place, _status)
            if header is not None:
                sources.insert(0, prelude.shortened(text, recipe.prelude, header, Path(folder)))
            for source in sources:
                said = _run([*command, *recipe.flags, source.name, "-o", built.name], TIME_LIMIT_S, folder)
                if said.returncode == 0:
                    break
            else:
                raise _failures.note(str(path), f"{compiler.path} failed: {_telling(said)}", start)
            try:
                objects.put(built, path)
            except OSError:
                path = _private_folder() / path.name
                objects.put(built, path)
    except subprocess.TimeoutExpired as error:
        raise _failures.note(compiler.path, f"{compiler.path} took longer than {TIME_LIMIT_S} s", start) from error
    except OSError as error:
        raise _failures.note(str(path), f"nothing can be built: {error.strerror}", start) from error
    return path


def _status(command: Sequence[str], folder: str) -> int:
    return _run(command, TIME_LIMIT_S, folder).returncode


def _telling(said: subprocess.CompletedProcess[str]) -> str:
    """The compiler's own word for what was wrong, without places, which differ from kernel to kernel."""
    text = said.stderr.strip() or said.stdout.strip()
    error = re.search(r"\b(?:fatal |internal compiler )?error: .*", text)
    if error is None and said.returncode < 0:
        return f"it was ended by signal {-said.returncode}"
    return error[0][:300] if error else (text.splitlines() or ["it said nothing"])[0][:300]


class _Failures:
    """What could not be built, and until when nobody tries again: a full disk or a lack of memory may pass.

    The pause is a minute, or ten times as long as the attempt took, and doubles with each failure, so that trying
    costs next to nothing in the long run.
    """

    def __init__(self) -> None:
        self._of: dict[str, tuple[str, float, float]] = {}  # reason, end of the pause, its length

    def check(self, *names: str) -> None:
        for name in names:
            reason, end, _ = self._of.get(name, ("", 0.0, 0.0))
            if time.monotonic() < end:
                raise UnsupportedNow(reason)

    def note(self, name: str, reason: str, start: float) -> UnsupportedNow:
        now = time.monotonic()
        pause = max(60.0, 10 * (now - start), 2 * self._of.get(name, ("", 0.0, 0.0))[2])
        self._of[name] = reason, now + pause, pause
        return UnsupportedNow(reason)

    def forget(self) -> None:
        self._of.clear()


_failures = _Failures()


def forget() -> None:
    """Lets the next build try again what failed."""
    _failures.forget()
    prelude.forget()
