"""The time model's ranking against measured times, on this CPU: ``python -m perf ranking``.

For every tunable kernel, each candidate of its whole space is run in turns with the others, on one thread, and the
order of the times is held against the order that :mod:`fastattn.autotune.model` gives. A time is the least one of all
turns, of the processor and not of the clock on the wall: whatever else the machine does only adds to either.

What this validates is what both kinds of devices share: work, bytes, tails, and what tiles and steps add to them. Of
occupancy, shared memory and tensor cores a CPU says nothing.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fastattn.autotune.cpu_rates import Rates, rates
from fastattn.autotune.device import DeviceName
from fastattn.autotune.devices import Device, at_hand, cpu_device
from fastattn.autotune.model import modelled_time
from fastattn.autotune.problem import Problem
from fastattn.autotune.rooms import kernel_names, room_of
from fastattn.kernels.config import Config, cdiv
from perf import report
from perf.plot import pyplot

# Small ones, since short calls run undisturbed now and then on a busy machine, whose tiles may have any size.
SIZES: dict[str, dict[str, int]] = {
    "block_attention": {"length": 1024, "heads": 1, "cluster_size": 128},
    "hash_argmax": {"length": 1024, "heads": 1, "rounds": 4},
    "smyrf_hash": {"length": 4096, "heads": 1},
    "hamming": {"length": 2048, "heads": 1},
    "cluster_attention": {"heads": 1},
    "topk_attention": {"length": 1024, "heads": 1, "n_clusters": 8, "top_k": 64},
    "centroid_attention": {"length": 2048, "heads": 1},
    "linear_attention": {"length": 1024, "heads": 1, "head_dim": 32, "value_dim": 32},
    "linear_attention_step": {"batch": 8},
}
LATER = frozenset({"smyrf_hash_project", "smyrf_hash_lift"})  # kernels younger than the times in results
SECONDS = 15.0  # of measuring, for a kernel
LEAST_TURNS, MOST_TURNS = 8, 200
FLAT = 1.10  # a space whose slowest candidate is within this of its fastest has no order to speak of
LEAST_CORRELATION, MOST_LOST = 0.7, 1.10  # goals: Spearman's; the first choice's time against the best


@dataclass(frozen=True)
class Point:
    """A candidate of ``kernel`` on ``sizes`` of its room: measured and modelled microseconds."""

    kernel: str
    sizes: dict[str, int]
    blocks: dict[str, int]
    measured: float
    modelled: float


@dataclass(frozen=True)
class Ranking:
    """Of one kernel. correlation: Spearman's, of modelled and measured times. lost: the time of the model's first
    choice against the best one. spread: the slowest time against the fastest."""

    kernel: str
    points: tuple[Point, ...]
    correlation: float
    lost: float
    spread: float

    @property
    def verdict(self) -> str:
        if self.spread <= FLAT:
            return "flat"
        return "reached" if self.correlation >= LEAST_CORRELATION and self.lost <= MOST_LOST else "missed"


def ranking(points: Sequence[Point]) -> Ranking:
    """Of the candidates of one kernel."""
    times = [point.measured for point in points]
    first = min(points, key=lambda point: point.modelled)
    correlation = spearman([point.modelled for point in points], times)
    return Ranking(points[0].kernel, tuple(points), correlation, first.measured / min(times), max(times) / min(times))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """The correlation of ranks; of equal values each has their mean rank. NaN where all values of one are equal."""
    ranks = [_ranks(values) for values in (a, b)]
    try:
        return statistics.correlation(*ranks)
    except statistics.StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: order.index(value) for value in set(order)}
    return [first[value] + (order.count(value) - 1) / 2 for value in values]


def least_times(
    calls: Mapping[Config, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.process_time
) -> dict[Config, float]:
    """Microseconds of each call: the least of at least :data:`LEAST_TURNS` in turns."""
    order, names = random.Random(0), list(calls)
    least = dict.fromkeys(names, math.inf)
    end = time.monotonic() + seconds
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.monotonic() > end:
            break
        order.shuffle(names)
        for name in names:
            began = clock()
            calls[name]()
            least[name] = min(least[name], (clock() - began) * 1e6)
    return least


def problem_of(kernel: str, sizes: Any) -> Problem:
    """The plain problem of ``kernel``, fp32."""
    room = room_of(kernel)
    return next(iter(room.problems(sizes, torch.float32, torch.device("cpu"), _reference(room), [kernel])))


def _reference(room: ModuleType) -> Any:
    name = room.__name__.rsplit(".", 1)[1]
    parts = ("hash_bits", "hamming_kmeans") if name == "hamming" else (name,)
    modules = [import_module(f"fastattn.reference.{part}") for part in parts]
    return SimpleNamespace(**{key: value for module in modules for key, value in vars(module).items()})


def sizes_of(kernel: str) -> Any:
    room = room_of(kernel)
    return room.Sizes(**SIZES[room.__name__.rsplit(".", 1)[1]])


def measure(kernel: str, seconds: float, device: Device) -> list[Point]:
    sizes = sizes_of(kernel)
    problem = problem_of(kernel, sizes)
    for config in problem.candidates:
        problem.run(config)
    times = least_times({c: (lambda c=c: problem.run(c)) for c in problem.candidates}, seconds)
    return [point_of(device, kernel, vars(sizes), config.blocks, took) for config, took in times.items()]


def point_of(
    device: Device, kernel: str, sizes: Mapping[str, int], blocks: Mapping[str, int], measured: float
) -> Point:  # fmt: skip
    room, config = room_of(kernel), Config(dict(blocks))
    own = room.Sizes(**sizes)
    grid = room.example(kernel, own, torch.float32, device.kind, config).grid
    made = modelled_time(device, room.cost(kernel, own, 4, config), "float32", math.prod(grid), config)
    return Point(kernel, dict(sizes), dict(blocks), measured, made.time_us)


def read(path: Path) -> list[Point]:
    """The times that :func:`write` wrote, with what the model says now of the device that they were measured on."""
    device = device_of(path)
    return [point_of(device, **row) for row in json.loads(path.read_text())["rows"]]


def device_of(path: Path) -> Device:
    """The device that the times in a ranking.json were measured on."""
    recorded = json.loads(path.read_text())
    machine = recorded["machine"]
    return cpu_device(Rates(**recorded["rates"]), DeviceName(machine["vectors"], machine["CPU"], 1))


def write(points: Iterable[Point], rates: Rates, facts: Mapping[str, str], path: Path) -> None:
    rows = [{name: vars(p)[name] for name in ("kernel", "sizes", "blocks", "measured")} for p in points]
    lines = ",\n".join("  " + json.dumps(row | {"measured": round(row["measured"], 1)}) for row in rows)
    head = f' "machine": {json.dumps(dict(facts))},\n "rates": {json.dumps(asdict(rates))},\n'
    path.write_text(f'{{\n{head} "rows": [\n{lines}\n ]\n}}\n')


def rankings(points: Iterable[Point]) -> list[Ranking]:
    by_kernel: dict[str, list[Point]] = {}
    for point in points:
        by_kernel.setdefault(point.kernel, []).append(point)
    return [ranking(own) for own in by_kernel.values()]


def markdown(found: Sequence[Ranking], facts: Mapping[str, str]) -> str:
    lines = [
        "# The time model's ranking against measured times",
        "",
        "Every candidate of each kernel's whole space on the CPU, fp32, one thread: the order of the times that "
        "`autotune/model.py` gives beside that of the measured ones (the least of all turns, processor time). "
        f"Goals: Spearman's correlation of {LEAST_CORRELATION} or more, and a first choice within "
        f"{100 * (MOST_LOST - 1):.0f} % of the best measured. A space is flat, and has no order to speak of, where the "
        f"slowest candidate is within {100 * (FLAT - 1):.0f} % of the fastest. Made by `python -m perf ranking`.",
        "",
        "This validates what both kinds of devices share: work, bytes, tails, and what tiles and steps add to them. It "
        "says nothing of occupancy, shared memory or tensor cores, which a CPU does not have.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| kernel | candidates | fastest | slowest / fastest | correlation | first choice / fastest | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for one in found:
        least = min(point.measured for point in one.points)
        lines.append(
            f"| {one.kernel} | {len(one.points)} | {least:,.0f} µs | {one.spread:.2f} | {one.correlation:.2f} "
            f"| {one.lost:.2f} | {one.verdict} |"
        )
    return "\n".join([*lines, "", "![measured against modelled times](ranking.svg)", ""])


def draw(found: Sequence[Ranking], path: Path) -> None:
    """Measured over modelled times, both as multiples of the fastest measured one, a panel a kernel."""
    plt = pyplot()
    columns = 4
    figure, panels = plt.subplots(cdiv(len(found), columns), columns, figsize=(12, 2.6 * cdiv(len(found), columns)))
    for panel in panels.flat[len(found) :]:
        panel.axis("off")
    for panel, one in zip(panels.flat, found, strict=False):
        least = min(point.measured for point in one.points)
        panel.scatter([p.modelled / least for p in one.points], [p.measured / least for p in one.points], s=9)
        first = min(one.points, key=lambda point: point.modelled)
        panel.scatter([first.modelled / least], [first.measured / least], s=30, facecolors="none", edgecolors="C3")
        panel.set_title(f"{one.kernel}, {one.correlation:.2f}", fontsize="small")
        panel.tick_params(labelsize="x-small")
        panel.grid(alpha=0.3)
    figure.supxlabel("modelled time / fastest measured; a ring is the first choice", fontsize="small")
    figure.supylabel("measured time / fastest measured", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(seconds: float, results: Path, kernel: str = "all") -> None:
    """Measures, prints, and writes ranking.json, ranking.md and ranking.svg into ``results``."""
    torch.set_num_threads(1)
    facts = report.machine_facts()
    device = at_hand(torch.device("cpu"))
    points: list[Point] = []
    for name in kernel_names(kernel):
        points += measure(name, seconds, device)
        one = rankings(points)[-1]
        said = f"  {name}: correlation {one.correlation:.2f}, first choice {one.lost:.2f}, {one.verdict}"
        print(said, file=sys.stderr, flush=True)
    results.mkdir(parents=True, exist_ok=True)
    path = results / "ranking.json"
    write(points, rates(), facts, path)
    print(report_of(path))
    print(f"written to {path.with_suffix('.md')}", file=sys.stderr)


def report_of(path: Path) -> str:
    """Writes ranking.md and ranking.svg beside the ranking.json at ``path``; returns the former's text."""
    found = rankings(read(path))
    text = markdown(found, json.loads(path.read_text())["machine"])
    path.with_suffix(".md").write_text(text)
    draw(found, path.with_suffix(".svg"))
    return text
