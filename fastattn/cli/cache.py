"""``fastattn cache``: what the tuning cache holds, what a call would get from it, and its upkeep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastattn.cli.tune import DTYPES

if TYPE_CHECKING:
    from fastattn.autotune.choice import Choice
    from fastattn.autotune.key import Key
    from fastattn.autotune.schema import Entry, Row
    from fastattn.autotune.upkeep import Difference, Report
    from fastattn.kernels.config import Config

app = typer.Typer(help="Look into the cache of tuned block sizes, and look after it.", no_args_is_help=True)

KernelOption = Annotated[str, typer.Option(help="A kernel, or how the names of several begin.")]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")]


@app.command()
def path() -> None:
    """Print the folder of tuned block sizes."""
    from fastattn.autotune.store import default_store

    typer.echo(default_store().folder)


@app.command("list")
def list_(
    kernel: KernelOption = "",
    device: Annotated[str, typer.Option(help="Part of a device's name or architecture.")] = "",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "",
    label: Annotated[str, typer.Option(help="measured or modelled.")] = "",
    stale: Annotated[bool, typer.Option("--stale", help="Only rows that this installation no longer uses.")] = False,
    shipped: Annotated[bool, typer.Option("--shipped", help="What came with fastattn, not your own.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the best row of every tuned kernel, device and shape."""
    from fastattn.autotune.store import default_store, shipped_store
    from fastattn.autotune.upkeep import chosen, staleness

    console = _console()
    with _errors_told(console):
        wanted_dtype = _dtype_name(dtype) if dtype else ""
        store = shipped_store() if shipped else default_store()
        shown = []
        entries = store.read()
        for entry in sorted(entries, key=lambda entry: (entry.key.kernel, entry.key.identity())):
            key, row = entry.key, chosen(entry.rows)
            why = staleness(key)
            if (
                key.kernel.startswith(kernel)
                and device.lower() in f"{key.device} {key.arch}".lower()
                and wanted_dtype in ("", key.dtype)
                and (not label or (row is not None and row.label == label))
                and (why is not None or not stale)
            ):
                shown.append((entry, row, why))
    if as_json:
        typer.echo(json.dumps([_facts(*item) for item in shown], indent=1))
        return
    if not entries:
        console.print(f"{store.folder} holds no rows; fastattn tune fills it.")
    elif not shown:
        console.print(f"None of the {len(entries)} entries in {store.folder} is like that.")
    for entry, row, why in shown:
        _print_entry(entry, row, why, console)
    _tell_pins(console)


def _print_entry(entry: Entry, row: Row | None, why: str | None, console: Console) -> None:
    key = entry.key
    threads = "" if key.threads is None else f", {key.threads} threads"
    console.print(f"[bold]{key.kernel}[/bold] {key.dtype} on {escape(key.device)}, {key.arch}{threads}")
    console.print(f"  {_sizes(key)}")
    if row is None:
        chosen = "none is usable"
    else:
        chosen = f"{_config(row.launch_config(), key.arch)}: {row.time_us:,.1f} µs, {row.label} {_age(row)} ago"
    state = "in use" if why is None else f"no longer used, {escape(why)}"
    console.print(f"  best of {len(entry.rows)}: {chosen}; {state}")


def _facts(entry: Entry, row: Row | None, why: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"key": entry.key.model_dump(mode="json"), "rows": len(entry.rows), "stale": why}
    facts["chosen"] = _row_facts(row)
    if row is not None:
        facts["age_days"] = round((datetime.now(UTC) - row.written).total_seconds() / 86400, 3)
    return facts


