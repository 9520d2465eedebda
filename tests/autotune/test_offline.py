"""``fastattn tune --gpu``: a cache for GPUs that are not here, from the command to the row that a call gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastattn.autotune.binaries import Binaries, Figures
from fastattn.autotune.choice import explain
from fastattn.autotune.devices import devices
from fastattn.autotune.offline import groups_of, ship, tune_offline
from fastattn.autotune.rooms import room_of
from fastattn.autotune.search import Report, Search
from fastattn.autotune.store import Store
from fastattn.cli.main import app

ROOT = Path(__file__).parents[2]
SCAN = "linear_attention_scan"
SLOWLY = "tests.autotune.fake_binaries:slowly"


def fastattn(*words: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_a_kernel_is_compiled_for_gpus_that_are_not_here_and_calls_find_the_row(cache_dir: Path):
    words = ("tune", "--gpu", "h100,h200", "--kernel", SCAN, "--dtype", "fp16", "--plain", "--compiles", "2")
    said = fastattn(*words, "--jobs", "1")
    assert "2 GPUs, architectures sm_90: at most 2 compiles" in said
    assert "2 compiles in" in said and "0 binaries are of no use" in said
    h200 = devices()["h200"]
    room = room_of(SCAN)
    sizes = room.representative(64)[0]
    choice = explain(SCAN, h200.device_name(), torch.float16, sizes.shape(SCAN), room.flags(SCAN)[0])
    assert choice.why.startswith("modelled for this device")
    assert choice.row is not None and choice.key is not None and choice.key.device == h200.title
    assert choice.row.label == "modelled" and choice.config == choice.row.launch_config()
    assert (choice.row.terms["registers"] or 0) and choice.row.terms["spill_bytes"] == 0
    assert choice.row.terms["compiled"] == 2
    # the same again: nothing is left to compile
    assert "0 compiles in" in fastattn(*words)


def test_a_cache_to_be_shipped_is_small_and_replaces_what_it_held(cache_dir: Path):
    (group,) = groups_of([SCAN], [devices()["a100"]], ["float16"], [64], plain=True)
    search = Search(group, Binaries(cache_dir / "binaries"), compiles=6)
    while (job := search.next()) is not None:
        search.tell(Figures(job.target, 32, 0, 0, job.config.num_warps), None, 1.0)
    (made,) = search.report().entries
    assert len(made.rows) > 2
    shipped = Store(cache_dir / "shipped")
    for _ in range(2):
        ship([made], shipped.folder, 2)
        (entry,) = shipped.read()
        assert {row.identity() for row in entry.rows} == {row.identity() for row in made.rows[:2]}
    kept = {row.identity(): row.terms for row in entry.rows}
    assert kept.pop(made.rows[0].identity()) == made.rows[0].terms
    assert [*kept.values()] == [{}]
    (file,) = shipped.files()
    assert file.stat().st_size < 2500
    outdated = made.key.model_copy(update={"source": "0" * 16})
    ship([made.model_copy(update={"key": outdated})], shipped.folder, 2)
    ship([made], shipped.folder, 1)
    (entry,) = shipped.read()
    assert entry.key == made.key and len(entry.rows) == 1


def test_a_compile_that_hangs_is_a_row_and_the_search_goes_on(cache_dir: Path):
    (group,) = groups_of([SCAN], [devices()["a100"]], ["float16"], [64], plain=True)
    reports: list[Report] = []
    tune_offline([group], Binaries(cache_dir), reports.append, workers=1, compiles=2, limit_s=2.0,
                 compiler="tests.autotune.fake_binaries:hangs_at_first")  # fmt: skip
    (entry,) = reports[0].entries
    assert [row.verdict for row in entry.rows] == ["ok", "failed"]
    assert entry.rows[1].reason == "it took over 2 s, and was killed"
    assert entry.rows[1].launch_config() == group.candidates(group.cases[0])[0]


def test_killed_and_started_again_it_goes_on_where_it_was(cache_dir: Path):
    log = cache_dir / "log"
    log.touch()
    code = (
        "from fastattn.cli._offline import tune_for_gpus\n"
        f"tune_for_gpus('a100,l4', [{SCAN!r}], ['float16', 'float32'], [64], compiles=6, limit_s=60, jobs=2,"
        f" compiler={SLOWLY!r})"
    )
    environment = {**os.environ, "LOG": str(log), "FASTATTN_CACHE_DIR": str(cache_dir)}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def done() -> list[str]:
        return log.read_text().split()

    first = start()
    deadline = time.monotonic() + 200
    while len(done()) < 7 and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.2)  # its workers hear of it
    before = done()
    kept = [line.split('"')[1] for file in (cache_dir / "binaries").glob("cuda-*/*") for line in file.open()]
    assert 7 <= len(before) < 12
    assert set(kept) <= set(before) and len(before) - len(kept) <= 2  # one for each worker was on its way
    assert start().wait() == 0
    after = done()
    assert max(Counter(after[len(before) :] + kept).values()) == 1
    whole = groups_of([SCAN], [devices()["a100"], devices()["l4"]], ["float16", "float32"], [64])
    # the dtypes of a call have the same binaries of this kernel
    assert len(kept) + len(after) - len(before) == sum(group.most_compiles(6) for group in whole) / 2 == 12
    entries = Store(cache_dir / "tune").read()
    assert len(entries) == sum(len(group.cases) for group in whole)
    assert all(entry.rows for entry in entries)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "h1000"), "gpu must be all, or some of t4,"),
        (("--gpu", "h100", "--compiles", "13"), "compiles must be from 1 to 12, got 13"),
        (("--gpu", "h100", "--device", "cpu"), "with --gpu nothing runs"),
        (("--gpu", "h100", "--compile-limit", "soon"), "got 'soon'"),
        (("--gpu", "h100", "--dtype", "fp8"), "dtype must be some of fp32, fp16, bf16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_named(words: tuple[str, ...], message: str):
    assert message in fastattn("tune", *words, fails=True)


def test_a_compiler_that_cannot_start_stops_it(cache_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastattn.autotune.offline.COMPILE", "json:nothing")
    said = fastattn("tune", "--gpu", "h100", "--kernel", SCAN, "--dtype", "fp16", "--plain", fails=True)
    assert "nothing was tuned: a worker for json:nothing cannot start" in " ".join(said.split())
