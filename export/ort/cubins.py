"""Kernels for GPUs that need not be here: cubins, each an object to be linked, and the tables that name them.

A cubin is compiled once, by Triton in a process that can be killed, and kept with what else was built in the user's
cache. Where something hinges on what it and the launcher of ``cuda.cc`` take for granted of each other, it is checked
here: which parameters it has, its shared memory, and that Triton wants no memory of its own.

A library with cubins is for sessions on GPUs. It registers the ops of ``needs.GPU_OPS``, for GPUs and for the CPU, and
no others: ONNX Runtime takes a node to the CPU, with copies there and back, if that alone has a kernel for it, and runs
its body on the GPU if no one has. So of SMYRF's node the hash and the attention in its body are ours, and the sort
between them is ONNX Runtime's own CUDA kernels.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastattn.autotune.compile_pool import Pool
from fastattn.autotune.device import machine_compiler
from fastattn.autotune.source import kernel_named
from fastattn.export.ort import cuda_kernels, cuda_steps
from fastattn.export.ort.variants import Variant
from fastattn.kernels import ahead
from fastattn.kernels.ahead import Compiled, compile_ahead, shared_memory_limit
from fastattn.kernels.config import FP_FUSION, Config
from fastattn.kernels.cpu import build, machine
from fastattn.kernels.cpu.frontend import identity
from fastattn.kernels.errors import Unsupported, UnsupportedNow
from fastattn.kernels.launch import signature

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
LIMIT_S = 120.0  # CPU time of a compile: those of the heuristic's tiles take 1 to 15 s
COMPILE = "fastattn.export.ort.cubins:compile_job"

_HERE = Path(__file__).parent
# how PTX declares the parameters of Triton's types
_PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32"}
_ROWS = ("HEAD_DIM", "VALUE_DIM", "DIM", "FEATURES")  # constants that are lengths of rows
_OF_TRITON = ["u64", "u64"]  # what it appends: memory for itself and for its profiler


def target_of(architecture: str) -> str:
    """``"cuda:90"`` for ``"sm_90"``. Raises ValueError for one that is not in :data:`ARCHITECTURES`."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    return architecture.replace("sm_", "cuda:")


@dataclass(frozen=True)
class Job:
    """What a cubin is made from, as plain data: the arguments of :func:`~fastattn.kernels.ahead.compile_ahead`."""

    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    multiples_of_16: tuple[str, ...]
    config: Config
    target: str

    @staticmethod
    def of(variant: Variant, target: str) -> Job:
        types, constants = signature(variant.launch)
        return Job(variant.kernel, types, constants, multiples_of_16(variant), variant.launch.config, target)


@dataclass(frozen=True)
class Binary:
    """A cubin with what a launch must say of it."""

    cubin: bytes
    entry: str
    num_warps: int
    num_ctas: int
    shared_bytes: int


def multiples_of_16(variant: Variant) -> tuple[str, ...]:
    """The parameters that divide by 16 in each launch: addresses, as ONNX Runtime allocates, and strides where all rows
    are of such lengths, for tensors are contiguous; but not of SMYRF's directions, which are two numbers longer."""
    types, constants = signature(variant.launch)
    of_whole_rows = all(constants[name] % 16 == 0 for name in _ROWS if name in constants)
    return tuple(
        name
        for name, kind in types.items()
        if kind.startswith("*")
        or (kind != "constexpr" and "stride" in name and of_whole_rows and variant.launch.args[name] % 16 == 0)
    )


def compile_job(job: Job) -> Binary:
    """Compiles, in a worker of :class:`~fastattn.autotune.compile_pool.Pool`; errors of the compiler pass through.

    Raises ValueError for a binary that the launcher would not get right.
    """
    constants = {name: value for name, value in job.constants.items() if name not in job.config.blocks}
    types = {name: kind for name, kind in job.types.items() if kind != "constexpr"}
    compiled = compile_ahead(
        _kernel_named(job.kernel), types, constants, job.target, job.config, multiples_of_16=job.multiples_of_16
    )
    check(compiled, list(types.values()))
    return Binary(compiled.binary, compiled.name, compiled.num_warps, job.config.num_ctas, compiled.shared_bytes)


