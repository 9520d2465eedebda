"""Builds generated kernels under AddressSanitizer and UBSan and runs them in a small program of their own."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.cpu import build
from fastattn.kernels.cpu.emit import generate
from fastattn.kernels.cpu.frontend import ttir
from fastattn.kernels.cpu.machine import Level, supported_levels
from fastattn.kernels.launch import Launch, run, signature

HOST = Path(__file__).with_name("host.cc")
PLACES = ("heap", "before", "behind")  # where the host puts tensors: see host.cc
LEVELS = supported_levels()
# the best level of each width of vectors: most of the generated code depends on no more
WIDTHS = list({level.lanes: level for level in reversed(LEVELS)}.values())[::-1]
TIME_LIMIT_S = 60
# how far results may be apart: sums run in another order, and products are contracted elsewhere, at other widths and
# optimisation levels; what is rounded to 16 bits on the way may then fall to the other side
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

# what a kernel's arithmetic means stays as the engine has it; how its object is made, and how fast it is, does not
_MEANING = [flag for flag in build.FLAGS if flag not in ("-O3", "-fPIC", "-shared", "-fvisibility=hidden")]
_SANITIZE = [
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1",
    # AddressSanitizer sees these too, and without them building takes half as long
    "-fno-sanitize=null,object-size",
]  # fmt: skip
# buffers and vectors start as garbage that is the same each time and stands out, so reading it shows in the result
POISON = "-ftrivial-auto-var-init=pattern"
# checks are calls and not inline: twice as quick to build
_CALLS = "--param=asan-instrumentation-with-call-threshold=0"
_ENVIRONMENT = {
    # tensors stand far apart, so that what misses one does not hit another; leaks can't be looked for under a debugger
    "ASAN_OPTIONS": "redzone=2048:detect_leaks=0:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
}


class Reported(AssertionError):
    """What a sanitizer said, in its first lines."""


@cache
def why_not() -> str:
    """Why no sanitized program can be built and run here; empty where one can."""
    compiler = build.find_compiler()
    if compiler is None:
        return "sanitized kernels need a C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "empty.cc", Path(folder) / "empty"
        source.write_text("int main() { return 0; }\n")
        for command in ([compiler.path, *_SANITIZE, str(source), "-o", str(program)], [str(program)]):
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            if said.returncode != 0:
                return f"{compiler.path} has no AddressSanitizer or UBSan that works here: {said.stderr.strip()[:200]}"
    return ""


@cache
def knows(flag: str) -> bool:
    """Whether the compiler takes a flag that not every one has."""
    command = [build.require_compiler().path, "-Werror", flag, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True, check=False).returncode == 0


def _flags() -> list[str]:
    return [*_SANITIZE, *filter(knows, (POISON, _CALLS))]


def _compile(*words: str | Path) -> None:
    command = [build.require_compiler().path, *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=build.TIME_LIMIT_S)
    assert said.returncode == 0, f"{' '.join(command)}\n{said.stderr[:2000]}"


@cache
def _host(folder: Path) -> Path:
    made = folder / "host.o"
    _compile("-std=c++17", *_flags(), "-c", HOST, "-o", made)
    return made


def program_of(source: str, name: str, level: Level, folder: Path) -> Path:
    """The program that runs the generated file ``source`` at ``level``; built once in a folder."""
    stem = f"{name}-{level.name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    text, made = folder / f"{stem}.cc", folder / stem
    if not made.exists():
        text.write_text(source)
        _compile(*_MEANING, *level.flags, *_flags(), text, _host(folder), "-o", made)
    return made


def programs_of(launches: Sequence[Launch], level: Level, folder: Path) -> list[Path]:
    """The program of each launch; launches that differ in values alone share one."""
    sources = [generate(ttir(launch.kernel, *signature(launch)), level.lanes) for launch in launches]
    names = {source: launch.kernel.__name__ for source, launch in zip(sources, launches, strict=True)}
    _host(folder)
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: program_of(source, names[source], level, folder), names)
        by_source = dict(zip(names, made, strict=True))
    return [by_source[source] for source in sources]


def run_program(program: Path, launch: Launch, place: str) -> None:
    """Runs the launch in ``program``, with its tensors at ``place``, and takes over what it wrote.

    Raises:
        Reported: a sanitizer found something, or the program ended in another way than it should.
    """
    pieces = {whole.data_ptr(): whole for whole in map(_storage, _tensors(launch))}
    number = {address: at for at, address in enumerate(pieces)}
    words = [struct.pack("<4q", *launch.grid, *(1,) * (3 - len(launch.grid)), len(pieces))]
    words += [part for whole in pieces.values() for part in (struct.pack("<q", whole.nbytes()), _bytes(whole).numpy())]
    types, _ = signature(launch)
    given = [(launch.args[name], kind) for name, kind in types.items() if kind != "constexpr"]
    words += [struct.pack("<q", len(given))]
    for value, kind in given:
        if isinstance(value, Tensor):
            offset = value.storage_offset() * value.element_size()
            words += [struct.pack("<2q", number[_storage(value).data_ptr()], offset)]
        else:
            words += [struct.pack("<q", -1), struct.pack({"fp32": "<f4x", "fp64": "<d"}.get(kind, "<q"), value)]
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        given_file, left_file = Path(folder) / "given", Path(folder) / "left"
        given_file.write_bytes(b"".join(words))
        command = [program, given_file, left_file, place]
        environment = os.environ | _ENVIRONMENT
        said = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S, env=environment
        )
        if said.returncode != 0:
            lines = [line for line in said.stderr.splitlines() if line.strip(" =")]
            raise Reported(f"{program.name}, {place}: exit status {said.returncode}\n" + "\n".join(lines[:10]))
        left = bytearray(left_file.read_bytes())
    at = 0
    for whole in pieces.values():
        if whole.nbytes():
            _bytes(whole).copy_(torch.frombuffer(left, dtype=torch.uint8, count=whole.nbytes(), offset=at))
            at += whole.nbytes()


def _tensors(launch: Launch) -> list[Tensor]:
    return [value for value in launch.args.values() if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _bytes(whole: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(whole)


def copies(launches: Sequence[Launch]) -> list[Launch]:
    """The same launches on copies of all of their memory; tensors that share some share it still."""
    made: dict[int, torch.UntypedStorage] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = _storage(value)
        if whole.data_ptr() not in made:
            made[whole.data_ptr()] = whole.clone()
        place = (made[whole.data_ptr()], value.storage_offset(), value.shape, value.stride())
        return torch.empty(0, dtype=value.dtype).set_(*place)

    return [replace(launch, args={name: copy(value) for name, value in launch.args.items()}) for launch in launches]


def check(launches: Sequence[Launch], level: Level, folder: Path) -> None:
    """The launches, run in order under the sanitizers, leave what the engine leaves in memory, and no report.

    folder: where programs are built, and found again.
    """
    programs = programs_of(launches, level, folder)
    left = {}
    for place in PLACES:
        left[place] = copies(launches)
        for program, launch in zip(programs, left[place], strict=True):
            run_program(program, launch, place)
    # only now: what the sanitizers report can end this process
    expected = copies(launches)
    run(expected)
    tolerance = max(_TOLERANCE.get(tensor.dtype, 0.0) for launch in launches for tensor in _tensors(launch))
    for place, mine in left.items():
        for one, other in zip(mine, expected, strict=True):
            for name, value in one.args.items():
                if isinstance(value, Tensor):
                    what = f"{one.kernel.__name__}, {level.name}, {place}: {name}"
                    _assert_close(value, other.args[name], tolerance, what)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Of the whole memory, not only of what the tensors show of it."""
    actual, expected = (torch.empty(0, dtype=x.dtype).set_(_storage(x)) for x in (actual, expected))
    if not actual.is_floating_point():
        tolerance = 0.0
    torch.testing.assert_close(
        actual, expected, equal_nan=True, rtol=tolerance, atol=tolerance, msg=lambda said: f"{what}\n{said}"
    )
