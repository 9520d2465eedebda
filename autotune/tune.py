"""Measured tuning: build candidates, check their results, time them in turns, write a row for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fastattn.autotune.choice import forget
from fastattn.autotune.climb import Climb
from fastattn.autotune.device import describe
from fastattn.autotune.key import Key, key_for
from fastattn.autotune.measure import Timing, take_turns
from fastattn.autotune.problem import Problem, wait
from fastattn.autotune.schema import FAILED, MEASURED, OK, WRONG, ConfigFields, Row, best
from fastattn.autotune.store import Store, default_store
from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported

LEAST_ROUNDS = 7  # of timing, for which time is kept back while candidates are built
QUICK_CALLS, QUICK_SECONDS = 5, 0.02  # the most that a candidate gets before it is clear that it is worth timing


@dataclass
class Outcome:
    """key: where the rows go. rows: this run's, in the order of trial. chosen: the fastest row under the key, from this
    run or before. left: candidates for which the time did not suffice. default: what runs where nothing is tuned."""

    key: Key
    rows: list[Row] = field(default_factory=list)
    chosen: Row | None = None
    left: int = 0
    default: Config | None = None


def tune(
    problem: Problem,
    seconds: float,
    *,
    store: Store | None = None,
    on_progress: Callable[[str], object] | None = None,
    predict: Callable[[Config], float] | None = None,
    is_full: bool = False,
) -> Outcome:
    """Measures as many candidates of ``problem`` as fit in ``seconds`` and writes their rows to ``store``.

    The first candidate, the best one of earlier runs and the best by ``predict``, a model's times, are always measured,
    then neighbours of the best so far (:class:`~fastattn.autotune.climb.Climb`), or, where ``is_full``, all. Raises
    :class:`~fastattn.kernels.errors.Unsupported` where the device can't run the kernel at all.
    """
    store = store or default_store()
    outcome = measure(
        problem, seconds, known=known_rows(problem, store), on_progress=on_progress, predict=predict, is_full=is_full
    )
    record([outcome], store)
    return outcome


def measure(
    problem: Problem,
    seconds: float,
    *,
    known: Iterable[Row] = (),
    on_progress: Callable[[str], object] | None = None,
    predict: Callable[[Config], float] | None = None,
    is_full: bool = False,
) -> Outcome:
    """:func:`tune` that writes nothing, and chooses nothing. known: rows of earlier runs.

    A candidate that has begun to build is waited for. A wrong or failing candidate gets a row that says so, and is
    never chosen."""
    start = time.monotonic()
    say = on_progress or (lambda what: None)
    climb = Climb(problem.candidates, known, predict, is_full)
    outcome = Outcome(key_of(problem), default=problem.candidates[0])
    trials: dict[Config, Trial] = {}
    times: dict[Config, float] = {}
    while left := climb.left(times):
        sound = [trial for trial in trials.values() if trial.verdict == OK]
        timing_s = LEAST_ROUNDS * sum(trial.call_s for trial in sound)
        build_s = max((trial.build_s for trial in trials.values()), default=0.0)
        if trials and time.monotonic() - start + build_s + timing_s > seconds:
            outcome.left = len(left)
            break
        say(f"candidate {len(trials) + 1} of up to {len(trials) + len(left)}")
        trial = trials[left[0]] = _try(problem, left[0])
        times[left[0]] = trial.call_s if trial.verdict == OK else math.inf
    calls = {
        config: (lambda config=config: problem.run(config)) for config, trial in trials.items() if trial.verdict == OK
    }
    timings = take_turns(
        calls, start + seconds, on_sample=lambda: say(f"timing {len(calls)} candidates"),
        wait=lambda: wait(problem.device),
    )  # fmt: skip
    outcome.rows = [_row(problem, trial, timings.get(config)) for config, trial in trials.items()]
    return outcome


def record(outcomes: Iterable[Outcome], store: Store) -> None:
    """Writes the outcomes' rows, and chooses among these and earlier ones."""
    for outcome in outcomes:
        store.add(outcome.key, outcome.rows)
        outcome.chosen = best(_rows_under(outcome.key, store), MEASURED)
    forget()


def key_of(problem: Problem) -> Key:
    return key_for(problem.kernel, describe(problem.device), problem.dtype, problem.shape, problem.flags)


def known_rows(problem: Problem, store: Store) -> list[Row]:
    """What ``store`` has of earlier runs."""
    return _rows_under(key_of(problem), store)


@dataclass(frozen=True)
class Trial:
    """What came of building a candidate and holding its results against the truth. call_s: the least of some calls."""

    config: Config
    verdict: str
    build_s: float
    call_s: float = 0.0
    error: float | None = None
    tolerance: float | None = None
    reason: str | None = None


def _try(problem: Problem, config: Config) -> Trial:
    problem.spoil()
    start = time.monotonic()
    try:
        problem.run(config)
        wait(problem.device)
    except Exception as error:  # whatever a compiler raises
        if isinstance(error, Unsupported) and config == problem.candidates[0]:
            raise
        reason = f"{type(error).__name__}: {error}"[:500]
        return Trial(config, FAILED, time.monotonic() - start, reason=reason)
    build_s = time.monotonic() - start
    error, tolerance = problem.deviation()
    if not error <= tolerance:
        reason = f"results are off by {error:.2g} of the largest value; {tolerance:.2g} is allowed"
        return Trial(config, WRONG, build_s, error=error, tolerance=tolerance, reason=reason)
    return Trial(config, OK, build_s, _least_time(problem, config), error, tolerance)


def _least_time(problem: Problem, config: Config) -> float:
    """Seconds of a call, to tell where to look on; medians of turns come later."""
    least, end = math.inf, time.monotonic() + QUICK_SECONDS
    for _ in range(QUICK_CALLS):
        start = time.perf_counter()
        problem.run(config)
        wait(problem.device)
        least = min(least, time.perf_counter() - start)
        if time.monotonic() > end:
            break
    return least


def _rows_under(key: Key, store: Store) -> list[Row]:
    same = key.identity()
    return [row for entry in store.read(key.kernel, key.arch) if entry.key.identity() == same for row in entry.rows]


def _row(problem: Problem, trial: Trial, timing: Timing | None) -> Row:
    facts: dict[str, object] = {"reason": trial.reason}
    if trial.error is not None and trial.tolerance is not None and math.isfinite(trial.error):
        facts |= {"error": float(f"{trial.error:.3g}"), "tolerance": float(f"{trial.tolerance:.3g}")}
    if timing is not None:
        facts |= {"time_us": round(timing.median_us, 2), "runs": timing.runs}
        facts |= {"spread_us": (round(timing.low_us, 2), round(timing.high_us, 2))}
    return Row(
        config=ConfigFields(**trial.config.to_dict()),
        label=MEASURED,
        verdict=trial.verdict,
        problem=problem.sizes,
        written=datetime.now(UTC),
        **{name: value for name, value in facts.items() if value is not None},  # pyright: ignore[reportArgumentType]
    )
