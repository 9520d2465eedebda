"""``fastattn devices``: the GPUs that kernels can be tuned for without having one, and the devices of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.autotune.devices import Device


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Every figure, with its sources, as JSON.")] = False,
) -> None:
    """Show the devices that fastattn knows, and what this machine has.

    A GPU of this machine that is not in the table is read from its driver; the rates of its CPU are measured once, in
    less than a second.
    """
    from fastattn.autotune.devices import devices

    known, here = list(devices().values()), at_hand()
    if as_json:
        print(json.dumps({"devices": [asdict(x) for x in known], "at_hand": [asdict(x) for x in here]}, indent=1))
        return
    console = Console()
    console.print(table("GPUs by name, for tune --gpu", known))
    console.print(table("in this machine", here))
    for device in here:
        for note in device.notes:
            console.print(f"{escape(device.name)}: {escape(note)}", highlight=False, soft_wrap=True)


def at_hand() -> list[Device]:
    """The CPU, and each GPU that torch sees and whose architecture is known."""
    import torch

    from fastattn.autotune.devices import at_hand

    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    found = []
    for place in places:
        try:
            found.append(at_hand(place))
        except ValueError as error:
            Console(stderr=True).print(f"left out: {escape(str(error))}", highlight=False, soft_wrap=True)
    return found


def table(title: str, rows: list[Device]) -> Table:
    """A row a device: rates of the whole device, shared memory of a program."""
    shown = Table(title=title, title_justify="left")
    for name in ("name", "device", "arch"):
        shown.add_column(name, no_wrap=name != "device")
    for name in ("SMs", "GHz", "GB/s", "TFLOP/s fp16", "bf16", "fp32", "shared KiB", "L2 MiB"):
        shown.add_column(name, justify="right")
    for device in rows:
        shown.add_row(
            escape(device.name),
            escape(device.title),
            device.arch,
            str(device.sms),
            f"{device.clock_ghz:.2f}" if device.clock_ghz else "",
            f"{device.bandwidth / 1e9:,.0f}",
            *(_tera(device.rate(dtype)) for dtype in ("float16", "bfloat16", "float32")),
            f"{device.shared_per_block / 1024:.0f}" if device.shared_per_block else "",
            f"{device.l2_bytes / 2**20:.0f}",
        )
    return shown


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.1f}" if rate >= 1e12 else f"{rate / 1e12:.2f}"
