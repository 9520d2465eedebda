"""Timing by turns, on a clock that the tests turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fastattn.autotune import measure
from fastattn.autotune.measure import MOST_ROUNDS, take_turns


class Clock:
    """A clock that only calls advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.called: list[str] = []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measure.time, "monotonic", lambda: self.now)

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes these times in turn, the last one for ever after."""
        left = list(seconds)

        def run() -> None:
            self.called.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_medians_and_quartiles_of_all_samples(clock: Clock) -> None:
    timings = take_turns({"a": clock.call("a", 0.02), "b": clock.call("b", 0.9, 0.025)}, deadline=1e9)
    assert timings["a"].median_us == pytest.approx(20_000)
    assert timings["b"].median_us == pytest.approx(25_000), "one slow run does not matter"
    assert timings["a"].low_us == pytest.approx(timings["a"].high_us)
    assert timings["a"].runs == MOST_ROUNDS


def test_calls_take_turns(clock: Clock) -> None:
    take_turns({name: clock.call(name, 0.02) for name in "abc"}, deadline=1e9)
    rounds = [clock.called[i : i + 3] for i in range(0, len(clock.called), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "in an order that changes"


def test_hopeless_calls_drop_out_after_three_rounds(clock: Clock) -> None:
    timings = take_turns({"fast": clock.call("fast", 0.02), "slow": clock.call("slow", 0.05)}, deadline=1e9)
    assert timings["slow"].runs == 3
    assert timings["fast"].runs == MOST_ROUNDS


def test_calls_stay_to_the_end_for_who_wants_all_times(clock: Clock) -> None:
    calls = {"fast": clock.call("fast", 0.02), "slow": clock.call("slow", 0.05)}
    timings = take_turns(calls, deadline=1e9, give_up=math.inf)
    assert timings["slow"].runs == timings["fast"].runs == MOST_ROUNDS


def test_time_stops_at_the_deadline(clock: Clock) -> None:
    timings = take_turns({name: clock.call(name, 1.0) for name in "ab"}, deadline=7.5)
    assert clock.now == pytest.approx(8.0)
    assert {timing.runs for timing in timings.values()} == {4}


def test_every_call_is_measured_once_even_when_late(clock: Clock) -> None:
    timings = take_turns({name: clock.call(name, 1.0) for name in "abc"}, deadline=0.0)
    assert {timing.runs for timing in timings.values()} == {1}
    assert {timing.median_us for timing in timings.values()} == {1e6}


def test_short_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    timings = take_turns({"a": clock.call("a", 0.00001)}, deadline=1e9)
    assert timings["a"].median_us == pytest.approx(10)
    assert len(clock.called) > 90 * MOST_ROUNDS


def test_nothing_to_measure_is_no_error() -> None:
    assert take_turns({}, deadline=0.0) == {}
