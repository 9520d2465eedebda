"""``fastattn tune --gpu``: block sizes for GPUs that are not here, from their binaries and a model of their time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.autotune.devices import Device
    from fastattn.autotune.search import Group, Report

COMPILE_S = 1.5  # in the mean, in one process on a quiet core: what a plan goes by
SHIPPED_ROWS = 3  # of an entry, where the cache is made to be shipped
# What to know of an architecture, as Triton 3.9 has it.
NOTES = {"sm_75": "Triton makes no tensor-core instructions for it: products run on its ALUs, from registers"}
_SPEED_S = 600.0  # of which the bar takes the mean speed


def tune_for_gpus(
    gpus: str, names: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int], *, compiles: int, limit_s: float,
    jobs: int | None = None, output: Path | None = None, plain: bool = False,
    given: Mapping[str, Sequence[int]] | None = None, console: Console | None = None, compiler: str | None = None,
) -> None:  # fmt: skip
    """Compiles and models the kernels ``names`` for ``gpus``, ``"h100,l4"`` or ``"all"``, and writes the rows.

    dtypes: torch's names. compiles: at most so many for a kernel, architecture, dtype and head dim. limit_s: of a
    compile. jobs: processes that compile; None is one for each core. output: a folder that gets the few best rows of
    each entry, as they are shipped, in place of all rows in the user's cache. plain: only the first flags of a kernel.
    given: values of sizes, such as ``length``, in place of representative ones. compiler: see
    :func:`~fastattn.autotune.offline.tune_offline`. Raises ValueError for what does not exist or makes no sense,
    RuntimeError where no compiler can be started, OSError and TimeoutError where rows cannot be written.
    """
    from fastattn.autotune import offline
    from fastattn.autotune.binaries import Binaries
    from fastattn.autotune.choice import forget
    from fastattn.autotune.offline import groups_of, ship, tune_offline
    from fastattn.autotune.search import MOST_COMPILES
    from fastattn.autotune.store import default_store
    from fastattn.cli._tuning import sizes_of
    from fastattn.kernels.settings import settings

    if not 1 <= compiles <= MOST_COMPILES:
        raise ValueError(f"compiles must be from 1 to {MOST_COMPILES}, got {compiles}")
    devices = gpus_named(gpus)
    workers = jobs or _cores()
    console = console or Console()
    groups = groups_of(
        names, devices, dtypes, head_dims, plain=plain, sizes_of=lambda room, dim: sizes_of(room, dim, given or {})
    )
    print_plan(groups, devices, compiles, workers, console)
    store, tally, start = default_store(), Tally(), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_SPEED_S) as progress:
        bar = progress.add_task("compiling", total=sum(group.most_compiles(compiles) for group in groups))

        def compiled(group: Group) -> None:
            progress.update(bar, advance=1, description=str(group))

        def write(report: Report) -> None:
            if output is None:
                store.add_entries(report.entries)
            else:
                ship(report.entries, output, SHIPPED_ROWS)
            tally.count(report)
            progress.update(bar, advance=report.group.most_compiles(compiles) - report.compiled)

        tune_offline(
            groups, Binaries(settings().cache_dir / "binaries"), write, workers=workers, compiles=compiles,
            limit_s=limit_s, compiler=compiler or offline.COMPILE, on_compile=compiled,
        )  # fmt: skip
    forget()
    tally.print(time.monotonic() - start, output or store.folder, console)


def gpus_named(text: str) -> list[Device]:
    """The GPUs of an option such as ``h100,l4``. Raises ValueError for one that is not in the table."""
    from fastattn.autotune.devices import devices

    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ["all"]:
        return list(devices().values())
    if wrong := [name for name in names if name not in devices()]:
        raise ValueError(
            f"gpu must be all, or some of {', '.join(devices())} with commas between them, got {wrong[0]!r}"
        )
    return [devices()[name] for name in names]


def print_plan(
    groups: Sequence[Group], devices: Sequence[Device], compiles: int, workers: int, console: Console
) -> None:
    """What there is to do, before it begins."""
    most = sum(group.most_compiles(compiles) for group in groups)
    kernels, archs = {group.kernel for group in groups}, dict.fromkeys(device.arch for device in devices)
    console.print(
        f"Kernels: {len(kernels)}, for {len(devices)} GPUs, architectures {', '.join(archs)}: "
        f"at most {most} compiles, {_duration(most * COMPILE_S / workers)} with {workers} "
        f"processes on quiet cores; what was compiled before is not compiled again.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for arch, note in NOTES.items():
        if arch in archs:
            console.print(f"{arch}: {note}", highlight=False, soft_wrap=True)


@dataclass
class Tally:
    """What came of all searches. entries, usable: by GPU; those with a usable row."""

    entries: Counter[str] = field(default_factory=Counter)
    usable: Counter[str] = field(default_factory=Counter)
    compiled: int = 0
    rejected: int = 0

    def count(self, report: Report) -> None:
        from fastattn.autotune.schema import OK

        self.compiled += report.compiled
        self.rejected += report.rejected
        for entry in report.entries:
            self.entries[entry.key.device] += 1
            self.usable[entry.key.device] += any(row.verdict == OK for row in entry.rows)

    def print(self, seconds: float, folder: Path, console: Console) -> None:
        table = Table()
        table.add_column("GPU")
        table.add_column("entries", justify="right")
        table.add_column("with a usable row", justify="right")
        for device, count in sorted(self.entries.items()):
            table.add_row(device, str(count), str(self.usable[device]))
        console.print(table)
        rate = f", {60 * self.compiled / seconds:.0f} a minute" if self.compiled else ""
        console.print(
            f"{self.compiled} compiles in {_duration(seconds)}{rate}; {self.rejected} binaries are of no use: {folder}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
