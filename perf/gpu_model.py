"""Modelled beside measured times, from the rows that tuning left in the cache of a device.

For each kernel and input: the rank correlation of both over all configurations that were measured, and how much slower
than the best of them is the one that the model would have taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.autotune.device import describe, machine_compiler, triton_version
from fastattn.autotune.rooms import kernel_names, room_of
from fastattn.autotune.schema import MEASURED, OK, Entry, Row
from fastattn.autotune.source import source_hash
from fastattn.autotune.store import default_store
from fastattn.kernels.config import Config
from fastattn.kernels.launch import device_kind
from perf.ranking import spearman

FEWEST = 3  # configurations of which a rank correlation says something


@dataclass(frozen=True)
class Compared:
    """One kernel on one input.

    points: (configuration, modelled, measured), in microseconds. correlation: Spearman's, None below :data:`FEWEST`
    points or where all are equal. chosen_us, best_us: the measured times of the configuration whose modelled time is
    the least, and of the fastest.
    """

    kernel: str
    dtype: str
    sizes: dict[str, int]
    flags: dict[str, Any]
    points: tuple[tuple[str, float, float], ...]
    correlation: float | None
    chosen_us: float
    best_us: float

    @property
    def ratio(self) -> float:
        return self.chosen_us / self.best_us


def kernels(device: torch.device) -> list[str]:
    """The kernels of which measured rows are in the cache."""
    return [name for name in kernel_names() if any(_measured(entry) for entry in _entries(name, device))]


def compare(kernel: str, device: torch.device) -> Iterator[Compared]:
    for entry in _entries(kernel, device):
        rows = _measured(entry)
        if rows:
            # buckets hold several sizes; those of the latest measurement count
            sizes = max(rows, key=lambda row: row.written).problem
            yield _compared(entry, sizes, [row for row in rows if row.problem == sizes], device)


def _compared(entry: Entry, sizes: dict[str, int], rows: Sequence[Row], device: torch.device) -> Compared:
    key, points = entry.key, []
    for row in rows:
        config = row.launch_config()
        modelled = modelled_us(key.kernel, sizes, key.dtype, key.flags, config, device)
        points.append((str(config.to_dict()), modelled, float(row.time_us or math.nan)))
    return Compared(
        key.kernel, key.dtype, sizes, dict(key.flags), tuple(points),
        _correlation(points),
        chosen_us=min(points, key=lambda x: x[1])[2], best_us=min(x[2] for x in points),
    )  # fmt: skip


def modelled_us(
    kernel: str, sizes: dict[str, int], dtype: str, flags: dict[str, Any], config: Config, device: torch.device
) -> float:
    """What the model says of one configuration, without its binary."""
    from fastattn.autotune.devices import at_hand
    from fastattn.autotune.model import modelled_time

    room, kind = room_of(kernel), getattr(torch, dtype)
    given = room.Sizes(**sizes)
    options = next(x for x in room.flags(kernel) if {n: v for n, v in x.items() if v} == flags)
    launch = room.example(kernel, given, kind, device_kind(device), config, options)
    cost = room.cost(kernel, given, kind.itemsize, config, options)
    return modelled_time(at_hand(device), cost, dtype, math.prod(launch.grid), config).time_us


def _correlation(points: Sequence[tuple[str, float, float]]) -> float | None:
    found = spearman([x[1] for x in points], [x[2] for x in points]) if len(points) >= FEWEST else math.nan
    return None if math.isnan(found) else found


def _entries(kernel: str, device: torch.device) -> list[Entry]:
    """Those of this device, of the kernel and the compilers as they are."""
    name = describe(device)
    here = (name.name, name.threads, source_hash(kernel), triton_version(), machine_compiler(name.arch))
    found = default_store().read(kernel, name.arch)
    return [x for x in found if (x.key.device, x.key.threads, x.key.source, x.key.triton, x.key.compiler) == here]


def _measured(entry: Entry) -> list[Row]:
    return [row for row in entry.rows if row.label == MEASURED and row.verdict == OK and row.time_us is not None]
