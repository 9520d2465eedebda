"""Runs programs on the CPU engine: many in one shared object, in a process of their own; or one by ``launch.run``."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import multiprocessing
import re
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn.kernels.config import Config
from fastattn.kernels.cpu import build, emit, machine
from fastattn.kernels.cpu.frontend import ttir
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch, run, signature

from .evaluate import inputs
from .program import Program, source
from .values import from_bits, to_bits

TIME_LIMIT_S = 60
TORCH = {
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int1": torch.bool, "int8": torch.int8,
    "int16": torch.int16, "int32": torch.int32, "int64": torch.int64, "uint8": torch.uint8,
}  # fmt: skip
Buffers = dict[str, np.ndarray]


@dataclass
class Outcome:
    """What came of a program: its buffers as raw numbers, or why there are none."""

    buffers: Buffers | None = None
    failure: str = ""


def raw_inputs(program: Program) -> Buffers:
    """The buffers before the run as they lie in memory: bf16 as uint16, booleans as bytes."""
    kinds = {param.name: param.kind for param in program.params}
    return {name: np.ascontiguousarray(to_bits(x.data, kinds[name])) for name, x in inputs(program).items()}


def numbers(program: Program, raw: Buffers) -> Buffers:
    """What lies in memory, as float64 or integers. A boolean's byte other than 0 or 1 stays what it is."""
    kinds = {param.name: param.kind for param in program.params}
    return {name: from_bits(x, kinds[name]) if kinds[name] != "int1" else x.view(np.uint8) for name, x in raw.items()}


def kernel_of(program: Program, folder: Path) -> Any:
    """The ``triton.jit`` function, from a file: Triton reads a kernel's source."""
    path = folder / f"program_{program.seed}_{uuid.uuid4().hex[:8]}.py"
    path.write_text(source(program))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def arguments(program: Program, raw: Buffers) -> dict[str, Any]:
    """Tensors over the memory of ``raw``, and scalars."""
    found: dict[str, Any] = {}
    for param in program.params:
        if param.role == "scalar":
            found[param.name] = param.fill
        else:
            bits = raw[param.name]
            tensor = torch.from_numpy(bits.view(np.int16) if param.kind in ("fp16", "bf16") else bits)
            found[param.name] = tensor.view(TORCH[param.kind])
    return found


def through_the_door(program: Program, folder: Path) -> Outcome:
    """By ``launch.run``, as any op does, with its flags and on its threads."""
    raw = raw_inputs(program)
    try:
        kernel = kernel_of(program, folder)
        run([Launch(kernel, tuple(program.grid), arguments(program, raw), Config())])
    except Unsupported as error:
        return Outcome(failure=f"Unsupported: {error}")
    return Outcome(raw)


def level_of(program: Program) -> machine.Level:
    levels = machine.supported_levels()
    return levels[program.level % len(levels)]


def cpp(program: Program, folder: Path) -> str:
    """The generated C++ of a program, at the level that its seed chose."""
    kernel = kernel_of(program, folder)
    types, constants = signature(Launch(kernel, tuple(program.grid), arguments(program, raw_inputs(program)), Config()))
    return emit.generate(ttir(kernel, types, constants), level_of(program).lanes)


def run_batch(programs: list[Program]) -> list[Outcome]:
    """Each program's outcome. Those of one level are built as one shared object, and run in a forked process, so that a
    crash or an endless loop ends one program and not the fuzzer."""
    outcomes = [Outcome() for _ in programs]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        texts: dict[int, str] = {}
        for at, program in enumerate(programs):
            try:
                texts[at] = cpp(program, folder)
            except Unsupported as error:
                outcomes[at].failure = f"Unsupported: {error}"
            except Exception as error:
                outcomes[at].failure = f"the engine raised {type(error).__name__}: {error}"
        for level in machine.supported_levels():
            group = [at for at in texts if level_of(programs[at]) == level]
            if group:
                _run_level(programs, [(at, texts[at]) for at in group], level, folder, outcomes)
    return outcomes


