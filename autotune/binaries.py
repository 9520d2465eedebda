"""What kernels' binaries cost on GPUs that are not here: compiled in other processes, and remembered.

A compile takes seconds, and what it tells never changes: figures are written as they come, a line each, so that whoever
is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastattn.autotune.bounds import Tiles, tiles_of
from fastattn.autotune.device import machine_compiler, triton_version
from fastattn.autotune.rooms import room_of
from fastattn.autotune.source import source_hash
from fastattn.kernels.ahead import Compiled, compile_launch
from fastattn.kernels.config import FP_FUSION, Config
from fastattn.kernels.launch import Launch, signature


@dataclass(frozen=True)
class Job:
    """What is compiled: the example launch of a room, which only its process makes. target: as
    :attr:`fastattn.autotune.devices.Device.target`. sizes: the room's ``Sizes``. dtype: torch's name."""

    kernel: str
    target: str
    dtype: str
    sizes: Any
    flags: Mapping[str, Any]
    config: Config

    def launch(self) -> Launch:
        dtype = getattr(torch, self.dtype)
        return room_of(self.kernel).example(self.kernel, self.sizes, dtype, self.target, self.config, self.flags)


@dataclass(frozen=True)
class Figures:
    """What is kept of a :class:`~fastattn.kernels.ahead.Compiled`, by its names; or ``reason``, why there is none."""

    target: str = ""
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int = 0
    num_warps: int = 4
    instructions: Counter[str] = field(default_factory=Counter, hash=False)
    tensor_core_instructions: Counter[str] = field(default_factory=Counter, hash=False)
    seconds: float = 0.0
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value not in (None, "")}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Figures:
        counts = {name: Counter(fields.get(name, {})) for name in ("instructions", "tensor_core_instructions")}
        return Figures(**{**fields, **counts})


def compile_job(job: Job) -> Figures:
    """Compiles, in a worker of :class:`~fastattn.autotune.compile_pool.Pool`; errors of the compiler pass through."""
    with _no_cache():
        return figures_of(compile_launch(job.launch(), job.target))


def figures_of(compiled: Compiled) -> Figures:
    return Figures(
        compiled.target, compiled.registers, compiled.spill_bytes, compiled.shared_bytes, compiled.num_warps,
        compiled.instructions, compiled.tensor_core_instructions,
    )  # fmt: skip


@contextmanager
def _no_cache() -> Iterator[None]:
    """Triton keeps every stage of every compile, which nobody asks for again."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def recipe_of(job: Job) -> str:
    """A hash of all that a binary depends on. Calls of different sizes may share it, for most sizes are arguments."""
    launch = job.launch()
    by_16 = [name for name, value in launch.args.items() if type(value) is int and value % 16 == 0]
    arch = job.target.split(":")[1]
    compiler = machine_compiler(f"sm_{arch}" if job.target.startswith("cuda:") else arch)
    return _hash(*_ir(job, launch), job.target, sorted(by_16), launch.config.to_dict(), compiler, FP_FUSION)


def _ir(job: Job, launch: Launch) -> tuple[object, ...]:
    """All that Triton's IR depends on."""
    types, constants = signature(launch)
    return job.kernel, source_hash(job.kernel), triton_version(), types, {name: str(x) for name, x in constants.items()}


def _hash(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


class Binaries:
    """What is known of binaries, in ``<target>/<kernel>.jsonl`` of a folder, and of kernels' IR, in ``ir/``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Lines] = {}

    def figures(self, job: Job, recipe: str) -> Figures | None:
        """What a compile of ``job`` gave, whose :func:`recipe_of` is ``recipe``; None where there was none."""
        fields = self._lines(job.target.replace(":", "-"), job.kernel).get(recipe)
        return None if fields is None else Figures.from_dict(fields)

    def add(self, job: Job, recipe: str, figures: Figures) -> None:
        """Raises OSError where the folder can't be written."""
        self._lines(job.target.replace(":", "-"), job.kernel).add(recipe, figures.to_dict())

    def tiles(self, job: Job) -> Tiles:
        """What the IR of ``job`` has; nothing where it can't be had, so that the compiler will tell."""
        launch, lines = job.launch(), self._lines("ir", job.kernel)
        name = _hash(*_ir(job, launch))
        fields = lines.get(name)
        if fields is None:
            try:
                tiles = tiles_of(launch)
            except Exception:  # whatever Triton's front end raises
                tiles = Tiles()
            fields = vars(tiles)
            lines.add(name, fields)
        return Tiles(**{**fields, "products": tuple((m, n) for m, n in fields["products"])})

    def _lines(self, folder: str, kernel: str) -> Lines:
        file = self.folder / folder / f"{kernel}.jsonl"
        if file not in self._files:
            self._files[file] = Lines(file)
        return self._files[file]


class Lines:
    """A file of facts by name, a line each, which only ever gets more: several processes may add to it, and one that is
    killed at it spoils no line but its own."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, dict[str, Any]] = {}
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for line in text.splitlines():
            try:
                name, fields = json.loads(line)
            except ValueError:
                continue  # never finished: it is found out again
            self._known[name] = fields

    def get(self, name: str) -> dict[str, Any] | None:
        return self._known.get(name)

    def add(self, name: str, fields: dict[str, Any]) -> None:
        self._known[name] = fields
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps([name, fields]) + "\n"
        descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = "\n" + line  # who wrote before was killed at it
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
