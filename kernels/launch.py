"""The one door to a device: a kernel's launch goes to Triton's JIT, to the CPU engine or to Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton

from .config import FP_FUSION, Config
from .errors import Unsupported
from .rows import check_rows

_TRITON_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.uint16: "u16", torch.uint32: "u32", torch.uint64: "u64",
}  # fmt: skip
# (kernel, device, dtype, shape, flags) -> the tuned configuration, or None: then the kernel's heuristic is taken
Lookup = Callable[[str, torch.device, torch.dtype, Mapping[str, int], Mapping[str, Any]], Config | None]
_POINTER_TYPES = {dtype: "*" + name for dtype, name in _TRITON_TYPES.items()}


@dataclass(frozen=True)
class Launch:
    """kernel: a ``triton.jit`` function. grid: numbers of programs. args: every argument but the block sizes, by name,
    ``constexpr`` ones included; a tensor's name may end in ``_ptr``, and None is an argument that is not there.
    config: the block sizes and the compiler's knobs. rows: the tensor arguments that hold row numbers, contiguous
    int32, and how many rows there are: their values are checked before anything runs
    (:func:`~fastattn.kernels.rows.check_rows`). fill: contiguous tensor arguments whose every element is this number
    when the launch begins."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config
    rows: Mapping[str, int] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 only where torch itself was told to use it."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" or torch.version.hip:
        return "ieee"
    return "tf32"


def exact_precision(device_type: str) -> str:
    """``input_precision`` of ``tl.dot`` where hashes are decided, in fp32: three TF32 products give that on NVIDIA's
    tensor cores."""
    return "tf32x3" if device_type.startswith("cuda") else "ieee"


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbouring elements of its last dimension side by side in memory, copied only where they are not."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


@lru_cache
def device_kind(device: torch.device) -> str:
    """What heuristics tell apart: ``"cpu"``, ``"xpu"``, or a GPU's vendor and architecture, as the targets of
    :func:`~fastattn.kernels.ahead.compile_ahead` are called: ``"cuda:90"``, ``"hip:gfx942"``."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"hip:{properties.gcnArchName.split(':')[0]}"
    return f"cuda:{properties.major}{properties.minor}"


def argument_type(value: Any) -> str:
    """Triton's name for the type of a run-time argument, as in a signature."""
    if type(value) is int:  # most arguments are: isinstance of a tensor costs ten times as much
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, torch.Tensor):
        return _POINTER_TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel's argument must be a tensor, int, float or bool, got {type(value).__name__}")


def is_interpreted(kernel: Any) -> bool:
    """Whether ``triton.jit`` made the kernel one for Triton's interpreter, as it does under TRITON_INTERPRET=1."""
    return not isinstance(kernel, triton.JITFunction)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """(types, constants) of a launch by argument name, in the kernel's order; ``constexpr`` stands among the types."""
    values = launch.args | launch.config.blocks
    types, constants = {}, {}
    for name, is_constant in _parameters(launch.kernel):
        if is_constant or values[name] is None:  # an argument that is not there, as in Triton
            types[name], constants[name] = "constexpr", values[name]
        else:
            types[name] = argument_type(values[name])
    return types, constants


@lru_cache
def _parameters(kernel: Any) -> tuple[tuple[str, bool], ...]:
    """(name, whether it is a ``constexpr``) of each argument; Triton works this out anew at each question."""
    return tuple((parameter.name, parameter.is_constexpr) for parameter in kernel.params)


def tensor_name(argument: str) -> str:
    """What the tensor of a kernel's argument is called: ``"q"`` for ``"q_ptr"``."""
    return argument.removesuffix("_ptr")


def rows_to_check(launches: Iterable[Launch]) -> list[tuple[str, torch.Tensor, int]]:
    """(name, tensor, number of rows) for every tensor of row numbers, each once for a name: where one tensor has two
    names, another call may give them two."""
    found = {
        (name, id(launch.args[name]), length): (tensor_name(name), launch.args[name], length)
        for launch in launches
        for name, length in launch.rows.items()
    }
    return list(found.values())


def run(launches: Iterable[Launch]) -> None:
    """Runs launches in order on the device of their tensors.

    Raises:
        Unsupported: this device can't run one of them; nothing was run then.
        ValueError: a row number is out of range; nothing was run then. On a GPU its assertion fails instead.
    """
    launches = list(launches)
    if not launches:
        return
    device = next(value.device for value in launches[0].args.values() if isinstance(value, torch.Tensor))
    interpreted = is_interpreted(launches[0].kernel)
    if device.type == "cpu" and not interpreted:
        _engine().run(launches)
        return
    if not interpreted and device.type not in ("cuda", "xpu"):
        raise Unsupported(f"no Triton back end for device type {device.type!r}: use cpu, cuda or xpu")
    for name, index, length in rows_to_check(launches):
        check_rows(name, index, length)
    if interpreted:
        for launch in launches:
            _fill(launch)
            launch.kernel[launch.grid](**launch.args, **launch.config.blocks)
        return
    with torch.get_device_module(device).device(device):
        for launch in launches:
            _fill(launch)
            _run_on_gpu(launch)


def run_planned(
    key: Hashable, tensors: Mapping[str, torch.Tensor], launches: Callable[[], Iterable[Launch]], *, made: int = 0
) -> None:
    """:func:`run` of ``launches()``; on the CPU it is asked once for a key and a layout of the tensors, and what it
    gave is run again with the tensors of each call.

    key: all that ``launches()`` depends on beside the dtypes, shapes and strides of ``tensors``. tensors: every tensor
    of the launches, by its name (:func:`tensor_name`), which stands for the same tensor in each of them. made: how many
    of them, at the end, have layouts that follow from ``key`` and the layouts before.
    """
    values = [*tensors.values()]
    plan = None
    if values[0].is_cpu:
        given = values[: len(values) - made]
        key = (key, *[(tensor.dtype, tensor.shape, tensor.stride()) for tensor in given])
        plan = _engine().planned(key, tensors, launches)
    if plan is None:
        run(launches())
    else:
        plan(values)


@lru_cache
def _engine() -> ModuleType:
    from .cpu import engine  # stands above this file

    return engine


def _fill(launch: Launch) -> None:
    for name, value in launch.fill.items():
        launch.args[name].fill_(value)


def _run_on_gpu(launch: Launch) -> None:
    config = launch.config
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options["enable_fp_fusion"] = FP_FUSION
    if config.num_ctas != 1:
        options["num_ctas"] = config.num_ctas
    launch.kernel[launch.grid](**launch.args, **config.blocks, **options)
