"""``fastattn build``: builds kernels before they are needed, for this machine or to be shipped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fastattn.cli.tune import DTYPES, integers

if TYPE_CHECKING:
    from fastattn.kernels.cpu.build import Recipe
    from fastattn.kernels.cpu.machine import Level


def command(
    cpu: Annotated[bool, typer.Option("--cpu", help="Build what the CPU engine runs.")] = False,
    ort: Annotated[bool, typer.Option("--ort", help="Build the library of custom ops for ONNX Runtime.")] = False,
    head_dim: Annotated[str, typer.Option(help="Head dims, as in 64,128.")] = "64",
    dtype: Annotated[str, typer.Option(help=f"Types of q, k and v, of {','.join(DTYPES)}.")] = "fp32",
    cluster_size: Annotated[str, typer.Option(help="Block sizes of queries and keys, as in 64,128.")] = "64",
    every_pattern: Annotated[
        bool, typer.Option("--every-pattern", help="Causal and other block attention too, not only what SMYRF runs.")
    ] = False,
    level: Annotated[
        str | None,
        typer.Option(help="Instruction set of the machines that get the folder --output; --ort takes several."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write into this folder, for other machines of the level, not into the cache.")
    ] = None,
    cuda: Annotated[
        str | None, typer.Option(help="With --ort: for NVIDIA GPUs, which need not be here, as in sm_80,sm_90.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="With --ort: an .onnx file of fastattn export; exactly what it runs.")
    ] = None,
) -> None:
    """Build kernels ahead of their first use; one that is there already takes no time.

    --ort makes one library, libfastattn_ort.so, of every op for the head dims and types, or of those of a model.

    The exit status is 0 when all of them are there, 1 when one can't be built (its name and the reason are printed,
    the others are built), and 2 for options that make no sense.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        if cpu == ort:
            raise ValueError("say what to build for: --cpu or --ort")
        if ort:
            from fastattn.cli._ort import build_ort

            names = None if level is None else [name.strip() for name in level.split(",")]
            gpus = [name.strip() for name in cuda.split(",")] if cuda is not None else []
            dims, dtypes = integers("head_dim", head_dim), _dtypes(dtype)
            raise typer.Exit(build_ort(model, dims, dtypes, names, gpus, output, console.print))
        if model is not None or cuda is not None:
            raise ValueError(f"{'--model' if cuda is None else '--cuda'} is for --ort")
        chosen = _level(level, output)
        jobs = list(_jobs(integers("head_dim", head_dim), _dtypes(dtype), integers("cluster_size", cluster_size),
                          every_pattern=every_pattern, level=chosen))  # fmt: skip
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        console.print(f"[red]nothing was built:[/red] {escape(str(error))}")
        raise typer.Exit(2) from error
    except ImportError as error:
        console.print(f"[red]nothing was built:[/red] Triton cannot be imported ({escape(str(error))})")
        raise typer.Exit(1) from error
    if not build_all(jobs, output, console.print):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Job:
    """name: in words. recipe: of its object."""

    name: str
    recipe: Recipe


def _jobs(
    head_dims: list[int], dtypes: list[str], cluster_sizes: list[int], *, every_pattern: bool, level: Level
) -> Iterator[Job]:
    """One job for each object; the rooms with kernels say what their ops run."""
    import torch

    from fastattn.autotune.source import ROOMS
    from fastattn.kernels.cpu import engine, sort

    seen = set()
    yield Job("threads", engine.driver_recipe())
    yield Job("sort", sort.recipe())
    for room in ROOMS:
        launches_ahead = import_module(f"fastattn.autotune.{room}").launches_ahead
        for dtype in dtypes:
            for dim in head_dims:
                for size in cluster_sizes:
                    ahead = launches_ahead(getattr(torch, DTYPES[dtype]), dim, size, every_pattern=every_pattern)
                    for name, launch in ahead:
                        recipe = engine.recipe(launch, level)
                        if recipe.file_name() not in seen:
                            seen.add(recipe.file_name())
                            yield Job(f"{name}, {dtype}, head dim {dim}", recipe)


def build_all(jobs: list[Job], output: Path | None, say: Callable[[str], object]) -> bool:
    """Builds what is missing, a job for each core at a time, and says so. Returns whether everything is there now."""
    from fastattn.kernels.cpu import build, objects
    from fastattn.kernels.errors import Unsupported

    def run(job: Job) -> tuple[str, float]:
        start = time.perf_counter()
        try:
            if build.is_built(job.recipe, output):
                return "there", 0.0
            build.build(job.recipe, output)
        except Unsupported as error:
            return str(error), 0.0
        return "built", time.perf_counter() - start

    start = time.perf_counter()
    counts = {"built": 0, "there": 0}
    problems = []
    with ThreadPoolExecutor(_cores()) as pool:
        names = {pool.submit(run, job): job.name for job in jobs}
        for done in as_completed(names):
            outcome, seconds = done.result()
            if outcome in counts:
                counts[outcome] += 1
                say(f"{outcome}  {f'{seconds:4.1f} s' if seconds else '      '}  {names[done]}")
            else:
                problems.append((names[done], outcome))
    for name, reason in sorted(problems):
        say(f"[red]not built[/red]      {name}: {escape(reason)}")
    folder = output or objects.place()
    took = f"{time.perf_counter() - start:.1f} s"
    say(f"{counts['built']} built in {took}, {counts['there']} were there, {len(problems)} not built: {folder}")
    return not problems


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _level(name: str | None, output: Path | None) -> Level:
    from fastattn.kernels.cpu.machine import LEVELS, supported_levels

    own = supported_levels()[0]
    if name is None or name == own.name:
        return own
    if name not in (names := [level.name for level in LEVELS]):
        raise ValueError(f"level must be one of {', '.join(names)}, got {name!r}")
    if output is None:
        raise ValueError(f"level {name} needs --output: the cache of this machine only takes its own, {own.name}")
    return next(level for level in LEVELS if level.name == name)


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in DTYPES]:
        raise ValueError(f"dtype must be some of {', '.join(DTYPES)} with commas between them, got {wrong[0]!r}")
    return names
