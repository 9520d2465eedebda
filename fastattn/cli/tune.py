"""``fastattn tune``: measures block sizes on this machine and writes them to the cache that the ops look up."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.autotune.block_attention import Sizes
    from fastattn.autotune.tune import Outcome

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def command(
    kernel: Annotated[str, typer.Option(help="A kernel, or how the names of several begin.")] = "block_attention",
    head_dim: Annotated[str, typer.Option(help="Head dims, as in 64,128.")] = "64",
    cluster_size: Annotated[str, typer.Option(help="Block sizes of queries and keys, as in 64,128.")] = "64",
    length: Annotated[int, typer.Option(min=1, help="Tokens; results serve other lengths too.")] = 4096,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    budget: Annotated[str, typer.Option(help="Time for all of it, as in 30s or 2m.")] = "30s",
) -> None:
    """Find the fastest block sizes for this machine's CPU, and remember them.

    Each run tries what no run before has tried, next to the best so far, so that several short runs do what a long one
    does. Every candidate's results are compared with the definition in float64 first.
    """
    from fastattn.autotune.block_attention import Sizes
    from fastattn.kernels.errors import Unsupported

    console = Console()
    try:
        seconds = parse_budget(budget)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        jobs = [
            Sizes(length=length, cluster_size=size, head_dim=dim, value_dim=dim, heads=heads)
            for dim in integers("head_dim", head_dim)
            for size in integers("cluster_size", cluster_size)
        ]
        outcomes = tune_block_attention(jobs, seconds, kernel=kernel, dtype=dtype, console=console)
    except (ValueError, Unsupported, TimeoutError, OSError) as error:
        console.print(f"[red]nothing was tuned:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    print_outcomes(outcomes, console)


def tune_block_attention(
    jobs: Sequence[Sizes], seconds: float, *, kernel: str = "block_attention", dtype: str = "fp32",
    console: Console | None = None,
) -> list[Outcome]:  # fmt: skip
    """Tunes the kernels whose names start with ``kernel`` for each input of ``jobs``, on the CPU, in ``seconds``.

    Progress is shown on ``console``. Each kernel gets an equal part of the time that is left. Raises ValueError for a
    kernel that does not exist, :class:`~fastattn.kernels.errors.Unsupported` where no kernel can run.
    """
    import torch

    from fastattn.autotune.block_attention import kernel_names, problems
    from fastattn.autotune.tune import tune
    from fastattn.reference.block_attention import block_attention

    end = time.monotonic() + seconds
    names = kernel_names(kernel)
    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, torch.inference_mode(False):
        bar = progress.add_task("preparing", total=seconds, step="")
        for done, sizes in enumerate(jobs):
            left = len(names) * (len(jobs) - done)

            def show(step: str) -> None:
                progress.update(bar, completed=seconds - max(0.0, end - time.monotonic()), step=step)

            for problem in problems(sizes, getattr(torch, DTYPES[dtype]), torch.device("cpu"), block_attention, names):
                progress.update(bar, description=problem.kernel)
                share = (end - time.monotonic()) / left
                outcomes.append(tune(problem, share, on_progress=show))
                left -= 1
    return outcomes


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table for each kernel and input: every candidate that was run, the chosen one marked."""
    from fastattn.autotune.schema import OK

    for outcome in outcomes:
        shape = outcome.key.shape
        title = f"{outcome.key.kernel}, blocks of {shape['c_q']} x {shape['c_k']}, head dim {shape['head_dim']}"
        table = Table(title=title, title_justify="left")
        table.add_column("tile")
        for name in ("µs", "quartiles", "error"):
            table.add_column(name, justify="right")
        table.add_column("")
        for i, row in enumerate(outcome.rows):
            notes = ["default"] if i == 0 else []
            if outcome.chosen is not None and row.config == outcome.chosen.config:
                notes.append("[bold green]chosen[/bold green]")
            if row.verdict != OK:
                notes.append(f"[red]{row.verdict}: {escape(row.reason or '')}[/red]")
            table.add_row(
                " x ".join(str(size) for size in row.config.blocks.values()),
                "" if row.time_us is None else f"{row.time_us:,.0f}",
                "" if row.spread_us is None else f"{row.spread_us[0]:,.0f} - {row.spread_us[1]:,.0f}",
                "" if row.error is None else f"{row.error:.1e}",
                ", ".join(notes),
            )
        console.print(table)
    left = sum(outcome.left for outcome in outcomes)
    if left:
        console.print(f"{left} candidates did not fit into the time; run it again and it goes on with them.")


def parse_budget(text: str) -> float:
    """Seconds: ``"30s"``, ``"2m"``, ``"1.5h"`` or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"budget must be a time above zero such as 30s, 2m or 1h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def integers(name: str, text: str) -> list[int]:
    """The numbers of an option such as ``64,128``. Raises ValueError, which names the option, for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name} must be positive integers with commas between them, got {text!r}")
    return [int(part) for part in parts]
