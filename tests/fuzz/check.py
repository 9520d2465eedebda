"""Checks programs by their seeds: engine and interpreter against the evaluation; what fails is shrunk and kept."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import engine
from .compare import difference, exemption
from .evaluate import Ambiguous, Evaluator, Invalid
from .generate import FEATURES, coverage, generate
from .interpreter import Interpreter
from .program import Program, source
from .shrink import shrink

REGRESSIONS = Path(__file__).parent / "regressions"
MOST_UNKNOWN = 0.5  # a program of whose stored elements more are unknown says too little


@dataclass
class Failure:
    program: Program
    where: str  # "engine", "door", "interpreter" or "evaluation"
    reason: str

    def __str__(self) -> str:
        levels = engine.machine.supported_levels()
        summary = ", ".join(f"{p.name}: {p.kind} {p.role} {p.fill}".rstrip() for p in self.program.params)
        return (
            f"seed {self.program.seed}, {self.where}, level {levels[self.program.level % len(levels)].name},"
            f" grid {self.program.grid}: {self.reason}\n{source(self.program)}arguments: {summary}\n"
        )


@dataclass
class Report:
    """checked: programs whose outputs were compared. dropped: those that hang on a value that is not known exactly.
    exempt: why the interpreter wasn't asked. met: in how many programs each operation was met. died: the seeds of
    batches that ended their process."""

    checked: int = 0
    dropped: int = 0
    interpreted: int = 0
    through_the_door: int = 0
    exempt: Counter[str] = field(default_factory=Counter)
    met: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    died: list[range] = field(default_factory=list)

    def add(self, other: Report) -> None:
        for name in ("checked", "dropped", "interpreted", "through_the_door"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.exempt.update(other.exempt)
        self.met.update(other.met)
        self.failures += other.failures
        self.died += other.died


def check(seeds: Iterable[int], interpreter: Interpreter | None, features: Sequence[str] = FEATURES) -> Report:
    """One batch, built as one object a level; its first program also goes through ``launch.run``."""
    report = Report()
    programs, runs = [], []
    for seed in seeds:
        program = generate(seed, features, len(engine.machine.supported_levels()))
        run = Evaluator(program)
        try:
            run.run()
        except Ambiguous:
            report.dropped += 1
            continue
        except Invalid as error:
            report.failures.append(Failure(program, "evaluation", f"a program without meaning: {error}"))
            continue
        if run.unknown_share > MOST_UNKNOWN:
            report.dropped += 1
            continue
        programs.append(program)
        runs.append(run)
    for at, (program, run, outcome) in enumerate(zip(programs, runs, engine.run_batch(programs), strict=True)):
        report.checked += 1
        report.met.update(coverage(program, run.kinds))
        reason = outcome.failure or _wrong(program, run, outcome.buffers)
        if reason:
            report.failures.append(Failure(program, "engine", reason))
        elif at == 0:
            report.through_the_door += 1
            if reason := door_failure(program, run):
                report.failures.append(Failure(program, "door", reason))
        why = exemption(program, run.kinds)
        if why:
            report.exempt[why] += 1
        elif interpreter is not None:
            report.interpreted += 1
            buffers, reason = interpreter.run(program)
            if reason := reason or _wrong(program, run, buffers):
                report.failures.append(Failure(program, "interpreter", reason))
    return report


def _wrong(program: Program, run: Evaluator, buffers: engine.Buffers | None) -> str:
    assert buffers is not None
    found = difference(engine.numbers(program, buffers), run.outputs)
    return "" if found is None else str(found)


def door_failure(program: Program, run: Evaluator | None = None) -> str:
    """What is wrong when a program is launched as any kernel is; "" where nothing is."""
    if run is None:
        run = Evaluator(program)
        run.run()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        outcome = engine.through_the_door(program, Path(folder))
    return outcome.failure or _wrong(program, run, outcome.buffers)


def failing(programs: list[Program]) -> list[bool]:
    """Which of some programs the engine gets wrong: by a wrong number, or without giving any."""
    verdicts = []
    for program, outcome in zip(programs, engine.run_batch(programs), strict=True):
        run = Evaluator(program)
        run.run()
        verdicts.append(bool(outcome.failure or _wrong(program, run, outcome.buffers)))
    return verdicts


def _kind_of(failure: str) -> str:
    """Failures of one kind have one cause, as far as can be told: a wrong number, or a message less its figures."""
    return (
        "".join(c for c in failure.split(":")[0] if not c.isdigit()) if not failure.startswith(("x", "y")) else "wrong"
    )


def shrunk(failure: Failure, seconds: float) -> Failure:
    """The smallest program found that fails in the same way."""
    wanted = _kind_of(failure.reason)
    reasons: dict[int, str] = {}

    def same(programs: list[Program]) -> list[bool]:
        verdicts = []
        for program, outcome in zip(programs, engine.run_batch(programs), strict=True):
            run = Evaluator(program)
            run.run()
            reason = outcome.failure or _wrong(program, run, outcome.buffers)
            reasons[id(program)] = reason
            verdicts.append(bool(reason) and _kind_of(reason) == wanted)
        return verdicts

    small = shrink(failure.program, same, seconds)
    return Failure(small, failure.where, reasons.get(id(small), failure.reason))


def keep(failure: Failure, folder: Path = REGRESSIONS) -> Path:
    """Writes a failing program as a file that the tests pick up."""
    path = folder / f"seed_{failure.program.seed}.py"
    data = textwrap.fill(json.dumps(failure.program.to_data()), 118, break_long_words=False, break_on_hyphens=False)
    text = (
        f'"""Found by seed {failure.program.seed} and shrunk: {failure.reason.splitlines()[0][:80]}"""\n\n'
        f'KERNEL = """{source(failure.program)}"""\n\n'
        f'# the same as data: inputs and expected outputs follow from it\nPROGRAM = """\n{data}\n"""\n'
    )
    if any(len(line) > 120 for line in text.splitlines()):
        text = "# ruff: noqa: E501\n" + text
    path.write_text(text)
    return path