def _run_level(
    programs: list[Program], texts: list[tuple[int, str]], level: machine.Level, folder: Path, outcomes: list[Outcome]
) -> None:
    path = folder / f"{level.name}-{texts[0][0]}.so"
    said = _compile(texts, level, path)
    if said and len(texts) > 1:  # one of them is at fault: find it
        for text in texts:
            _run_level(programs, [text], level, folder, outcomes)
    elif said:
        outcomes[texts[0][0]].failure = f"the compiler: {said}"
    else:
        _run_object(programs, [at for at, _ in texts], path, outcomes)


def _compile(texts: list[tuple[int, str]], level: machine.Level, path: Path) -> str:
    """Builds one object of several kernels, each in a namespace and with an entry of its own; gives what was said."""
    headers: dict[str, None] = {}
    parts = []
    for at, text in texts:
        lines = []
        for line in text.splitlines():
            if re.match(r"\s*#\s*include\b", line):
                headers[line.strip()] = None
            else:
                lines.append(line)
        body = "\n".join(lines)
        parts.append(f"#define {emit.ENTRY} entry_{at}\nnamespace program_{at} {{\n{body}\n}}\n#undef {emit.ENTRY}\n")
    immintrin = "#include <immintrin.h>"
    known = [x for x in headers if x != immintrin]
    guarded = ["#if defined(__x86_64__)", immintrin, "#endif"] if immintrin in headers else []
    text_file = path.with_suffix(".cc")
    text_file.write_text("\n".join([*known, *guarded, *parts]))
    flags = ["-O1" if flag == "-O3" else flag for flag in build.FLAGS]
    command = [build.require_compiler().path, *flags, *level.flags, str(text_file), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "took longer than 300 s"
    return (
        ""
        if done.returncode == 0
        else "\n".join(x for x in done.stderr.splitlines() if "error" in x)[:2000] or "failed"
    )


def _run_object(programs: list[Program], which: list[int], path: Path, outcomes: list[Outcome]) -> None:
    """Runs them one after the other in a child that shares their buffers; after a crash with those that are left."""
    shared = {at: _Shared(raw_inputs(programs[at])) for at in which}
    left = list(which)
    context = multiprocessing.get_context("fork")
    while left:
        at_work = mmap.mmap(-1, 8)
        child = context.Process(target=_child, args=(programs, left, path, shared, at_work))
        child.start()
        child.join(TIME_LIMIT_S)
        if child.is_alive():
            child.kill()
            child.join()
        done = int.from_bytes(at_work[:8], "little")
        for at in left[:done]:
            outcomes[at].buffers = shared[at].copy()
        if done < len(left):
            code = child.exitcode
            outcomes[left[done]].failure = f"the kernel ended its process: {code} (a signal, or {TIME_LIMIT_S} s over)"
            done += 1
        left = left[done:]


def _child(
    programs: list[Program], left: list[int], path: Path, shared: dict[int, _Shared], at_work: mmap.mmap
) -> None:
    library = ctypes.CDLL(str(path))
    for count, at in enumerate(left):
        program = programs[at]
        slots = b"".join(_slot(program, shared[at], index) for index in range(len(program.params)))
        grid = (ctypes.c_int32 * 3)(*program.grid, *(1,) * (3 - len(program.grid)))
        entry = getattr(library, f"entry_{at}")
        entry.argtypes, entry.restype = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64], None
        entry(slots, grid, 0, int(np.prod(program.grid)))
        at_work[:8] = (count + 1).to_bytes(8, "little")


def _slot(program: Program, shared: _Shared, at: int) -> bytes:
    param = program.params[at]
    if param.role != "scalar":
        return shared.arrays[param.name].ctypes.data.to_bytes(8, "little")
    if param.kind == "fp32":
        return np.float32(param.fill).tobytes() + bytes(4)
    return int(param.fill).to_bytes(8, "little", signed=True)


class _Shared:
    """Buffers in memory that a forked process shares."""

    def __init__(self, raw: Buffers) -> None:
        self.arrays: Buffers = {}
        for name, bits in raw.items():
            memory = mmap.mmap(-1, bits.nbytes)
            self.arrays[name] = np.frombuffer(memory, bits.dtype)
            self.arrays[name][:] = bits

    def copy(self) -> Buffers:
        return {name: bits.copy() for name, bits in self.arrays.items()}
