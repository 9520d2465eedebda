"""``fastattn cache``: what the tuning cache holds, and what a call would get from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastattn.cli.tune import DTYPES

if TYPE_CHECKING:
    from fastattn.autotune.key import Key

app = typer.Typer(help="Look into the cache of tuned block sizes.", no_args_is_help=True)


@app.command()
def path() -> None:
    """Print the folder of tuned block sizes."""
    from fastattn.autotune.store import default_store

    typer.echo(default_store().folder)


@app.command("list")
def list_() -> None:
    """Show the best row of every tuned kernel, device and shape."""
    from fastattn.autotune.schema import MEASURED, best
    from fastattn.autotune.store import default_store

    console = Console(highlight=False, soft_wrap=True)
    store = default_store()
    entries = store.read()
    if not entries:
        console.print(f"{store.folder} holds no rows; fastattn tune fills it.")
    for entry in entries:
        key, row = entry.key, best(entry.rows, MEASURED)
        threads = "" if key.threads is None else f", {key.threads} threads"
        sizes = ", ".join(f"{name} {size}" for name, size in key.shape.items())
        flags = "".join(f", {name}" if value is True else f", {name} {value}" for name, value in key.flags.items())
        console.print(f"[bold]{key.kernel}[/bold] {key.dtype} on {key.device}, {key.arch}{threads}")
        console.print(f"  {sizes}{flags}")
        chosen = "none is usable" if row is None else f"{_blocks(row.config.blocks)}, {row.time_us:,.0f} µs"
        console.print(f"  best of {len(entry.rows)}: {chosen}; {_age(key)}")


def _age(key: Key) -> str:
    """Whether this installation would still use rows under ``key``, and if not, why."""
    from fastattn.autotune.device import machine_compiler, triton_version
    from fastattn.autotune.source import source_hash

    try:
        current = {
            "source": source_hash(key.kernel), "triton": triton_version(), "compiler": machine_compiler(key.arch)
        }  # fmt: skip
    except (ValueError, ImportError) as error:
        return f"not used here: {error}"
    changed = [name for name, value in current.items() if value != getattr(key, name)]
    return f"no longer used, for another {' and '.join(changed)}" if changed else "in use"


@app.command()
def explain(
    kernel: Annotated[str, typer.Argument(help="As in block_attention_forward.")],
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    cluster_size: Annotated[int, typer.Option(min=1)] = 64,
    length: Annotated[int, typer.Option(min=1)] = 4096,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
) -> None:
    """Tell which row a call of SMYRF's kernels would use on this machine, and why."""
    import torch

    from fastattn.autotune.block_attention import PATTERN, Sizes
    from fastattn.autotune.choice import explain as explain_choice
    from fastattn.kernels.block_attention import heuristic

    console = Console(highlight=False)
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        sizes = Sizes(
            length=length, cluster_size=cluster_size, head_dim=head_dim, value_dim=head_dim, heads=heads,
            rounds=rounds, batch=batch,
        )  # fmt: skip
        torch_device = torch.device(device)
        choice = explain_choice(kernel, torch_device, getattr(torch, DTYPES[dtype]), sizes.shape(), vars(PATTERN))
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
        raise typer.Exit(1) from error
    table = Table(show_header=False, box=None)
    if choice.row is None or choice.config is None:
        kind = "hip" if torch.version.hip and torch_device.type == "cuda" else torch_device.type
        element_size = getattr(torch, DTYPES[dtype]).itemsize
        config = heuristic(kernel, kind, cluster_size, cluster_size, head_dim, element_size)
        table.add_row("config", f"{_blocks(config.blocks)}, by the kernel's heuristic")
        table.add_row("why", choice.why)
    else:
        table.add_row("config", _blocks(choice.config.blocks))
        table.add_row("why", choice.why)
        table.add_row("time", f"{choice.row.time_us:,.0f} µs, quartiles {choice.row.spread_us}, {choice.row.runs} runs")
        table.add_row("written", f"{choice.row.written:%Y-%m-%d %H:%M} UTC")
    if choice.key is not None:
        for name, value in choice.key.model_dump().items():
            table.add_row(name, str(value))
    console.print(table)


def _blocks(blocks: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in blocks.items())
