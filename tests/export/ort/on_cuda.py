"""Ops of the library on a GPU that is not there: what the driver is asked for, by our launcher and by Triton's own."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastattn.export.ort import cubins, cuda_kernels, cuda_steps
from fastattn.export.ort.variants import Variant
from fastattn.kernels.config import cdiv
from fastattn.kernels.cpu import build, machine
from fastattn.kernels.launch import Launch, signature

HERE = Path(__file__).parent
STREAM = 0x1230  # one of the fake driver's device 0
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.int32: "int32", torch.int64: "int64", torch.bool: "bool"}
_FIRST_INPUT, _APART = 0x5F0000000000, 1 << 24


def build_driver(folder: Path, *flags: str) -> Path:
    """A libcuda.so.1 in ``folder`` that runs nothing: fake_cuda.cc, with NVIDIA's cuda.h as it comes with Triton."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    text = (HERE / "fake_cuda.cc").read_text()
    made = build.Recipe(
        "fake_cuda",
        (text, triton.__version__),
        lambda: text,
        machine.BASELINE,
        flags=(f"-I{include}", "-fvisibility=default", *flags),
    )
    (folder / "libcuda.so.1").symlink_to(build.made(made))
    return folder


@dataclass
class Memory:
    """Tensors that are only addresses."""

    addresses: dict[int, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)  # or another tensor would get the id

    def at(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._kept.append(tensor)
        self.addresses[id(tensor)] = address
        return tensor

    def of(self, value: Any) -> Any:
        return self.addresses[id(value)] if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Node:
    """A node of an op. inputs: shape and dtype by name, in the op's order."""

    op: str
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    attributes: Mapping[str, Any]
    capability: int = 80
    streams: tuple[int, ...] = (STREAM,)
    environment: Mapping[str, str] = field(default_factory=dict)
    misaligned: str = ""  # an input whose address does not divide by 16

    def addresses(self) -> dict[str, int]:
        return {
            name: _FIRST_INPUT + at * _APART + (8 if name == self.misaligned else 0)
            for at, name in enumerate(self.inputs)
        }

    def as_json(self, log: Path) -> dict[str, Any]:
        environment = {"FAKE_CUDA_LOG": str(log), "FAKE_CUDA_CAPABILITIES": str(self.capability), **self.environment}
        addresses = self.addresses()
        inputs = [
            {"shape": shape, "type": TYPES[dtype], "address": 0 if 0 in shape else addresses[name]}
            for name, (shape, dtype) in self.inputs.items()
        ]
        return {
            "op": self.op, "attributes": dict(self.attributes), "inputs": inputs, "streams": self.streams,
            "environment": environment,
        }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What became of a node. outputs: of each call (shape, type and address of each). calls: the driver's."""

    node: Node
    outputs: list[list[dict[str, Any]]]
    error: str | None
    calls: list[dict[str, Any]]

    def named(self, name: str) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["call"] == name]

    @property
    def launches(self) -> list[dict[str, Any]]:
        return self.named("cuLaunchKernelEx")


@dataclass(frozen=True)
class Ran:
    """ops: as the library registered them."""

    ops: list[dict[str, Any]]
    runs: list[Run]


def run_nodes(library: Path, nodes: Sequence[Node], driver: Path | None, folder: Path) -> Ran:
    """Calls nodes, in a process of its own that finds ``driver``'s libcuda.so.1, or none; logs go to ``folder``."""
    logs = [folder / f"node-{at}.log" for at in range(len(nodes))]
    given = {"library": str(library), "cases": [node.as_json(log) for node, log in zip(nodes, logs, strict=True)]}
    said = json.loads(_run("fake_ort.py", given, driver))
    runs = [
        Run(node, result.get("outputs", []), result.get("error"), _read(log))
        for node, result, log in zip(nodes, said["results"], logs, strict=True)
    ]
    return Ran(said["ops"], runs)


@dataclass(frozen=True)
class TritonLaunch:
    """A launch on tensors of ``memory``, of one of ``variants``, which were compiled for ``target``."""

    kernel: str
    launch: Launch
    memory: Memory
    variants: Sequence[Variant]
    target: str

    def as_json(self, folder: Path) -> dict[str, Any]:
        launch, variant = self.launch, compiled_for(self.kernel, self.launch, self.variants)
        types, _ = signature(variant.launch)
        binary = binary_of(variant, self.target)
        cubin = folder / cubins.recipe(variant, self.target).file_name()
        cubin.write_bytes(binary.cubin)
        values = {name: self.memory.of(value) for name, value in (launch.args | launch.config.blocks).items()}
        return {
            "cubin": str(cubin), "entry": binary.entry, "types": types, "grid": launch.grid, "stream": STREAM,
            "values": {name: values[name] for name in types}, "num_warps": launch.config.num_warps,
            "num_ctas": launch.config.num_ctas, "shared": binary.shared_bytes,
        }  # fmt: skip


