"""Measured tuning: build candidates, check their results, time them in turns, write a row for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from fastattn.autotune.choice import forget
from fastattn.autotune.device import describe
from fastattn.autotune.key import Flag, Key, key_for
from fastattn.autotune.measure import Timing, take_turns
from fastattn.autotune.schema import FAILED, MEASURED, OK, WRONG, ConfigFields, Row, best
from fastattn.autotune.store import Store, default_store
from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported

LEAST_ROUNDS = 7  # of timing, for which time is kept back while candidates are built

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """One kernel on one input.

    candidates: what may be tried, the likeliest first; the first is what runs when nothing is tuned.
    run: the kernel's launches, done when it returns. outputs: what they write, every element of it.
    expected: what they should be, in float64. plain: the same in ``dtype`` by plain torch operations, whose error says
    how exact the dtype lets anyone be. sizes: for the record. shape, flags: as
    :func:`fastattn.autotune.choice.lookup` gets them.
    """

    kernel: str
    device: torch.device
    dtype: torch.dtype
    shape: dict[str, int]
    flags: dict[str, Flag]
    sizes: dict[str, int]
    candidates: list[Config]
    run: Callable[[Config], object]
    outputs: Tensors
    expected: Tensors
    plain: Tensors


@dataclass
class Outcome:
    """key: where the rows went. rows: this run's, in the order of trial. chosen: the fastest row under the key, from
    this run or before. left: candidates for which the time did not suffice."""

    key: Key
    rows: list[Row] = field(default_factory=list)
    chosen: Row | None = None
    left: int = 0


def tune(
    problem: Problem,
    seconds: float,
    *,
    store: Store | None = None,
    on_progress: Callable[[str], object] | None = None,
) -> Outcome:
    """Measures as many candidates of ``problem`` as fit in ``seconds`` and writes their rows to ``store``.

    The first candidate and the best one of earlier runs are always measured, then those that no run has tried: a short
    budget explores a little at a time. A candidate that has begun to build is waited for. A wrong or failing candidate
    gets a row that says so, and is never chosen. Raises :class:`~fastattn.kernels.errors.Unsupported` where the device
    can't run the kernel at all.
    """
    start = time.monotonic()
    say = on_progress or (lambda what: None)
    store = store or default_store()
    key = key_for(problem.kernel, describe(problem.device), problem.dtype, problem.shape, problem.flags)
    order = _by_need(problem.candidates, _rows_under(key, store))
    outcome = Outcome(key)
    trials: list[Trial] = []
    for config in order:
        sound = [trial for trial in trials if trial.verdict == OK]
        timing_s = LEAST_ROUNDS * sum(trial.call_s for trial in sound)
        build_s = max((trial.build_s for trial in trials), default=0.0)
        if trials and time.monotonic() - start + build_s + timing_s > seconds:
            outcome.left = len(order) - len(trials)
            break
        say(f"building {len(trials) + 1}/{len(order)}")
        trials.append(_try(problem, config))
    sound = [trial for trial in trials if trial.verdict == OK]
    calls = {trial.config: (lambda config=trial.config: problem.run(config)) for trial in sound}
    timings = take_turns(calls, start + seconds, on_sample=lambda: say(f"timing {len(calls)} candidates"))
    outcome.rows = [_row(problem, trial, timings.get(trial.config)) for trial in trials]
    store.add(key, outcome.rows)
    forget()
    outcome.chosen = best(_rows_under(key, store), MEASURED)
    return outcome


@dataclass(frozen=True)
class Trial:
    """What came of building a candidate and holding its results against the truth."""

    config: Config
    verdict: str
    build_s: float
    call_s: float = 0.0
    error: float | None = None
    tolerance: float | None = None
    reason: str | None = None


def _try(problem: Problem, config: Config) -> Trial:
    for output in problem.outputs:
        output.fill_(math.nan)  # or a candidate that writes nothing would show what the last one wrote
    start = time.monotonic()
    try:
        problem.run(config)
    except Exception as error:  # whatever a compiler raises
        if isinstance(error, Unsupported) and config == problem.candidates[0]:
            raise
        reason = f"{type(error).__name__}: {error}"[:500]
        return Trial(config, FAILED, time.monotonic() - start, reason=reason)
    build_s = time.monotonic() - start
    error, tolerance = _worst(problem)
    if not error <= tolerance:
        reason = f"results are off by {error:.2g} of the largest value; {tolerance:.2g} is allowed"
        return Trial(config, WRONG, build_s, error=error, tolerance=tolerance, reason=reason)
    start = time.monotonic()
    problem.run(config)
    return Trial(config, OK, build_s, time.monotonic() - start, error, tolerance)


def _worst(problem: Problem) -> tuple[float, float]:
    """(error, tolerance) of the output that uses most of its tolerance."""
    pairs = []
    for got, plain, truth in zip(problem.outputs, problem.plain, problem.expected, strict=True):
        # plain torch in the same dtype may be as wrong once; sums in another order, a little more
        tolerance = 2 * deviation(plain, truth) + 8 * torch.finfo(problem.dtype).eps
        pairs.append((deviation(got, truth), tolerance))
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def deviation(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference as a share of the largest finite value of ``truth``; inf where one has a NaN or an infinity
    that the other has not."""
    got = got.double()
    difference = torch.where(got == truth, 0.0, (got - truth).abs())  # equal infinities differ by nothing
    if not torch.isfinite(difference).all():
        return math.inf
    scale = truth[torch.isfinite(truth)].abs().max().item() if torch.isfinite(truth).any() else 0.0
    return difference.max().item() / max(scale, 1e-30)


def _rows_under(key: Key, store: Store) -> list[Row]:
    same = key.identity()
    return [row for entry in store.read(key.kernel, key.arch) if entry.key.identity() == same for row in entry.rows]


def _by_need(candidates: list[Config], known: Iterable[Row]) -> list[Config]:
    """The default, the best so far, what was never tried, the rest; none that was wrong. Each group likeliest first."""
    known = [row for row in known if row.label == MEASURED and not row.config.model_extra]
    wrong = {row.launch_config() for row in known if row.verdict == WRONG}
    tried = {row.launch_config() for row in known}
    leader = best(known, MEASURED)
    order = candidates[:1]
    order += [config for config in candidates if leader and config == leader.launch_config()]
    order += [config for config in candidates if config not in tried]
    order += [config for config in candidates if config not in wrong]
    return list(dict.fromkeys(order))


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