@app.command()
def explain(
    kernel: Annotated[str, typer.Argument(help="As in block_attention_forward, or how the names of several begin.")],
    sizes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Sizes and flags of a call, as in length=4096 is_causal=true."),
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1)] = None,
    cluster_size: Annotated[int | None, typer.Option(min=1)] = None,
    length: Annotated[int | None, typer.Option(min=1)] = None,
    heads: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "fp32",
    device: Annotated[
        str, typer.Option(help="As torch names it, or a GPU that is not here by its name in fastattn devices.")
    ] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tell which configuration a call would run with, and why.

    A size that is not given is that of a usual call.
    """
    from fastattn.autotune.rooms import kernel_names

    console = _console()
    options = {
        "head_dim": head_dim, "cluster_size": cluster_size, "length": length, "heads": heads, "rounds": rounds,
        "batch": batch,
    }  # fmt: skip
    with _errors_told(console):
        values = {name: value for name, value in options.items() if value is not None} | _assignments(sizes or [])
        names = kernel_names(kernel)
        known = {name: None for kernel_name in names for table in _names(kernel_name) for name in table}
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"{kernel} has no size or flag {unknown[0]}; it has {', '.join(known)}")
        answers = [(name, *_answer(name, values, dtype, device)) for name in names]
    if as_json:
        typer.echo(json.dumps([_told(*answer) for answer in answers], indent=1))
        return
    for name, choice, default in answers:
        table = Table(title=name if len(answers) > 1 else None, show_header=False, box=None, title_justify="left")
        arch = choice.key.arch if choice.key is not None else ""
        if choice.row is None or choice.config is None:
            table.add_row("config", f"{_config(default, arch or device)}, by the kernel's heuristic")
            table.add_row("why", escape(choice.why))
        else:
            row = choice.row
            table.add_row("config", _config(choice.config, arch))
            table.add_row("why", escape(choice.why))
            spread = "" if row.spread_us is None else " (quartiles {:,.1f} - {:,.1f})".format(*row.spread_us)
            runs = f" in {row.runs} runs" if row.runs else ""
            table.add_row("time", f"{row.time_us:,.1f} µs{spread}, {row.label}{runs}")
            for term, value in row.terms.items():
                table.add_row(f"  {escape(term)}", escape(str(value)))
            table.add_row("written", f"{row.written:%Y-%m-%d %H:%M} UTC")
        if choice.key is not None:
            for field, value in choice.key.model_dump(exclude_none=True).items():
                table.add_row(field, escape(_listed(value) if isinstance(value, dict) else str(value)))
        console.print(table)


def _answer(kernel: str, values: dict[str, Any], dtype: str, device: str) -> tuple[Choice, Config]:
    """(what a lookup says, what the heuristic says)."""
    import torch

    from fastattn.autotune.choice import explain
    from fastattn.autotune.devices import device_named, devices
    from fastattn.autotune.rooms import room_of
    from fastattn.kernels.launch import device_kind

    room = room_of(kernel)
    torch_dtype = getattr(torch, _dtype_name(dtype))
    names, flags = _names(kernel)
    given = {name: int(value) for name, value in values.items() if name in names}
    if "head_dim" in given and "value_dim" in names:
        given = {"value_dim": given["head_dim"]} | given
    flags = flags | {name: value for name, value in values.items() if name in flags}
    sizes = room.Sizes(**given)
    if device in devices():
        there = device_named(device)
        place, kind = there.device_name(), there.target
    else:
        place = torch.device(device)
        kind = device_kind(place)
    choice = explain(kernel, place, torch_dtype, sizes.shape(kernel), flags)
    return choice, room.candidates(kernel, kind, sizes, torch_dtype.itemsize)[0]


def _names(kernel: str) -> tuple[list[str], dict[str, Any]]:
    """(names of a kernel's sizes, its flags as they usually are)."""
    from fastattn.autotune.rooms import room_of

    room = room_of(kernel)
    return [field.name for field in fields(room.Sizes)], dict(room.flags(kernel)[0])


def _told(kernel: str, choice: Choice, default: Config) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "config": (choice.config or default).to_dict(),
        "why": choice.why,
        "row": _row_facts(choice.row),
        "key": None if choice.key is None else choice.key.model_dump(mode="json"),
    }


