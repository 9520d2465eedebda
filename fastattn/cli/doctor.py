"""``fastattn doctor``: what this machine offers to fastattn, and why kernels do or do not run on it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

OPTIONAL = ("transformers", "onnx", "onnxscript", "onnxruntime", "matplotlib")


def command() -> None:
    """Tell what fastattn finds on this machine: devices, compiler, caches, and whether kernels run."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in findings():
        table.add_row(name, value)
    Console().print(table)


def findings() -> Iterator[tuple[str, str]]:
    """(what, how it stands), in the order that they are shown."""
    import torch

    from fastattn.kernels.cpu.machine import model_name, supported_levels
    from fastattn.kernels.settings import settings

    yield "fastattn", installed("fastattn") or "not installed, run from its source"
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "Triton", installed("triton") or "not installed: no kernel can run"
    yield "GPU", gpu()
    yield (
        "CPU",
        f"{model_name()}, {supported_levels()[0].name}, torch uses {torch.get_num_threads()} threads",
    )
    yield "C++ compiler", compiler()
    problem = engine_problem()
    yield "kernels on CPU", "run by the engine" if problem is None else f"fall back to the references: {problem}"
    cache = settings().cache_dir
    yield "cache", f"{cache} ({size_of(cache)})"
    yield "optional", ", ".join(f"{name} {installed(name) or 'not installed'}" for name in OPTIONAL)


def installed(package: str) -> str | None:
    """The version of an installed package, whichever of its builds provides it."""
    for name in (package, f"{package}-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def compiler() -> str:
    from fastattn.kernels.cpu.build import find_compiler

    found = find_compiler()
    return "none found" if found is None else f"{found.path} ({found.version})"


def engine_problem() -> str | None:
    """Why kernels cannot run on this machine's CPU, in the words of the error; None when they run.

    The smallest possible call is made; the first one on a machine builds a kernel, which takes seconds.
    """
    import torch

    try:
        from fastattn.kernels import block_attention
        from fastattn.kernels.errors import Unsupported
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    rows = torch.zeros(1, 1, 16, 16)
    index = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 1, 16)
    try:
        block_attention.forward(
            rows, rows, rows, index, index,
            look_back=0, look_ahead=0, wrap=True, is_causal=False, exclude_self=False, scale=1.0,
        )  # fmt: skip
    except Unsupported as error:
        return str(error)
    return None


def size_of(folder: Path) -> str:
    if not folder.exists():
        return "empty"
    files = [file for file in folder.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"
