"""Builds shared objects with the machine's C++ compiler and keeps them in the user's own cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import Unsupported
from ..settings import settings
from . import machine

# -fwrapv: Triton's integers wrap. Contraction to fma is wanted; every other liberty with floats is not.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fwrapv", "-fno-strict-aliasing",
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w",
)  # fmt: skip
TIME_LIMIT_S = 120


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
            said = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return Compiler(place, said.stdout.splitlines()[0] if said.stdout else "unknown")
    return None


def require_compiler() -> Compiler:
    compiler = find_compiler()
    if compiler is None:
        raise Unsupported("no C++ compiler was found (g++, clang++ or $CXX)")
    return compiler


@lru_cache
def _private_folder() -> Path:
    """A folder for this process alone, where the cache can't be written."""
    return Path(tempfile.mkdtemp(prefix="fastattn-"))


def cache_folder() -> Path:
    """The folder of built objects, made if missing.

    Loading an object is running code, so the folder must be the user's own and writable by no one else; a folder that
    can't be made or written gives way to a temporary one.

    Raises:
        Unsupported: the folder belongs to, or can be written by, somebody else.
    """
    folder = settings().cache_dir / "cpu"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _private_folder()
    state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise Unsupported(f"the cache folder {folder} is not this user's own, or others can write to it")
    return folder if os.access(folder, os.W_OK) else _private_folder()


def load(name: str, key: Sequence[str], source: Callable[[], str], level: machine.Level) -> ctypes.CDLL:
    """The shared object built from ``source()``, from the cache where ``key`` was built before.

    name: for people who look into the folder. key: everything that the source depends on; the compiler, its flags and
    the processor are added here.

    Raises:
        Unsupported: there is no compiler, or it fails or takes longer than :data:`TIME_LIMIT_S`.
    """
    compiler = require_compiler()
    parts = [*key, compiler.path, compiler.version, *FLAGS, *level.flags, machine.fingerprint()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{digest}.so"
    if not _is_whole(path):
        _build(compiler, source(), path, level)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unsupported(f"what {compiler.path} built can't be loaded: {error}") from error


def _is_whole(path: Path) -> bool:
    """Whether the object is there as it was built: loading a truncated one can end the process."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _build(compiler: Compiler, source: str, path: Path, level: machine.Level) -> None:
    text = path.with_suffix(".cc")
    # built beside its place and moved there whole, so that no other process ever sees half of it
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        inner, built = Path(folder) / text.name, Path(folder) / path.name
        inner.write_text(source)
        command = [compiler.path, *FLAGS, *level.flags, str(inner), "-o", str(built)]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise Unsupported(f"{compiler.path} took longer than {TIME_LIMIT_S} s") from error
        except OSError as error:
            raise Unsupported(f"{compiler.path} can't be run: {error}") from error
        if said.returncode != 0:
            lines = said.stderr.strip().splitlines() or ["it said nothing"]
            telling = next((line for line in lines if "error" in line), lines[0])
            raise Unsupported(f"{compiler.path} failed: {telling[:300]}")
        digest = Path(folder) / "sha256"
        digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        os.replace(inner, text)
        os.replace(built, path)
        os.replace(digest, path.with_suffix(".sha256"))
