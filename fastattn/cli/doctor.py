"""``fastattn doctor``: what this machine offers to fastattn, and why kernels do or do not run on it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

PROBE = 'extern "C" __attribute__((visibility("default"))) void probe() {}'
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

    from fastattn.kernels.cpu.machine import model_name
    from fastattn.kernels.settings import settings

    yield "fastattn", installed("fastattn") or "not installed, run from its source"
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "Triton", installed("triton") or "not installed: no kernel can run"
    yield "GPU", gpu()
    yield (
        "CPU",
        f"{model_name()}, {levels()}, torch uses {torch.get_num_threads()} threads",
    )
    yield "C++ compiler", compiler()
    problem = engine_problem()
    yield "kernels on CPU", "run by the engine" if problem is None else f"fall back to the references: {problem}"
    yield "built kernels", built_kernels()
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


def levels() -> str:
    """The instruction set that kernels are built for, and the narrower ones that this machine has too."""
    from fastattn.kernels.cpu.machine import supported_levels

    best, *others = (level.name for level in supported_levels())
    return best + (f" (also {', '.join(others)})" if others else "")


def compiler() -> str:
    """The compiler and what became of a file that it was given just now."""
    from fastattn.kernels.cpu import build
    from fastattn.kernels.cpu.machine import supported_levels
    from fastattn.kernels.errors import Unsupported

    found = build.find_compiler()
    if found is None:
        return "none found"
    level = supported_levels()[0]
    recipe = build.Recipe("probe", (), lambda: PROBE, level)
    try:
        with tempfile.TemporaryDirectory() as folder:
            build.build(recipe, Path(folder))
            ctypes.CDLL(str(Path(folder, recipe.file_name()))).probe()
    except (Unsupported, OSError) as error:
        return f"{found.path} ({found.version}), of no use: {error}"
    return f"{found.path} ({found.version}), builds for {level.name}"


def built_kernels() -> str:
    """The folder of built objects, how many it holds, and how much of the room that they may take."""
    from fastattn.kernels.cpu import objects

    found = objects.entries(objects.place())
    size = sum(entry.size for entry in found) / 2**20
    shipped = len(objects.entries(objects.SHIPPED))
    more = f"; {shipped} more came with the package" if shipped else ""
    return f"{objects.place()} ({len(found)} objects, {size:.1f} of {objects.BOUND_BYTES >> 20} MiB{more})"


def engine_problem() -> str | None:
    """Why kernels cannot run on this machine's CPU, in the words of the error; None when they run.

    The smallest possible call is made and compared with the definition; the first one on a machine builds a kernel,
    which takes seconds.
    """
    import torch

    from fastattn.reference import block_attention as reference

    try:
        from fastattn.kernels import block_attention
        from fastattn.kernels.errors import Unsupported
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    rows = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    index = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 1, 16)
    try:
        out, _ = block_attention.forward(rows, rows, rows, index, index, scale=1.0)
    except Unsupported as error:
        return str(error)
    expected, _ = reference.block_attention(rows, rows, rows, index, index, scale=1.0)
    if not torch.allclose(out, expected, atol=1e-5):
        return f"a kernel computes something wrong (by {(out - expected).abs().max():.1e}): please report this"
    return None


def size_of(folder: Path) -> str:
    if not folder.exists():
        return "empty"
    files = [file for file in folder.rglob("*") if file.is_file()]
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"
