"""``fastattn tune``: measures block sizes on this machine and writes them to the cache that the ops look up."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.autotune.schema import Row
    from fastattn.autotune.shard import Tuned
    from fastattn.autotune.tune import Outcome

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_MOST_IN_FULL = 4  # problems whose every candidate is printed


def command(
    kernel: Annotated[str, typer.Option(help="all, or names or how they begin, with commas between them.")] = "all",
    head_dim: Annotated[str, typer.Option(help="Head dims, as in 64,128.")] = "64",
    dtype: Annotated[str, typer.Option(help=f"Types of q, k and v, of {','.join(DTYPES)}.")] = "fp32",
    cluster_size: Annotated[str | None, typer.Option(help="Block sizes of queries and keys, as in 64,128.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens; results serve other lengths too.")] = None,
    heads: Annotated[int | None, typer.Option(min=1)] = None,
    budget: Annotated[str, typer.Option(help="Wall-clock time for all of it, as in 60s, 5m or 1h.")] = "60s",
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Every candidate, not only those near the best.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Without causal attention and other options.")] = False,
    device: Annotated[str | None, typer.Option(help="As torch names it; by default a GPU if there is one.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPUs that need not be here, as in h100,l4, or all: kernels are compiled, not run."),
    ] = None,
    compiles: Annotated[
        int, typer.Option(help="With --gpu: the most for a kernel, architecture, dtype and head dim; 1 to 12.")
    ] = 12,
    compile_limit: Annotated[str, typer.Option(help="With --gpu: the most CPU time of a compile.")] = "60s",
    jobs: Annotated[int | None, typer.Option(min=1, help="With --gpu: compilers at a time; by default, cores.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --gpu: write the best rows into this folder, to be shipped.")
    ] = None,
) -> None:
    """Find the fastest block sizes for this machine, and remember them.

    Sizes that are not given are what methods have by default. Each run tries what no run before has tried, next to the
    best so far, so that several short runs do what a long one does. Every candidate's results are compared with the
    definition in float64 first.

    With --gpu, nothing runs: binaries of the most promising candidates are read for what they take, and a model ranks
    them. It can be stopped, and goes on where it was.
    """
    from fastattn.kernels.errors import Unsupported

    console = Console()
    try:
        seconds = parse_budget(budget)
        given = {"cluster_size": None if cluster_size is None else integers("cluster_size", cluster_size)}
        given |= {"length": [length] if length else None, "heads": [heads] if heads else None}
        if gpu is not None:
            if device is not None or exhaustive:
                raise ValueError("--device and --exhaustive are for measuring; with --gpu nothing runs")
            from fastattn.cli._offline import tune_for_gpus
            from fastattn.cli._tuning import names_of

            tune_for_gpus(
                gpu, names_of(kernel), [DTYPES[name] for name in dtypes_of(dtype)], integers("head_dim", head_dim),
                compiles=compiles, limit_s=parse_budget(compile_limit), jobs=jobs, output=output, plain=plain,
                given={name: values for name, values in given.items() if values}, console=console,
            )  # fmt: skip
            return
        tuned = tune_kernels(
            kernel, seconds, dtypes=dtypes_of(dtype), head_dims=integers("head_dim", head_dim), device=device,
            plain=plain, is_full=exhaustive, console=console, **given,
        )  # fmt: skip
    except (ValueError, RuntimeError, Unsupported, TimeoutError, OSError) as error:
        console.print(f"[red]nothing was tuned:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if not is_first_worker():
        return
    print_outcomes(tuned.outcomes, console)
    for name, reason in tuned.refused.items():
        console.print(f"{name} [red]cannot run here:[/red] {escape(reason)}", highlight=False, soft_wrap=True)
    if tuned.left:
        console.print(f"{tuned.left} problems did not get their turn; run it again and it begins with them.")


def tune_kernels(
    kernel: str, seconds: float, *, dtypes: Sequence[str] = ("fp32",), head_dims: Sequence[int] = (64,),
    device: str | None = None, plain: bool = False, is_full: bool = False, console: Console | None = None,
    **given: Sequence[int] | None,
) -> Tuned:  # fmt: skip
    """Tunes kernels in ``seconds`` on a device of this machine, together with other workers of ``torchrun``.

    kernel: as the command's option. given: values of sizes, such as ``length``, in place of representative ones.
    Progress is shown on ``console``. Raises ValueError for what does not exist or makes no sense, RuntimeError for a
    worker that is lost, :class:`~fastattn.kernels.errors.Unsupported` where no kernel can run.
    """
    import torch

    from fastattn.autotune.shard import team, tune_all
    from fastattn.cli._tuning import groups, names_of

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise ValueError(f"device {where} is not there: {error}") from error
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[step]}"), TimeElapsedColumn())
    with (
        team() as workers,
        Progress(*columns, console=console, transient=True, disable=workers.rank > 0) as progress,
    ):
        wanted = groups(
            names_of(kernel), [getattr(torch, DTYPES[name]) for name in dtypes], head_dims, where,
            {name: values for name, values in given.items() if values}, plain=plain, one_by_one=workers.size > 1,
        )  # fmt: skip
        bar = progress.add_task("", total=seconds, step="")

        def show(kernel: str, step: str) -> None:
            progress.update(bar, description=kernel, completed=progress.tasks[bar].elapsed or 0.0, step=step)

        return tune_all(wanted, seconds, where, workers=workers, on_progress=show, is_full=is_full)


def is_first_worker() -> bool:
    """Whether this process is the one of ``torchrun``'s that prints."""
    return os.environ.get("RANK", "0") == "0"


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """A table for each problem with every candidate that was run; where there are many, a table with a line for each,
    and the candidates that are no good."""
    if len(outcomes) <= _MOST_IN_FULL:
        for outcome in outcomes:
            console.print(_title(outcome), highlight=False, soft_wrap=True)
            console.print(_candidates(outcome))
    else:
        console.print(_problems(outcomes))
        for outcome in outcomes:
            for row in outcome.rows:
                if note := _verdict(row):
                    console.print(f"{_title(outcome)}, {_tile(row)}: {note}")
    left = sum(outcome.left for outcome in outcomes)
    if left:
        console.print(f"{left} candidates did not fit into the time; run it again and it goes on with them.")


