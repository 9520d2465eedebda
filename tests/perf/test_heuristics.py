"""How defaults are held against the best candidate, on kernels that only turn a clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune import rooms
from fastattn.autotune.problem import Problem
from fastattn.kernels.config import Config
from perf import ranking
from perf.heuristics import GOAL, compare, row_of

TILES = (64, 16, 32, 128)


class Clock:
    """A problem whose candidates take these seconds, on a clock that only they turn."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self._seconds = {int(name.removeprefix("tile")): value for name, value in seconds.items()}
        self._out = torch.zeros(4)
        self.problem = Problem(
            kernel="block_attention_forward", device=torch.device("cpu"), dtype=torch.float32, shape={}, sizes={},
            flags={"is_causal": True}, candidates=[Config({"BLOCK_M": tile}) for tile in TILES], run=self._run,
            outputs=(self._out,), expected=(torch.ones(4).double(),), plain=(torch.ones(4),),
        )  # fmt: skip

    def _run(self, config: Config) -> None:
        tile = config.blocks["BLOCK_M"]
        if tile == 128:
            raise RuntimeError("does not compile")
        self.now += self._seconds[tile]
        self._out.fill_(1.0 if self._seconds[tile] > 1e-3 else 2.0)  # too fast to be true


def test_the_default_is_held_against_the_fastest_that_is_right() -> None:
    clock = Clock(tile64=0.03, tile16=0.02, tile32=1e-4)
    found = compare(clock.problem, 0.05, lambda: clock.now)
    assert found.best == Config({"BLOCK_M": 16})
    assert found.ratio == pytest.approx(1.5)
    assert found.n_candidates == 2
    row = row_of(clock.problem, found)
    assert row.what == "block_attention_forward, is_causal"
    assert (row.goal, row.verdict) == (1.25, "missed")
    assert row.detail == "64 30000 us; 16 20000 us, the fastest of 2"


def test_a_default_that_is_the_fastest_is_once_as_slow() -> None:
    clock = Clock(tile64=0.02, tile16=0.03, tile32=0.02)
    found = compare(clock.problem, 0.05, lambda: clock.now)
    assert found.ratio == 1.0
    assert row_of(clock.problem, found).verdict == "reached"


def test_a_default_that_is_wrong_is_no_figure() -> None:
    clock = Clock(tile64=1e-4, tile16=0.02, tile32=0.02)
    with pytest.raises(RuntimeError, match="default of block_attention_forward does not run here, or is wrong"):
        compare(clock.problem, 0.05, lambda: clock.now)


def test_every_default_is_within_a_quarter_of_the_best_of_its_recorded_space() -> None:
    path = Path(ranking.__file__).parent / "results" / "ranking.json"
    by_kernel: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        by_kernel.setdefault(row["kernel"], []).append(row)
    assert by_kernel.keys() | ranking.LATER == set(rooms.kernel_names())
    slow = {}
    for kernel, rows in by_kernel.items():
        room = rooms.room_of(kernel)
        default = room.candidates(kernel, "cpu", room.Sizes(**rows[0]["sizes"]))[0].blocks
        (own,) = (row["measured"] for row in rows if row["blocks"] == default)
        ratio = own / min(row["measured"] for row in rows)
        if ratio > GOAL:
            slow[kernel] = ratio
    assert slow == {}
