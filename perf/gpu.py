"""Everything that wants a GPU, in one command: ``make gpu``, or ``python -m perf.gpu``.

Four stages, each with its share of the time: the test-suite on the device, measured tuning of every kernel, benchmarks,
and modelled beside measured times. A stage whose time is over is cut, and the report says what was left. Steps run in
processes of their own: one that dies takes its step with it, and no other. Killed at any point and started again, it
goes on with the step where it was. What comes out stands in ``perf/results/gpu/<device>/``: ``report.md`` and
``report.json`` (see :mod:`perf.gpu_report`). With ``--device cpu`` the same path runs on a CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from perf import gpu_report
from perf.gpu_journal import Journal, same
from perf.gpu_take import Options
from perf.report import RESULTS, slug

ROOT = Path(__file__).parent.parent
GRACE = 15.0  # seconds for which a step that has begun is waited for beyond its stage's time
STEP_LIMIT = 150.0  # seconds for a step: a compiler may hang
STAGES = {"tests": 0.45, "tune": 0.25, "bench": 0.25, "compare": 0.05}
ENDED = (0, 1, 5)  # pytest's 1: tests failed, which the journal has told; its 5: none was left
QUICK_TESTS = ("tests/reference/test_philox.py", "tests/reference/test_smyrf.py")


@dataclass(frozen=True)
class Run:
    """One start of the program: what it was asked for, and where it stands."""

    options: Options
    minutes: float
    journal: Journal

    @property
    def folder(self) -> Path:
        return self.journal.path.parent

    def deadline(self, stage: str) -> float:
        """When ``stage`` is to be over: what earlier stages left of their shares is its own."""
        names = list(STAGES)
        until = names[: names.index(stage) + 1]
        story = self.journal.read()
        return time.time() + 60 * self.minutes * sum(STAGES[x] for x in until) - sum(story.seconds(x) for x in until)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (default: cuda)")
    parser.add_argument("--minutes", type=float, default=24.0, help="for everything (default: 24)")
    parser.add_argument("--quick", action="store_true", help="a little of everything, to see that the path works")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="folder of the reports")
    parser.add_argument("--workers", type=int, help="processes for the tests (default: 4 on a GPU, else 1)")
    parser.add_argument("--fresh", action="store_true", help="begin anew where an earlier run was not finished")
    chosen = parser.parse_args(arguments)
    if chosen.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {chosen.minutes:g}")
    try:
        device = torch.device(chosen.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        parser.error(f"--device {chosen.device}: {str(error).splitlines()[0]}")
    workers = chosen.workers or (1 if device.type == "cpu" else 4)
    facts = gpu_report.facts(device)
    folder = chosen.results / slug(facts["device"])
    run = Run(Options(str(device), chosen.quick, workers), chosen.minutes, Journal(folder / "journal.jsonl"))
    begin(run, facts, fresh=chosen.fresh)
    for stage in STAGES:
        if not run.journal.read().over(stage):
            say(f"{stage}: until {time.strftime('%H:%M:%S', time.localtime(run.deadline(stage)))}")
            do(run, stage)
    report = gpu_report.of(run.journal.read())
    paths = gpu_report.write(report, folder)
    print(paths[0].read_text())
    say(f"written to {paths[0]} and {paths[1].name}")
    return 0 if gpu_report.is_good(report) else 1


def begin(run: Run, facts: dict[str, str], *, fresh: bool) -> None:
    """Goes on with the journal, or starts a new one: if the last run came to its end, or was of something else."""
    story = run.journal.read()
    identity = {"options": run.options.to_dict(), "minutes": run.minutes, "source": gpu_report.source_state(ROOT)}
    if story.start is not None:
        finished = all(story.over(stage) for stage in STAGES)
        if fresh or finished or not same(story.start["identity"], identity):
            why = "the last run is finished" if finished else "asked to" if fresh else "options or sources have changed"
            say(f"begins anew: {why}")
            run.journal.path.replace(run.journal.path.with_suffix(".before.jsonl"))
        else:
            done = sum(len(story.ends(stage)) for stage in STAGES)
            say(f"goes on after {story.seconds():.0f} s and {done} steps")
    run.journal.write("run", facts=facts, identity=identity)


def do(run: Run, stage: str, command: Callable[[Run, str], list[str]] | None = None) -> None:
    """Runs a stage to its end or until its time is over, in a process that is started again if it dies in a step."""
    command = command or command_of
    deadline = run.deadline(stage)
    while True:
        run.journal.write("stage", stage=stage)
        before = run.journal.read()
        for step in before.begun(stage):
            # a kill of the whole run must not blame the step: it gets one more chance
            if sum(x["kind"] == "begin" and x.get("step") == step for x in before.lines) > 1:
                run.journal.write("end", stage=stage, step=step, status="failed", seconds=0.0, why="it died twice here")
        code = _wait(command(run, stage), run, stage, deadline)
        story = run.journal.read()
        if code is None:
            run.journal.write("over", stage=stage, cut=True, why="its time was over")
            return
        if code in ENDED or len(story.lines) == len(before.lines):
            # without a new line nothing would come of another start
            why = "" if code in ENDED else f"the process ended with {code}: see {stage}.log"
            left = story.left(stage)
            run.journal.write("over", stage=stage, cut=bool(left), why=why or ("its time was over" if left else ""))
            return


def command_of(run: Run, stage: str) -> list[str]:
    options, journal = run.options, run.journal
    if stage != "tests":
        deadline = f"{run.deadline(stage):.3f}"
        return [sys.executable, "-m", "perf.gpu_steps", stage, str(journal.path), deadline, *options.arguments()]
    done = run.folder / "tests.done"
    done.write_text("\n".join(journal.read().ends("tests")))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "perf.gpu_pytest", "--device", options.device]
    command += [
        "--journal",
        str(journal.path),
        "--skip-done",
        str(done),
        "--tb=short",
        "--continue-on-collection-errors",
    ]
    if options.workers > 1:
        command += ["-n", str(options.workers)]
    return [*command, *(QUICK_TESTS if options.quick else ("tests",))]


def _wait(command: list[str], run: Run, stage: str, deadline: float) -> int | None:
    """The exit code, or None: it was killed, with all that it started, some seconds after ``deadline``.

    One whose step takes too long is killed as well, and the step has failed. Tests have limits of their own.
    """
    with (run.folder / f"{stage}.log").open("ab") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
    try:
        while time.time() < deadline + GRACE:
            try:
                return process.wait(min(1.0, max(0.1, deadline + GRACE - time.time())))
            except subprocess.TimeoutExpired:
                last = run.journal.read().lines[-1]
            if stage != "tests" and last["kind"] == "begin" and time.time() - last["at"] > STEP_LIMIT:
                why = f"it took over {STEP_LIMIT:.0f} s"
                run.journal.write("end", stage=stage, step=last["step"], status="failed", seconds=STEP_LIMIT, why=why)
                return -signal.SIGKILL
        return None
    finally:  # also where this process itself is told to end
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
