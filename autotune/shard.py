"""Many problems share a budget, and several workers share the problems.

Workers are the ranks of ``torch.distributed``, as ``torchrun`` starts them. Those on equal devices divide the problems
among themselves, and where there are fewer problems than workers, the candidates of a problem. What all of them
measured is gathered; rank 0 writes it, and all know the same choice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fastattn.autotune.choice import forget
from fastattn.autotune.device import describe
from fastattn.autotune.problem import Problem
from fastattn.autotune.schema import Entry, merge
from fastattn.autotune.store import Store, default_store
from fastattn.autotune.tune import Outcome, known_rows, measure, record
from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported

PATIENCE_SECONDS = 300.0  # of a worker that waits for the others, who may have a last candidate to build


class Unit(Protocol):
    """Problems that have their input in common. keys: the identities of the problems' keys, as many as there are."""

    @property
    def name(self) -> str: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    def problems(self, device: torch.device) -> Iterator[Problem]: ...
    def predictor(self, problem: Problem) -> Callable[[Config], float] | None: ...


@dataclass(frozen=True)
class Team:
    """Workers that tune together; ``group`` is None where there is one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Each worker's value, by rank. Raises RuntimeError where one is gone or silent for too long."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(f"another worker of {self.size} died or does not answer: {reason}") from error
        return values


@contextmanager
def team(patience: float = PATIENCE_SECONDS) -> Iterator[Team]:
    """The workers of ``torch.distributed``: of its process group, or of the one that the variables RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT name, which then ends with the context. Else this process alone.

    patience: seconds that one waits for another.
    """
    timeout = timedelta(seconds=patience)
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() == 1:
            yield Team()
            return
        # of its own, for the other one may not take objects of a CPU
        group = dist.new_group(backend="gloo", timeout=timeout)
        try:
            yield Team(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)  # pyright: ignore[reportArgumentType]
    elif dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=timeout)
        try:
            yield Team(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
        finally:
            dist.destroy_process_group()
    else:
        yield Team()


@dataclass(frozen=True)
class Part:
    """What a worker does: of problem number ``unit`` the candidates ``part`` of ``parts``."""

    unit: int
    part: int = 0
    parts: int = 1


def parts_of(n_units: int, worker: int, n_workers: int) -> list[Part]:
    """Those of one of ``n_workers``: every ``n_workers``-th unit or, where there are fewer units, its part of one."""
    if n_units >= n_workers or n_units == 0:
        return [Part(unit) for unit in range(worker, n_units, n_workers)]
    unit = worker % n_units
    return [Part(unit, worker // n_units, len(range(unit, n_workers, n_units)))]


@dataclass
class Tuned:
    """outcomes: of the problems, on every worker the same. left: problems that did not get their turn.
    refused: why the device cannot run a kernel, by its name."""

    outcomes: list[Outcome] = field(default_factory=list)
    left: int = 0
    refused: dict[str, str] = field(default_factory=dict)


def tune_all(
    units: Sequence[Unit],
    seconds: float,
    device: torch.device,
    *,
    workers: Team | None = None,
    store: Store | None = None,
    on_progress: Callable[[str, str], object] | None = None,
    is_full: bool = False,
) -> Tuned:
    """Tunes all problems of ``units`` in ``seconds`` of wall-clock time, which begin and end together for all workers.

    What no run before has tuned comes first; each problem gets an equal part of the time that is left when it begins.
    Raises RuntimeError where another worker is lost; what this one measured is kept if it is rank 0. Raises Unsupported
    where the device can run none of the kernels, and what :meth:`Store.add` does.
    """
    workers, store = workers or Team(), store or default_store()
    names = workers.gather(describe(device))
    equal = [rank for rank, name in enumerate(names) if name == names[workers.rank]]
    known = {entry.key.identity() for entry in store.read() if entry.rows} if workers.rank == 0 else set()
    in_order = sorted(range(len(units)), key=lambda number: known.issuperset(units[number].keys))
    # folders may differ: one says what the order is
    units = [units[number] for number in workers.gather(in_order)[0]]
    mine = parts_of(len(units), equal.index(workers.rank), len(equal))
    own = _measure_all(
        [(units[part.unit], part) for part in mine], seconds, device, store, workers.rank == 0, on_progress, is_full
    )
    return _agree(workers, own, store)


def _measure_all(
    mine: Sequence[tuple[Unit, Part]], seconds: float, device: torch.device, store: Store, writes: bool,
    on_progress: Callable[[str, str], object] | None, is_full: bool,
) -> Tuned:  # fmt: skip
    end = time.monotonic() + seconds
    say = on_progress or (lambda kernel, step: None)
    own = Tuned(left=sum(len(unit.keys) for unit, _ in mine))

    def is_over() -> bool:
        return bool(own.outcomes or own.refused) and time.monotonic() >= end

    for unit, part in mine:
        if is_over():
            break
        say(unit.name, "preparing")
        problems = unit.problems(device)
        while not is_over():  # to solve the next one takes time as well
            problem = next(problems, None)
            if problem is None:
                break
            if part.parts > 1:
                first, *others = problem.candidates
                problem = replace(problem, candidates=[first, *others[part.part :: part.parts]])
            try:
                outcome = measure(
                    problem, max(0.0, end - time.monotonic()) / own.left, known=known_rows(problem, store),
                    predict=unit.predictor(problem), is_full=is_full or part.parts > 1,
                    on_progress=lambda step, name=problem.kernel: say(name, step),
                )  # fmt: skip
            except Unsupported as error:
                own.refused[problem.kernel] = str(error)
            else:
                own.outcomes.append(outcome)
                if writes:
                    record([outcome], store)  # at once: whoever stops the run keeps what was done
            own.left -= 1
    return own


def _agree(workers: Team, own: Tuned, store: Store) -> Tuned:
    """What all workers measured, as rank 0 writes it."""
    gathered: list[Tuned] = workers.gather(own)
    outcomes = _merged([outcome for each in gathered for outcome in each.outcomes])
    failure: Exception | None = None
    if workers.rank == 0:
        try:
            record(outcomes, store)
        except (OSError, TimeoutError) as error:  # the others must hear of it, not wait
            failure = error
    outcomes, failure = workers.gather((outcomes, failure))[0]
    if failure is not None:
        raise failure
    forget()
    refused = {name: reason for each in gathered for name, reason in each.refused.items()}
    if refused and not outcomes:
        raise Unsupported(next(iter(refused.values())))
    return Tuned(outcomes, sum(each.left for each in gathered), refused)


def _merged(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """One for each key. What several workers measured, the default, is the one's that measured it last."""
    by_key: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_key.setdefault(outcome.key.identity(), []).append(outcome)
    merged = []
    for same in by_key.values():
        if len(same) == 1:
            merged += same
            continue
        (entry,) = merge(Entry(key=each.key, rows=each.rows) for each in same)
        left = sum(each.left for each in same)
        merged.append(Outcome(entry.key, list(entry.rows), None, left, same[0].default))
    return merged
