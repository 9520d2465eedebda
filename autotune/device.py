"""Names for the device at hand and for the compilers behind it, as they stand in cache keys."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceName:
    """arch: what code is compiled for (``sm_90``, ``gfx942``, ``x86_64-avx512``). name: the model.
    threads: how many a kernel runs on, for a CPU; a GPU has None."""

    arch: str
    name: str
    threads: int | None = None


def describe(device: torch.device) -> DeviceName:
    """The name of a device of this machine."""
    if device.type == "cpu":
        return DeviceName(_cpu_arch(), cpu_model(), torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return DeviceName(properties.gcnArchName.split(":")[0], properties.name)
        return DeviceName(f"sm_{properties.major}{properties.minor}", properties.name)
    name = torch.get_device_module(device).get_device_name(device)
    return DeviceName(device.type, name)


@cache
def _cpu_arch() -> str:
    from fastattn.kernels.cpu.machine import supported_levels

    return f"{platform.machine()}-{supported_levels()[0].name}"


@cache
def cpu_model() -> str:
    """Brand, family and model, for virtual machines often cut the brand down to "AMD EPYC"."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    if "model name" in fields:
        return f"{fields['model name']} (family {fields.get('cpu family', '?')} model {fields.get('model', '?')})"
    if "CPU part" in fields:
        return f"Arm implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    return platform.processor() or platform.machine()


@cache
def triton_version() -> str:
    import triton

    return triton.__version__


@cache
def machine_compiler(arch: str) -> str:
    """What makes machine code of Triton's IR for ``arch``: ``"ptxas 12.9"``, or the CPU engine with a C++ compiler."""
    if arch.startswith("sm_"):
        from triton.backends.nvidia.compiler import get_ptxas

        return f"ptxas {get_ptxas(int(arch.removeprefix('sm_'))).version}"
    if arch.startswith("gfx"):
        return "LLVM in Triton"
    from fastattn.kernels.cpu import build

    folder = Path(build.__file__).parent
    engine = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".py", ".h", ".cc")):
        engine.update(file.read_bytes())
    found = build.find_compiler()
    return f"engine {engine.hexdigest()[:8]}, {found.version if found else 'no compiler'}"
