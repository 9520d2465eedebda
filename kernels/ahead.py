"""Compiles a kernel for a GPU that is not here, and reads from the binary what it costs there.

Triton's ``compile`` takes a target in place of a driver, so a machine without a GPU builds for every architecture that
its Triton knows. The binary then tells what a tuner and a test want to know before any run: registers, spills, shared
memory, and whether the dots became tensor-core instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import FP_FUSION, Config

if TYPE_CHECKING:
    from .launch import Launch

# Bytes of shared memory that one thread block may have: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"; AMD's CDNA and RDNA instruction set guides (the size of the LDS of a work-group).
_SHARED_KIB = {
    "cuda:75": 64, "cuda:80": 163, "cuda:86": 99, "cuda:87": 163, "cuda:89": 99, "cuda:90": 227, "cuda:100": 227,
    "cuda:103": 227, "cuda:120": 99, "cuda:121": 99,
    "hip:gfx90a": 64, "hip:gfx942": 64, "hip:gfx950": 160, "hip:gfx1100": 64, "hip:gfx1201": 64,
}  # fmt: skip

_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_AMDGCN_LINE = re.compile(r"^\s+([a-z]+_[a-z0-9_]+)\b", re.MULTILINE)
# HMMA, IMMA, ... up to sm_89; HGMMA, ... on sm_90; UTCHMMA, ... on sm_100. MFMA on CDNA, WMMA on RDNA.
_TENSOR_CORE = re.compile(r"(?:UTC)?[A-Z]G?MMA|v_s?mfma\w*|v_smfmac\w*|v_s?wmma\w*")


def shared_memory_limit(target: str) -> int:
    """Bytes of shared memory that one thread block may have on ``target``, e.g. ``"cuda:90"``."""
    if target not in _SHARED_KIB:
        raise ValueError(f"target must be one of {sorted(_SHARED_KIB)}, got {target!r}")
    return _SHARED_KIB[target] * 1024


@dataclass(frozen=True)
class Compiled:
    """A kernel's binary for one target, and what it takes there.

    target: as given, e.g. ``"cuda:90"``. name: of the entry point. binary: a cubin, or an hsaco for AMD.
    asm: the texts by name: ``ttir``, ``ttgir``, ``llir`` and ``ptx`` or ``amdgcn``.
    shared_bytes: shared memory of a thread block. num_warps: of a thread block. scratch_bytes: memory that Triton wants
    from whoever launches the kernel, for each thread block.
    registers: of a thread; spill_bytes: stack memory of a thread, which a kernel of ours only has when registers did
    not suffice. Both are None for a cubin where Triton came without its ``cuobjdump``.
    """

    target: str
    name: str
    binary: bytes
    asm: Mapping[str, str]
    shared_bytes: int
    num_warps: int
    registers: int | None
    spill_bytes: int | None
    scratch_bytes: int = 0

    @cached_property
    def sass(self) -> str | None:
        """The disassembled cubin; None for AMD (see ``asm["amdgcn"]``) or where ``nvdisasm`` is missing."""
        if not self.target.startswith("cuda:"):
            return None
        return _run_nvidia_tool("nvdisasm", ["-c"], self.binary)

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the program (not: how often it runs); empty where ``sass`` is missing.

        NVIDIA's come without their modifiers (``HMMA`` for ``HMMA.16816.F32``).
        """
        if self.target.startswith("cuda:"):
            return Counter(_SASS_LINE.findall(self.sass or ""))
        # labels, directives and the metadata that follows the code do not have an instruction's form
        code = self.asm["amdgcn"].split(".section", 1)[0]
        return Counter(_AMDGCN_LINE.findall(code))

    @property
    def tensor_core_instructions(self) -> Counter[str]:
        """The part of :attr:`instructions` that runs on tensor cores (AMD: matrix cores)."""
        return Counter({name: n for name, n in self.instructions.items() if _TENSOR_CORE.fullmatch(name)})


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    config: Config,
    *,
    multiples_of_16: Iterable[str] | None = None,
) -> Compiled:
    """Compiles a ``triton.jit`` function for ``target`` with no GPU (1 to 15 s; a hopeless config can take minutes).

    signature: Triton's type of each run-time argument, e.g. ``{"q_ptr": "*fp16", "n_heads": "i32"}``; the constexpr
        arguments may be left out. constexprs: values of the constexpr arguments; the block sizes come from ``config``.
    target: ``"cuda:<compute capability times 10>"`` or ``"hip:<gfx name>"``.
    multiples_of_16: the arguments whose value (for a pointer: address) divides by 16, which lets loads be wide;
        None: every pointer, as with tensors that torch allocates.

    Raises ValueError for a target, a type or a name that does not fit; errors of Triton's compiler pass through.
    """
    import triton
    from triton import knobs
    from triton.compiler import ASTSource

    constants = {**constexprs, **config.blocks}
    types = {name: "constexpr" if name in constants else signature.get(name) for name in kernel.arg_names}
    if missing := [name for name, type_ in types.items() if type_ is None]:
        raise ValueError(f"signature must give a type for {missing}")
    if unknown := sorted({*signature, *constants} - {*types}):
        raise ValueError(f"signature and constexprs must name arguments of {kernel.__name__}, got also {unknown}")
    if multiples_of_16 is None:
        multiples_of_16 = [name for name, type_ in types.items() if str(type_).startswith("*")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples_of_16}
    options: dict[str, Any] = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    if kernel.debug:  # tl.device_assert asserts, as with the JIT
        options["debug"] = True
    if config.num_ctas != 1:
        options["num_ctas"] = config.num_ctas
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # it makes a cubin three to four times as large
        built = triton.compile(source, target=_gpu_target(target), options=options)
    binary = built.asm["cubin" if target.startswith("cuda:") else "hsaco"]
    registers, spill_bytes = _usage(target, binary, built.asm)
    return Compiled(
        target=target,
        name=built.metadata.name,
        binary=binary,
        asm={name: text for name, text in built.asm.items() if isinstance(text, str)},
        shared_bytes=built.metadata.shared,
        num_warps=built.metadata.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        scratch_bytes=built.metadata.global_scratch_size + built.metadata.profile_scratch_size,
    )