def _candidates(outcome: Outcome) -> Table:
    table = Table()
    table.add_column("tile")
    for name in ("µs", "quartiles", "error"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in outcome.rows:
        notes = ["default"] if row.launch_config() == outcome.default else []
        if outcome.chosen is not None and row.config == outcome.chosen.config:
            notes.append("[bold green]chosen[/bold green]")
        table.add_row(
            _tile(row),
            _time(row),
            "" if row.spread_us is None else " - ".join(map(_microseconds, row.spread_us)),
            "" if row.error is None else f"{row.error:.1e}",
            ", ".join(notes + [note for note in [_verdict(row)] if note]),
        )
    return table


def _problems(outcomes: Sequence[Outcome]) -> Table:
    table = Table()
    table.add_column("problem")
    for name in ("default", "µs", "chosen", "µs", "tried", "left"):
        table.add_column(name, justify="right")
    for outcome in outcomes:
        default = next((row for row in outcome.rows if row.launch_config() == outcome.default), None)
        cells = [_tile(default), _time(default), _tile(outcome.chosen), _time(outcome.chosen)]
        table.add_row(_title(outcome), *cells, str(len(outcome.rows)), str(outcome.left))
    return table


def _title(outcome: Outcome) -> str:
    """What was tuned, in words: kernel, dtype, what is more than one, and flags that are not off."""
    key = outcome.key
    sizes = {**(outcome.rows[0].problem if outcome.rows else key.shape)}
    parts = [key.kernel, key.dtype, *(f"{name} {size}" for name, size in sizes.items() if size != 1)]
    parts += [name if value is True else f"{name} {value}" for name, value in key.flags.items()]
    return ", ".join(parts)


def _tile(row: Row | None) -> str:
    if row is None:
        return ""
    config = row.launch_config()
    tile = " x ".join(str(size) for size in config.blocks.values())
    return (
        tile
        if config == type(config)(config.blocks)
        else f"{tile}, {config.num_warps} warps, "
        + (f"{config.num_stages} stages" + (f", {config.num_ctas} blocks" if config.num_ctas > 1 else ""))
    )


def _time(row: Row | None) -> str:
    return "" if row is None or row.time_us is None else _microseconds(row.time_us)


def _microseconds(time_us: float) -> str:
    return f"{time_us:,.0f}" if time_us >= 100 else f"{time_us:.1f}"


def _verdict(row: Row) -> str:
    from fastattn.autotune.schema import OK

    return "" if row.verdict == OK else f"[red]{row.verdict}: {escape(row.reason or '')}[/red]"


def dtypes_of(text: str) -> list[str]:
    """The types of an option such as ``fp16,fp32``. Raises ValueError for any other than :data:`DTYPES`."""
    names = [name.strip() for name in text.split(",")]
    if wrong := [name for name in names if name not in DTYPES]:
        raise ValueError(f"dtype must be some of {', '.join(DTYPES)} with commas between them, got {wrong[0]!r}")
    return names


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
