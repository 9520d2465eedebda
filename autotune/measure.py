"""Times of calls that take turns: the machine's speed drifts, and turns share the drift out evenly."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

LEAST_SAMPLE_US = 1000.0  # shorter calls are repeated within a sample, or the clock and the caches' state would show
MOST_ROUNDS = 30
GIVE_UP = 1.5  # after three rounds a call that is never below this many times the best median is measured no more

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Wall time of one call in microseconds: median and quartiles over ``runs`` samples."""

    median_us: float
    low_us: float
    high_us: float
    runs: int


def take_turns(
    calls: Mapping[K, Callable[[], object]],
    deadline: float,
    *,
    give_up: float = GIVE_UP,
    on_sample: Callable[[], object] | None = None,
    wait: Callable[[], object] | None = None,
) -> dict[K, Timing]:
    """Times every call, in shuffled turns, until ``deadline`` (of ``time.monotonic()``) or for :data:`MOST_ROUNDS`.

    Each call was run before, so that nothing is built here. The first round is always finished. ``give_up``: infinity
    keeps every call in the race, for who wants all times and not the best. ``wait``: returns when the work of all calls
    before is done, on a device that ``calls`` do not wait for.
    """
    order = random.Random(0)
    samples: dict[K, list[float]] = {name: [] for name in calls}
    repeats = {name: 1 for name in calls}
    in_race = list(calls)
    for turn in range(MOST_ROUNDS):
        order.shuffle(in_race)
        for name in in_race:
            if turn > 0 and time.monotonic() >= deadline:
                return {name: _timing(values) for name, values in samples.items()}
            sample = _sample(calls[name], repeats[name], wait)
            if turn == 0 and sample < LEAST_SAMPLE_US:
                repeats[name] = min(1000, int(LEAST_SAMPLE_US / max(sample, 1.0)) + 1)
                sample = _sample(calls[name], repeats[name], wait)
            samples[name].append(sample)
            if on_sample is not None:
                on_sample()
        if turn >= 2 and in_race:
            leader = min(statistics.median(samples[name]) for name in in_race)
            in_race = [name for name in in_race if min(samples[name]) <= give_up * leader]
    return {name: _timing(values) for name, values in samples.items()}


def _sample(call: Callable[[], object], repeats: int, wait: Callable[[], object] | None) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) * 1e6 / repeats


def _timing(samples: list[float]) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))
