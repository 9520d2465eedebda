"""What kernels run where nothing was tuned, against the best that tuning can find: ``python -m perf heuristics``.

For each tunable kernel and each of its flags, every candidate of the space runs in turns with the others, on one thread
of this CPU; then the default and the fastest one alone, whose times are what is reported: the fastest of many was lucky
too in the first turns. Times are the processor's, not those of the clock on the wall, and lower quartiles: whatever
else the machine does only adds to them.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastattn.autotune import rooms
from fastattn.autotune.measure import Timing
from fastattn.autotune.problem import Problem
from fastattn.cli._tuning import definitions
from fastattn.kernels.config import Config
from perf import report
from perf.report import Row

GOAL = 1.25  # times as long as tuned, at most
SECONDS = 4.0  # of timing, for a problem; building comes before
HEAD_DIM = 64
LEAST_SAMPLE_S = 5e-4  # shorter calls are repeated within a sample
LEAST_TURNS, MOST_TURNS = 5, 200


@dataclass(frozen=True)
class Found:
    """Of one problem: the default, the fastest candidate, and their times in turns of these two."""

    default: Config
    best: Config
    default_time: Timing
    best_time: Timing
    n_candidates: int

    @property
    def ratio(self) -> float:
        """How many times as long the default takes; 1 where it is the fastest."""
        return self.default_time.low_us / self.best_time.low_us


def rows(names: Sequence[str] | None = None, seconds: float = SECONDS, *, plain: bool = False) -> Iterator[Row]:
    """A row for each problem of ``names``, by default all kernels. plain: only the first flags of each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in rooms.kernel_names() if names is None else names:
            room = rooms.room_of(name)
            sizes = room.representative(HEAD_DIM)[0]
            given = (sizes, torch.float32, torch.device("cpu"), definitions(room), [name])
            for problem in room.problems(*given, plain=plain):
                yield row_of(problem, compare(problem, seconds))
    finally:
        torch.set_num_threads(threads)


def main(seconds: float = SECONDS, results: Path = report.RESULTS, names: Sequence[str] | None = None) -> Path:
    """Measures, prints each row, and writes the table ``heuristics.md`` into ``results``."""
    torch.set_num_threads(1)
    facts = report.machine_facts()
    found = []
    for row in rows(names, seconds):
        found.append(row)
        print(f"  {row.what}: {row.figure} {row.verdict}", file=sys.stderr, flush=True)
    path = results / "heuristics.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(found, facts))
    return path


def markdown(found: Sequence[Row], facts: Mapping[str, str]) -> str:
    lines = [
        "# What kernels run untuned, against the best candidate",
        "",
        f"B=1, H=8, D={HEAD_DIM}, fp32, one thread, sizes that methods have by default. Lower quartiles of processor "
        f"time, of turns in which the default and the fastest candidate alternate. Goal: at most {GOAL} times the "
        "fastest. Made by `python -m perf heuristics`.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| kernel | default / fastest | | behind it |",
        "|---|---:|---|---|",
        *(f"| {row.what} | {row.value:.2f} | {row.verdict} | {row.detail} |" for row in found),
    ]
    return "\n".join(lines) + "\n"


def compare(problem: Problem, seconds: float, clock: Callable[[], float] = time.process_time) -> Found:
    """The default of ``problem`` and its fastest candidate. Candidates that fail or are wrong take no part."""
    sound = [config for config in problem.candidates if _is_sound(problem, config)]
    default = problem.candidates[0]
    if sound[:1] != [default]:
        raise RuntimeError(f"the default of {problem.kernel} does not run here, or is wrong: nothing was measured")
    times = _turns(problem, sound, seconds / 2, clock)
    best = min(sound, key=lambda config: times[config].low_us)
    if best != default:
        times = _turns(problem, [default, best], seconds / 2, clock)
        if times[default].low_us <= times[best].low_us:
            best = default
    return Found(default, best, times[default], times[best], len(sound))


def row_of(problem: Problem, found: Found) -> Row:
    flags = [f"{name} {value}" if value is not True else name for name, value in problem.flags.items() if value]
    slow, fast = found.default_time, found.best_time
    return Row(
        ", ".join([problem.kernel, *flags]), problem.sizes.get("length", 1), "x", found.ratio,
        slow.low_us / fast.median_us if found.best != found.default else 1.0,
        slow.median_us / fast.low_us if found.best != found.default else 1.0, GOAL,
        f"{_tile(found.default)} {slow.low_us:.0f} us; {_tile(found.best)} {fast.low_us:.0f} us, the fastest of "
        f"{found.n_candidates}", smaller=True,
    )  # fmt: skip


def _is_sound(problem: Problem, config: Config) -> bool:
    problem.spoil()
    try:
        problem.run(config)
    except Exception:  # whatever a compiler raises
        return False
    error, tolerance = problem.deviation()
    return error <= tolerance


def _turns(
    problem: Problem, configs: Sequence[Config], seconds: float, clock: Callable[[], float]
) -> dict[Config, Timing]:  # fmt: skip
    """Quartiles of samples in shuffled turns."""
    order, in_turn = random.Random(0), list(configs)
    repeats = {config: _repeats(problem, config, clock) for config in configs}
    samples: dict[Config, list[float]] = {config: [] for config in configs}
    end = time.monotonic() + seconds
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and time.monotonic() > end:
            break
        order.shuffle(in_turn)
        for config in in_turn:
            began = clock()
            for _ in range(repeats[config]):
                problem.run(config)
            samples[config].append((clock() - began) * 1e6 / repeats[config])
    timings = {}
    for config, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        timings[config] = Timing(median, low, high, len(values))
    return timings


def _repeats(problem: Problem, config: Config, clock: Callable[[], float]) -> int:
    began = clock()
    problem.run(config)
    return min(1000, int(LEAST_SAMPLE_S / max(clock() - began, 1e-6)) + 1)


def _tile(config: Config) -> str:
    return " x ".join(str(size) for size in config.blocks.values())