def compile_launch(launch: Launch, target: str) -> Compiled:
    """:func:`compile_ahead` for the arguments of a launch; the tensors may be on the ``meta`` device.

    As Triton's JIT does, integers that divide by 16 here are taken to do so always, but for those that the kernel
    asks not to specialise; unlike it, an integer of value 1 stays an argument.
    """
    from .launch import signature

    types, constants = signature(launch)
    constants = {name: value for name, value in constants.items() if name not in launch.config.blocks}
    multiples = [
        parameter.name
        for parameter in launch.kernel.params
        if types[parameter.name].startswith("*")
        or (
            types[parameter.name] in ("i32", "i64")
            and not parameter.do_not_specialize
            and launch.args[parameter.name] % 16 == 0
        )
    ]
    types = {name: type_ for name, type_ in types.items() if type_ != "constexpr"}
    return compile_ahead(launch.kernel, types, constants, target, launch.config, multiples_of_16=multiples)


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"cuda:(\d{2,3})", target):
        return GPUTarget("cuda", int(match[1]), 32)
    if match := re.fullmatch(r"hip:(gfx\w+)", target):
        return GPUTarget("hip", match[1], 64 if match[1].startswith("gfx9") else 32)  # CDNA's wavefronts are 64 wide
    raise ValueError(f"target must look like 'cuda:90' or 'hip:gfx942', got {target!r}")


def _usage(target: str, binary: bytes, asm: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(registers, spilled bytes) of a thread."""
    if target.startswith("cuda:"):
        text = _run_nvidia_tool("cuobjdump", ["-res-usage"], binary) or ""
        match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    else:
        # VGPRs count the accumulation registers in; spilled SGPRs go to VGPR lanes, not to memory
        text = asm["amdgcn"]
        match = re.search(r"\.private_segment_fixed_size: *(\d+).*?\.vgpr_count: *(\d+)", text, re.DOTALL)
        return (int(match[2]), int(match[1])) if match else (None, None)
    return (int(match[1]), int(match[2])) if match else (None, None)


def _run_nvidia_tool(name: str, options: list[str], cubin: bytes) -> str | None:
    """What a tool of Triton's NVIDIA back end prints about a cubin; None where it is not installed."""
    from triton import knobs

    try:
        path = getattr(knobs.nvidia, name).path
    except RuntimeError:  # "Cannot find ..."
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([path, *options, str(file)], capture_output=True, text=True, check=True).stdout