def check(compiled: Compiled, types: Sequence[str]) -> None:
    """Raises ValueError unless a launch with arguments of these types, and Triton's own two, is what the binary takes.
    types: Triton's, such as ``"*fp16"`` and ``"i32"``."""
    wanted = ["u64" if kind.startswith("*") else _PTX_TYPES.get(kind, f"no {kind}") for kind in types] + _OF_TRITON
    entry = re.search(rf"\.entry {compiled.name}\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    found = re.findall(r"\.param \.(\w+)", entry[1]) if entry else []
    if found != wanted:
        raise ValueError(f"{compiled.name} must take parameters {wanted}, got {found}")
    limit = shared_memory_limit(compiled.target)
    if compiled.shared_bytes > limit:
        raise ValueError(f"{compiled.name} wants {compiled.shared_bytes} bytes of shared memory, more than {limit}")
    if compiled.scratch_bytes:
        raise ValueError(f"{compiled.name} wants {compiled.scratch_bytes} bytes of scratch memory, and gets none")


def objects(
    variants: Mapping[str, Sequence[Variant]], *, workers: int | None = None, limit_s: float = LIMIT_S,
    on_built: Callable[[str], object] | None = None,
) -> list[Path]:  # fmt: skip
    """The objects of all cubins, to be linked, with :func:`tables`; those that are missing are compiled.

    variants: by target, as in ``"cuda:90"``. workers: processes that compile; None: one for each core. limit_s: CPU
    time after which a compile is killed. on_built: is told of each cubin that had to be compiled.

    Raises Unsupported where a cubin can't be had, once all others are there; RuntimeError where workers can't start.
    """
    recipes = {recipe(variant, target): (variant, target) for target, variant in _all(variants)}
    missing = {made: each for made, each in recipes.items() if not build.is_built(made)}
    problems = []
    with tempfile.TemporaryDirectory() as folder:  # Triton keeps every stage of every compile, which nobody asks for
        waiting = iter([(made, Job.of(*each)) for made, each in missing.items()])
        environment = {"TRITON_CACHE_DIR": folder}
        with Pool[build.Recipe](COMPILE, workers or os.cpu_count() or 1, limit_s, environment=environment) as pool:
            for done in pool.results(lambda: next(waiting, None)):
                variant, target = missing[done.name]
                name = f"{variant.described()} for {target.replace('cuda:', 'sm_')}"
                if done.reason is not None:
                    problems.append(f"{name}: {done.reason}")
                    continue
                text = _source(done.name, done.result)
                build.made(replace(done.name, source=lambda text=text: text))
                if on_built is not None:
                    on_built(name)
    if problems:
        raise Unsupported(f"{len(problems)} kernels for GPUs can't be compiled: {'; '.join(problems[:5])}")
    return [build.made(made) for made in recipes]


def recipe(variant: Variant, target: str) -> build.Recipe:
    """The object with the cubin of a variant, which :func:`objects` fills."""
    job = Job.of(variant, target)
    kernel = _kernel_named(job.kernel)
    facts = (
        *identity(kernel), repr(kernel.debug), repr(sorted(job.types.items())),
        repr(sorted(job.constants.items())), repr(job.multiples_of_16), repr(job.config.to_dict()), job.target,
        machine_compiler(target.replace("cuda:", "sm_")), str(FP_FUSION), _digest(),
    )  # fmt: skip
    return build.Recipe(job.kernel, facts, _lost, machine.BASELINE, flags=("-c", f"-I{_HERE}"), suffix=".o")


def tables(variants: Mapping[str, Sequence[Variant]]) -> str:
    """The source of ``kTargets``, to be linked with :func:`objects`; with no variants, that of an empty one."""
    text = ['#include "cuda_variants.h"', "namespace fastattn::cuda {"]
    rows = []
    for target in variants:
        architecture = target.replace("cuda:", "sm_")
        entries = []
        for _, variant in _all({target: variants[target]}):
            symbol = _symbol(recipe(variant, target))
            multiples = dict.fromkeys(multiples_of_16(variant), 16)
            arrays, row = variant.table(f"{architecture}_{len(entries)}", multiples)
            text += [f"extern const Cubin {symbol};", arrays]
            entries.append(f"{{{row}, &{symbol}}}")
        capability = int(target.removeprefix("cuda:"))
        text.append(f"const CudaVariant {architecture}_variants[] = {{{', '.join(entries)}}};")
        is_exact = "true" if _is_exact(capability) else "false"
        rows.append(f"{{{capability // 10}, {capability % 10}, {is_exact}, {architecture}_variants, {len(entries)}}}")
    text.append(f"extern const Target kTargets[] = {{{', '.join(rows) or '{}'}}};")
    text.append(f"extern const size_t kTargetCount = {len(rows)};")
    return "\n".join([*text, "}  // namespace fastattn::cuda\n"])


def _all(variants: Mapping[str, Sequence[Variant]]) -> Iterator[tuple[str, Variant]]:
    """(target, variant) of each, no cubin twice, and of the kernels that the device itself runs."""
    seen = set()
    own = [Variant(*example) for example in cuda_kernels.examples()]
    for target, wanted in variants.items():
        for variant in (*wanted, *own):
            made = recipe(variant, target)
            if made.file_name() not in seen:
                seen.add(made.file_name())
                yield target, variant


def _is_exact(capability: int) -> bool:
    """Whether Triton compiles for this architecture with what its successors lack (``sm_90a``)."""
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    return not sm_arch_from_capability(capability)[-1].isdigit()


def _kernel_named(name: str) -> Any:
    return cuda_kernels.KERNELS.get(name) or cuda_steps.KERNELS.get(name) or kernel_named(name)


def _symbol(made: build.Recipe) -> str:
    return f"cubin_{hashlib.sha256(made.file_name().encode()).hexdigest()[:24]}"


def _source(made: build.Recipe, binary: Binary) -> str:
    words = struct.unpack(f"<{-(-len(binary.cubin) // 8)}Q", binary.cubin + bytes(-len(binary.cubin) % 8))
    fields = f'"{binary.entry}", {binary.num_warps}, {binary.num_ctas}, {binary.shared_bytes}'
    return (
        '#include "cubin.h"\nnamespace fastattn::cuda {\n'
        f"alignas(64) static const uint64_t image[] = {{{', '.join(map(hex, words))}}};\n"
        f"extern const Cubin {_symbol(made)};\n"
        f"const Cubin {_symbol(made)} = {{image, {fields}}};\n}}  // namespace fastattn::cuda\n"
    )


def _lost() -> str:
    raise UnsupportedNow("the cache of built kernels lost a cubin")


@cache
def _digest() -> str:
    """Of what turns a kernel into an object."""
    files = (Path(__file__), Path(ahead.__file__), _HERE / "cubin.h")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