def launch_by_triton(cases: Sequence[Sequence[TritonLaunch]], driver: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """What the driver is asked for where Triton's own launcher makes the launches of ``cases``."""
    log = folder / "triton.log"
    environment = {
        "FAKE_CUDA_LOG": str(log), "FAKE_CUDA_CAPABILITIES": "80", "TRITON_LIBCUDA_PATH": str(driver),
        "TRITON_CACHE_DIR": str(folder),  # what is linked with this driver is for nobody else
    }  # fmt: skip
    _run("triton_launcher.py", [launch.as_json(folder) for case in cases for launch in case], driver, environment)
    made = iter([call for call in _read(log) if call["call"] == "cuLaunchKernelEx"])
    found = [[*islice(made, len(case))] for case in cases]
    assert next(made, None) is None
    return found


def compiled_for(kernel: str, launch: Launch, variants: Sequence[Variant]) -> Variant:
    """The variant that was compiled with a launch's constants and configuration, for tensors of its dtypes."""
    own = [Variant(*example) for example in cuda_kernels.examples()]
    wanted = kernel, launch.config, _code(launch)
    return next(x for x in (*variants, *own) if (x.kernel, x.launch.config, _code(x.launch)) == wanted)


def _code(launch: Launch) -> tuple[dict[str, Any], dict[str, str]]:
    types, constants = signature(launch)
    return constants, {name: kind for name, kind in types.items() if kind.startswith("*")}


def binary_of(variant: Variant, target: str) -> cubins.Binary:
    """The cubin in a variant's object, as the source beside it has it."""
    text = build.made(cubins.recipe(variant, target)).with_suffix(".cc").read_text()
    found = re.search(r'image\[\] = \{(.*?)\}.* = \{image, "(\w+)", (\d+), (\d+), (\d+)\}', text, re.DOTALL)
    assert found is not None
    words = [int(word, 16) for word in found[1].split(", ")]
    return cubins.Binary(struct.pack(f"<{len(words)}Q", *words), found[2], *map(int, found.groups()[2:]))


def assert_range(values: Tensor, least: int, most: int) -> tuple[str, Launch]:
    """The launch of the device's own kernel that checks ``values``."""
    return _own("assert_range", values.numel(), values_ptr=values, least=least, most=most)


def narrow(source: Tensor, result: Tensor) -> tuple[str, Launch]:
    return _own("narrow", source.numel(), source_ptr=source, result_ptr=result)


def turn(source: Tensor, result: Tensor) -> tuple[str, Launch]:
    rows, columns = source.shape[-2:]
    return _own("turn", result.numel(), source_ptr=source, result_ptr=result, rows=rows, columns=columns)


def repeat(source: Tensor, result: Tensor) -> tuple[str, Launch]:
    return _own("repeat", result.numel(), source_ptr=source, result_ptr=result)


def block_numbers(index: Tensor, numbers: Tensor) -> tuple[str, Launch]:
    sizes = {"n_blocks": index.shape[3], "block_size": index.shape[4], "length": numbers.shape[3]}
    return _own("block_numbers", index.numel(), index_ptr=index, numbers_ptr=numbers, **sizes)


def step(kernel: str, programs: int, **args: Any) -> tuple[str, Launch]:
    """The launch of a kernel that a device has for one op."""
    return kernel, Launch(cuda_steps.KERNELS[kernel], (programs,), args, cuda_steps.CONFIG)


def step_over(kernel: str, n: int, **args: Any) -> tuple[str, Launch]:
    """One that goes over ``n`` numbers."""
    return step(kernel, cdiv(n, cuda_steps.CONFIG.blocks["BLOCK"]), n=n, **args)


def _own(kernel: str, n: int, **args: Any) -> tuple[str, Launch]:
    config = cuda_kernels.CONFIG
    return kernel, Launch(cuda_kernels.KERNELS[kernel], (cdiv(n, config.blocks["BLOCK"]),), args | {"n": n}, config)


def _run(file: str, given: Any, driver: Path | None, environment: Mapping[str, str] = {}) -> str:
    path = {} if driver is None else {"LD_LIBRARY_PATH": str(driver)}
    said = subprocess.run(
        [sys.executable, str(HERE / file)], input=json.dumps(given), capture_output=True, text=True, timeout=120,
        env={**os.environ, **path, **environment},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    return said.stdout


def _read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def tensors_of(run: Run, memory: Memory, *outputs: str) -> dict[str, Tensor]:
    """A node's inputs and outputs by name, at their addresses."""
    addresses = run.node.addresses()
    found = {name: memory.at(addresses[name], *given) for name, given in run.node.inputs.items()}
    dtypes = {name: dtype for dtype, name in TYPES.items()}
    for name, made in zip(outputs, run.outputs[0], strict=True):
        found[name] = memory.at(made["address"], made["shape"], dtypes[made["type"]])
    return found


def scratch_of(run: Run, memory: Memory, **made: tuple[tuple[int, ...], torch.dtype]) -> dict[str, Tensor]:
    """What a node allocated, as tensors of these shapes and dtypes in its order, which must fit and be all."""
    allocated = run.named("cuMemAllocAsync")
    sizes = [max(1, math.prod(shape) * dtype.itemsize) for shape, dtype in made.values()]
    assert [call["bytes"] for call in allocated] == sizes
    return {name: memory.at(call["address"], *made[name]) for name, call in zip(made, allocated, strict=True)}