@app.command()
def verify(
    place: Annotated[Path | None, typer.Argument(help="A cache file or folder; yours where none is named.")] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Move stale rows out of your cache, into a backup file.")
    ] = False,
) -> None:
    """Read every file, and say which rows can be used.

    The exit status is 1 where a file cannot be read. Stale rows, which are for another Triton, compiler or version of a
    kernel, do no harm: another installation may still use them.
    """
    from fastattn.autotune.pins import default_file
    from fastattn.autotune.store import default_store
    from fastattn.autotune.upkeep import check, staleness, store_at

    console = _console()
    with _errors_told(console):
        if place is not None and prune:
            raise ValueError("--prune is for your own cache; name no other with it")
        if place is not None and not place.exists():
            raise FileNotFoundError(f"there is no file or folder {place}")
        store = default_store() if place is None else store_at(place)
        files = [place] if place is not None and place.is_file() else store.files()
        pins = default_file()
        if place is None and pins.exists():
            files.append(pins)
        reports = [check(file) for file in files]
    for report in reports:
        _print_report(report, console)
    console.print(_sum_of(reports, store.folder))
    for aside in sorted(store.folder.rglob("*.unreadable-*")):
        console.print(f"kept aside: {aside}")
    if prune:
        with _errors_told(console):
            backup = store.folder / f"pruned-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
            taken = store.take_out(lambda entry: staleness(entry.key) is not None, backup)
        where = f" into {backup}; fastattn cache merge brings them back" if taken else ""
        console.print(f"moved {len(taken)} stale entries{where}")
    if any(report.error for report in reports):
        raise typer.Exit(1)


def _print_report(report: Report, console: Console) -> None:
    if report.error is not None:
        console.print(f"[red]unreadable[/red] {report.file}: {escape(report.error)}")
        return
    unused = "".join(f", {count} {reason}" for reason, count in sorted(report.unused.items()))
    usable = report.rows - report.unused.total()
    console.print(f"{report.file}: {report.entries} entries, {report.rows} rows, {usable} usable{escape(unused)}")
    for why, count in sorted(report.stale.items()):
        console.print(f"  [yellow]stale[/yellow]: {count} entries {escape(why)}")


def _sum_of(reports: list[Report], folder: Path) -> str:
    broken = sum(report.error is not None for report in reports)
    entries, stale = sum(report.entries for report in reports), sum(report.stale.total() for report in reports)
    return f"{len(reports)} files in {folder}: {broken} unreadable; {entries} entries, {stale} of them stale"


@app.command()
def merge(
    places: Annotated[list[Path], typer.Argument(help="Cache files or folders, as of other machines.")],
) -> None:
    """Add the rows of other caches to your own.

    Of one configuration under one key, the latest row stays. A damaged file stops the merge before anything is written.
    """
    from fastattn.autotune.choice import forget
    from fastattn.autotune.store import default_store
    from fastattn.autotune.upkeep import entries_at, staleness

    console = _console()
    with _errors_told(console):
        entries = [entry for place in places for entry in entries_at(place)]
        store = default_store()
        before = _rows_by_name(store.read())
        store.add_entries(entries)
        forget()
        after = _rows_by_name(store.read())
    new = len(after.keys() - before.keys())
    renewed = sum(row != after[name] for name, row in before.items() if name in after)
    stale = sum(staleness(entry.key) is not None for entry in entries)
    console.print(f"{store.folder}: {new} rows are new, {renewed} were replaced by later ones")
    if stale:
        console.print(f"{stale} of {len(entries)} entries are for other code than this installation's: not used here")


def _rows_by_name(entries: Iterable[Entry]) -> dict[tuple[str, str], Row]:
    return {(entry.key.identity(), row.identity()): row for entry in entries for row in entry.rows}


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A cache file or folder.")],
    second: Annotated[Path | None, typer.Argument(help="Another; yours where none is named.")] = None,
    apart: Annotated[float, typer.Option(min=1.0, help="Times that are this many times apart are told.")] = 1.1,
    as_json: JsonOption = False,
) -> None:
    """Show where two caches choose otherwise, and where their times are apart.

    Keys that only one of them has are counted. The exit status is 0 where all is alike, 1 where something is not, and 2
    for a place that cannot be read.
    """
    from fastattn.autotune.store import default_store
    from fastattn.autotune.upkeep import differences, entries_at

    console = _console()
    with _errors_told(console, status=2):
        place = default_store().folder if second is None else second
        found = differences(entries_at(first), entries_at(place))
    common = [d for d in found if d.first is not None and d.second is not None]
    shown = [d for d in common if not d.same_config or not 1 / apart <= (d.ratio or 1.0) <= apart]
    if as_json:
        typer.echo(json.dumps([_difference_facts(difference) for difference in shown], indent=1))
    else:
        for difference in shown:
            _print_difference(difference, console)
        lone = [sum(d.second is None for d in found), sum(d.first is None for d in found)]
        others = sum(not d.same_config for d in common)
        counts = f"{others} with another choice; {lone[0]} only in the first, {lone[1]} only in the second"
        console.print(f"{len(common)} entries in both, {counts}")
    if shown or len(common) < len(found):
        raise typer.Exit(1)


