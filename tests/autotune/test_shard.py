"""Several workers share the work, agree on one result and survive one another."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune.shard import Part, Team, parts_of, team, tune_all
from fastattn.autotune.store import default_store
from fastattn.kernels.errors import Unsupported
from tests.autotune.worker import CPU, Sleeps

ROOT = Path(__file__).parents[2]

gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def start_workers(folder: Path, units: str, *, dies: int | None = None) -> list[subprocess.Popen[str]]:
    """Two processes as ``torchrun`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "UNITS": units,
        "FASTATTN_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.autotune.worker"],
            env=os.environ | variables | {"RANK": str(rank), "DIE": str(int(rank == dies))},
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def results_of(workers: list[subprocess.Popen[str]]) -> list[list[dict[str, Any]]]:
    said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [error for _, error in said]
    return [json.loads(out) for out, _ in said]


@gloo
def test_two_workers_divide_problems_or_the_candidates_of_one_and_agree(cache_dir: Path) -> None:
    (many, one), (many_too, one_too) = results_of(start_workers(cache_dir, "8,16,32;64"))
    assert {count for count, _ in many["tried"]} == {8, 32}
    assert {count for count, _ in many_too["tried"]} == {16}
    assert many["chosen"] == many_too["chosen"] == [[8, 64], [16, 64], [32, 64]]
    assert many["found"] == many_too["found"] == {"BLOCK_M": 64}

    assert [tile for _, tile in one["tried"]] == [16, 32, 128]
    assert [tile for _, tile in one_too["tried"]] == [16, 64], "the default and its part"
    assert one["chosen"] == one_too["chosen"] == [[64, 64]]
    rows = {entry.key.shape["n_blocks"]: entry.rows for entry in default_store().read()}
    assert rows.keys() == {8, 16, 32, 64}
    assert sorted(row.config.blocks["BLOCK_M"] for row in rows[64]) == [16, 32, 64, 128]


@gloo
def test_who_is_left_alone_says_so_soon_and_keeps_what_it_measured(cache_dir: Path) -> None:
    start = time.monotonic()
    first, second = start_workers(cache_dir, "8,16", dies=1)
    _, error = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert first.returncode == 1 and "another worker of 2 died or does not answer" in error
    assert time.monotonic() - start < 90  # its patience is 20 s; the rest is the start of two processes
    (entry,) = default_store().read()
    assert entry.key.shape["n_blocks"] == 8


def test_each_problem_or_part_is_somebodys() -> None:
    assert [parts_of(3, worker, 2) for worker in range(2)] == [[Part(0), Part(2)], [Part(1)]]
    assert [parts_of(2, worker, 5) for worker in range(5)] == [
        [Part(0, 0, 3)], [Part(1, 0, 2)], [Part(0, 1, 3)], [Part(1, 1, 2)], [Part(0, 2, 3)],
    ]  # fmt: skip
    assert parts_of(0, 0, 1) == parts_of(0, 3, 4) == []


def test_one_process_is_a_team_of_its_own() -> None:
    with team() as workers:
        assert workers == Team(0, 1, None)
        assert workers.gather("value") == ["value"]


def test_the_time_is_shared_and_what_had_no_turn_comes_first_the_next_time() -> None:
    units = [Sleeps(count) for count in (8, 16, 32, 64)]
    first = tune_all(units, 0.0, CPU)
    assert first.left == 3
    done = {outcome.key.shape["n_blocks"] for outcome in first.outcomes}
    asked: list[str] = []
    second = tune_all(units, 4.0, CPU, on_progress=lambda kernel, step: asked.append(kernel))
    assert [outcome.key.shape["n_blocks"] for outcome in second.outcomes][-1:] == [*done]
    assert second.left == 0 and len(second.outcomes) == 4
    assert all(outcome.chosen.config.blocks == {"BLOCK_M": 64} for outcome in second.outcomes if outcome.chosen)
    assert set(asked) == {"block_attention_forward"}


def test_kernels_that_cannot_run_are_named_and_the_others_go_on() -> None:
    def refuse(config: Any) -> None:
        raise Unsupported("no such products here")

    units = [Sleeps(8), Sleeps(16)]
    (bad,) = units[0].problems(CPU)
    object.__setattr__(bad, "run", refuse)
    tuned = tune_all(units, 1.0, CPU)
    assert tuned.refused == {"block_attention_forward": "no such products here"}
    assert [outcome.key.shape["n_blocks"] for outcome in tuned.outcomes] == [16]
    with pytest.raises(Unsupported, match="no such products"):
        tune_all(units[:1], 1.0, CPU)
