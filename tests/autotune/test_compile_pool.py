"""A pool of processes that outlives what hangs and what crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn.autotune.compile_pool import Done, Pool

BEHAVE = "tests.autotune.fake_compilers:behave"
ROOT = Path(__file__).parents[2]


def run(
    jobs: list[tuple[str, Any]], *, workers: int = 1, limit_s: float = 30.0, patience: float = 1.0
) -> dict[int, Done[int]]:
    """What became of jobs, by their place in the list."""
    waiting: Iterator[tuple[int, Any]] = iter(list(enumerate(jobs)))
    with Pool[int](BEHAVE, workers, limit_s, patience) as pool:
        return {done.name: done for done in pool.results(lambda: next(waiting, None))}


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def test_workers_are_kept_and_what_they_print_is_no_result():
    done = run([("pid", None), ("print", "noise"), ("pid", None), ("return", {"a": [1, 2]})])
    assert done[0].result == done[2].result != os.getpid()
    assert done[1].result == "noise"
    assert done[3].result == {"a": [1, 2]}
    assert all(done[i].reason is None for i in done)


def test_an_error_and_a_crash_are_reasons_and_the_others_go_on():
    done = run([("raise", "PassManager::run\n failed"), ("die", None), ("exit", 3), ("return", 7)], workers=2)
    said = "'ttng.tc_gen5_mma' op LHS CTASplit along K should be 1"
    assert done[0].reason == f"ValueError: PassManager::run failed: {said}"
    assert done[1].reason == "the compiler died, SIGSEGV: Assertion `block == 0' failed."
    assert done[2].reason == "the compiler died, exit status 3: nothing was said"
    assert (done[3].result, done[3].reason) == (7, None)


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path: Path):
    file = tmp_path / "child"
    start = time.monotonic()
    done = run([("child", str(file)), ("spin", None), ("return", 1)], workers=2, limit_s=1.0)
    assert time.monotonic() - start < 30
    assert done[0].reason == done[1].reason == "it took over 1 s, and was killed"
    assert done[2].result == 1
    deadline = time.monotonic() + 10
    while is_alive(int(file.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(int(file.read_text()))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells the CPU time of other processes")
def test_it_is_cpu_time_that_is_limited_not_what_else_the_machine_does():
    start = time.monotonic()
    done = run([("sleep", 1.5), ("burn", None)], workers=2, limit_s=1.0, patience=60.0)
    assert time.monotonic() - start < 50
    assert done[0].result == 1.5
    assert done[1].reason == "it took over 1 s, and was killed"


def test_nothing_is_left_when_the_pool_ends_or_its_process_is_killed(tmp_path: Path):
    file = tmp_path / "child"
    code = (
        "from fastattn.autotune.compile_pool import Pool; jobs = iter([(0, ('child', sys.argv[1]))])\n"
        f"with Pool({BEHAVE!r}, 1, 600.0) as pool: list(pool.results(lambda: next(jobs, None)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", "import sys; " + code, str(file)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(file.read_text())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_function_that_is_not_there_is_an_error_of_the_call():
    with Pool[int]("tests.autotune.fake_compilers:nothing", 1, 5.0) as pool:
        jobs = iter([(0, None)])
        with pytest.raises(RuntimeError, match=r"a worker for .*:nothing cannot start: .* has no attribute 'nothing'"):
            list(pool.results(lambda: next(jobs, None)))