def _print_difference(difference: Difference, console: Console) -> None:
    key = difference.key
    threads = "" if key.threads is None else f", {key.threads} threads"
    console.print(f"[bold]{key.kernel}[/bold] {key.dtype} on {escape(key.device)}{threads}: {_sizes(key)}")
    for name, row in (("first", difference.first), ("second", difference.second)):
        said = "nothing"
        if row is not None:
            said = f"{_config(row.launch_config(), key.arch)}: {row.time_us:,.1f} µs, {row.label}"
        console.print(f"  {name:<6} {said}")
    if difference.ratio is not None:
        console.print(f"  the second's time is {difference.ratio:.2f} of the first's")


def _difference_facts(difference: Difference) -> dict[str, Any]:
    return {
        "key": difference.key.model_dump(mode="json"),
        "first": _row_facts(difference.first),
        "second": _row_facts(difference.second),
        "ratio": difference.ratio,
    }


def _row_facts(row: Row | None) -> dict[str, Any] | None:
    return None if row is None else row.model_dump(mode="json", exclude_none=True)


@app.command()
def pin(
    output: Annotated[
        Path | None, typer.Option(help="Write this file, for other machines, and leave this one as it is.")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="Replace present pins by what is best now.")] = False,
    off: Annotated[bool, typer.Option("--off", help="End deterministic mode; the file gets another name.")] = False,
) -> None:
    """Deterministic mode: from now on, run what is best now, whatever is tuned later.

    Writes what calls would get to pins.json in the cache's folder. While that file is there, a call runs by its pin,
    and one without a pin by its kernel's heuristic: tuned rows are not used. Present pins stay, unless --renew.
    """
    from fastattn.autotune.choice import forget
    from fastattn.autotune.pins import default_file, pin_everything

    console = _console()
    with _errors_told(console):
        if off and (renew or output is not None):
            raise ValueError("--off stands alone")
        if off:
            from fastattn.autotune.store import move_aside

            file = default_file()
            kept = f"pins are kept as {move_aside(file, 'off')}" if file.exists() else "nothing was pinned"
            console.print(f"{kept}; calls use what is tuned")
        else:
            file = default_file() if output is None else output
            count, new = pin_everything(file, renew=renew)
            console.print(f"{file}: {count} configurations, {new} of them new or changed")
            if output is None:
                console.print("Calls run by them now, or by heuristics where there is none, and not by tuned rows.")
        forget()


def _tell_pins(console: Console) -> None:
    from fastattn.autotune.pins import default_file

    file = default_file()
    if file.exists():
        console.print(f"[yellow]Calls go by {file}[/yellow], not by these rows; fastattn cache pin --off ends that.")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


@contextmanager
def _errors_told(console: Console, status: int = 1) -> Iterator[None]:
    """What goes wrong becomes one line and an exit status."""
    from fastattn.autotune.schema import Unreadable

    try:
        yield
    except (ValueError, RuntimeError, OSError, ImportError, Unreadable) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(status) from error


def _dtype_name(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _assignments(words: list[str]) -> dict[str, bool | int | str]:
    found: dict[str, bool | int | str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"sizes and flags must be like length=4096 or is_causal=true, got {word!r}")
        truth = {"true": True, "false": False}.get(value.lower())
        found[name] = truth if truth is not None else int(value) if value.isdecimal() else value
    return found


def _config(config: Config, arch: str) -> str:
    """In words; what only GPUs have is left out for a CPU."""
    words = [f"{name} {size}" for name, size in config.blocks.items()]
    if arch.startswith(("sm_", "gfx")):
        words += [f"{config.num_warps} warps", f"{config.num_stages} stages"]
        words += [f"{config.num_ctas} CTAs"] if config.num_ctas > 1 else []
    return ", ".join(words)


def _sizes(key: Key) -> str:
    return escape(_listed(key.shape | key.flags))


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(name if value is True else f"{name} {value}" for name, value in values.items())


def _age(row: Row) -> str:
    seconds = max(0.0, (datetime.now(UTC) - row.written).total_seconds())
    for name, unit in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
