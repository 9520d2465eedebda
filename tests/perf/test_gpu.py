"""Everything that wants a GPU, on the CPU instead: its whole path, what is cut, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import gpu, gpu_report
from perf.gpu_journal import Journal, Story
from perf.gpu_steps import benches, tuning
from perf.gpu_take import Options

ROOT = Path(__file__).parent.parent.parent
FACTS = {"device": "Some CPU"}


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run(Options("cpu", quick=True), 10.0, Journal(tmp_path / "journal.jsonl"))


def program(run: gpu.Run, steps: str, do: str) -> Callable[[gpu.Run, str], list[str]]:
    """A stage whose steps are ``steps``, each of which does ``do`` with its name ``step``."""
    code = f"""
    import os, signal, sys, time
    from pathlib import Path
    from perf.gpu_journal import Journal
    from perf.gpu_take import Options, take

    def do(step, seconds, options):
        folder = Path({str(run.folder)!r})
        {do}
        return {{"seconds": seconds}}

    take("tune", lambda options: {steps.split()!r}, do, Journal(Path({str(run.journal.path)!r})), float(sys.argv[1]),
         Options("cpu"))
    """
    return lambda run, stage: [sys.executable, "-c", textwrap.dedent(code), str(run.deadline(stage))]


def statuses(run: gpu.Run) -> dict[str, str]:
    return {step: end["status"] for step, end in run.journal.read().ends("tune").items()}


def test_a_step_that_raises_is_told_and_the_next_one_begins(run: gpu.Run):
    gpu.do(run, "tune", program(run, "a b", "assert step == 'b', 'not b'"))
    assert statuses(run) == {"a": "failed", "b": "done"}
    assert run.journal.read().ends("tune")["a"]["why"] == "AssertionError: not b"
    assert run.journal.read().over("tune")


def test_a_step_that_dies_twice_has_failed_and_takes_no_other_with_it(run: gpu.Run):
    gpu.do(run, "tune", program(run, "a b c", "step == 'b' and os.kill(os.getpid(), signal.SIGSEGV)"))
    assert statuses(run) == {"a": "done", "b": "failed", "c": "done"}


def test_a_step_that_dies_once_gets_another_chance(run: gpu.Run):
    do = "trace = folder / 'trace'; first = not trace.exists(); trace.touch(); first and os._exit(7)"
    gpu.do(run, "tune", program(run, "a b", do))
    assert statuses(run) == {"a": "done", "b": "done"}


def test_a_step_that_hangs_has_failed_and_keeps_no_other_from_its_turn(run: gpu.Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "STEP_LIMIT", 1.0)
    gpu.do(run, "tune", program(run, "a b c", "step == 'b' and time.sleep(60)"))
    assert statuses(run) == {"a": "done", "b": "failed", "c": "done"}
    assert run.journal.read().ends("tune")["b"]["why"] == "it took over 1 s"


def test_a_stage_that_does_not_even_begin_is_over_and_says_so(run: gpu.Run):
    gpu.do(run, "tune", lambda run, stage: [sys.executable, "-c", "raise SystemExit(9)"])
    over = run.journal.read().over("tune")
    assert over and over["why"] == "the process ended with 9: see tune.log"


def test_a_stage_whose_time_is_over_is_cut_and_names_what_was_not_taken(run: gpu.Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "GRACE", 0.0)
    began, end = time.monotonic(), time.time() + 4
    monkeypatch.setattr(gpu.Run, "deadline", lambda run, stage: end)
    gpu.do(run, "tune", program(run, "a b c", "step == 'b' and time.sleep(60)"))
    assert time.monotonic() - began < 30
    story = run.journal.read()
    assert story.left("tune") == ["b", "c"] and story.over("tune") == story.lines[-1]
    assert story.lines[-1]["cut"]


def test_a_stage_has_what_those_before_it_left(run: gpu.Run):
    now = time.time()
    tests, tune = (run.deadline(stage) - now for stage in ("tests", "tune"))
    assert tests == pytest.approx(600 * gpu.STAGES["tests"], abs=5)
    assert tune == pytest.approx(600 * (gpu.STAGES["tests"] + gpu.STAGES["tune"]), abs=5)
    assert sum(gpu.STAGES.values()) == pytest.approx(1.0)
    assert tuple(gpu.STAGES) == gpu_report.STAGES


class TestStartedAgain:
    @pytest.fixture(autouse=True)
    def sources(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_report, "source_state", lambda root: "one commit")

    def test_it_goes_on_with_what_is_left(self, run: gpu.Run):
        gpu.begin(run, FACTS, fresh=False)
        run.journal.write("plan", stage="tune", steps=["a", "b"])
        run.journal.write("end", stage="tune", step="a", status="done", result={})
        gpu.begin(run, FACTS, fresh=False)
        assert run.journal.read().left("tune") == ["b"]

    @pytest.mark.parametrize("why", ["finished", "asked to", "options"])
    def test_it_begins_anew_where_that_would_mix_two_runs(self, run: gpu.Run, why: str):
        gpu.begin(run, FACTS, fresh=False)
        run.journal.write("plan", stage="tune", steps=["a", "b"])
        for stage in gpu.STAGES if why == "finished" else ():
            run.journal.write("over", stage=stage, cut=False, why="")
        other = gpu.Run(Options("cpu", quick=why != "options"), 10.0, run.journal)
        gpu.begin(other, FACTS, fresh=why == "asked to")
        assert run.journal.read().planned("tune") == []
        assert run.journal.path.with_suffix(".before.jsonl").exists()


def test_on_a_gpu_half_precision_comes_first_and_short_lengths_do():
    steps = list(tuning(Options("cuda")))
    assert steps[0].endswith("fp16 D64") and steps[-1].endswith("fp16 D128")
    assert len(steps) == len(set(steps)) == 3 * len(list(tuning(Options("cpu"))))
    lengths = [int(step.partition("=")[2]) for step in benches(Options("cuda"))]
    assert lengths == sorted(lengths) and set(lengths) == {1024, 4096, 16384, 65536}


def test_a_device_that_is_not_there_is_an_error_before_anything_runs(capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cuda" in capsys.readouterr().err


def test_the_whole_path_on_the_cpu_killed_and_started_again(tmp_path: Path):
    command = [sys.executable, "-m", "perf.gpu", "--device", "cpu", "--minutes", "4", "--quick"]
    command += ["--results", str(tmp_path)]
    with (tmp_path / "output").open("w") as output:
        first = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        wait_for(lambda: any(x["kind"] == "end" and x["stage"] == "tests" for x in journal_of(tmp_path).lines), first)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    told = journal_of(tmp_path).ends("tests")
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "goes on after" in second.stderr or "sources have changed" in second.stderr
    assert told.items() <= journal_of(tmp_path).ends("tests").items() or "sources have changed" in second.stderr
    (path,) = tmp_path.glob("*/report.json")
    report: dict[str, Any] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["tests"]["passed"] > 4 and not report["tests"]["failures"]
    assert {stage["status"] for stage in report["stages"].values()} <= {"done", "cut"}
    assert report["tuning"] and all(x["chosen_us"] > 0 for x in report["tuning"])
    assert any("against its definition" in x["what"] and x["value"] > 0 for x in report["benchmarks"])
    assert any("flash-linear-attention" in x["what"] for x in report["benchmarks"])
    assert report["model"] and all(len(x["points"]) == x["configurations"] for x in report["model"])
    text = path.with_suffix(".md").read_text()
    assert text in second.stdout
    assert all(f"## {title}" in text for title in gpu_report.TITLES.values())


def journal_of(folder: Path) -> Story:
    return next((Journal(path).read() for path in folder.glob("*/journal.jsonl")), Story([]))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
