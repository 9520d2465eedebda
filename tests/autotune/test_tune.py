"""Measured tuning, on kernels that are plain functions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.autotune.choice import lookup
from fastattn.autotune.climb import neighbours
from fastattn.autotune.problem import Problem, agreement
from fastattn.autotune.store import Store, default_store
from fastattn.autotune.tune import tune
from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported

pytest.importorskip("triton")

CPU = torch.device("cpu")
TILES = (16, 32, 64)


def make_problem(runs: dict[int, Callable[[torch.Tensor], object]] | None = None, **changes: Any) -> Problem:
    """A "kernel" that is to write ones, by tiles; tile 32 is the fastest. ``runs`` gives tiles other ways."""
    out = torch.zeros(8)
    truth = torch.ones(8, dtype=torch.float64)
    delays = {16: 0.010, 32: 0.002, 64: 0.005}
    tried: list[int] = []

    def run(config: Config) -> None:
        tile = config.blocks["BLOCK_M"]
        tried.append(tile)
        time.sleep(delays[tile])
        (runs or {}).get(tile, lambda out: out.fill_(1.0))(out)

    fields: dict[str, Any] = {
        "kernel": "block_attention_forward", "device": CPU, "dtype": torch.float32, "shape": {"c_q": 64, "n_blocks": 8},
        "flags": {}, "sizes": {"length": 512}, "candidates": [Config({"BLOCK_M": tile}) for tile in TILES],
        "run": run, "outputs": (out,), "expected": (truth,), "plain": (truth.float(),),
    }  # fmt: skip
    return Problem(**(fields | changes))


def fail(out: torch.Tensor) -> None:
    raise RuntimeError("the compiler gave up")


def verdicts(rows: Any) -> dict[int, str]:
    return {row.config.blocks["BLOCK_M"]: row.verdict for row in rows}


def test_the_fastest_candidate_is_chosen_and_found_by_lookup() -> None:
    problem = make_problem()
    outcome = tune(problem, 5.0)
    assert outcome.chosen is not None and outcome.chosen.config.blocks == {"BLOCK_M": 32}
    assert verdicts(outcome.rows) == {16: "ok", 32: "ok", 64: "ok"}
    assert outcome.left == 0
    assert lookup(problem.kernel, CPU, torch.float32, problem.shape, {}) == Config({"BLOCK_M": 32})


def test_rows_say_how_they_were_measured() -> None:
    tune(make_problem(), 5.0)
    (entry,) = default_store().read()
    for row in entry.rows:
        assert row.label == "measured"
        assert row.spread_us is not None and row.time_us is not None
        assert row.spread_us[0] <= row.time_us <= row.spread_us[1]
        assert row.runs >= 3
        assert row.problem == {"length": 512}
        assert row.error == 0.0 and row.tolerance is not None and row.tolerance > 0


def wrong_by_a_little(out: torch.Tensor) -> None:
    out.fill_(1.0)[3] += 1e-4


def not_a_number(out: torch.Tensor) -> None:
    out.fill_(1.0)[3] = math.nan


@pytest.mark.parametrize("how", [wrong_by_a_little, not_a_number, lambda out: None], ids=["value", "nan", "no write"])
def test_a_wrong_candidate_is_reported_and_never_chosen(how: Callable[[torch.Tensor], object]) -> None:
    outcome = tune(make_problem({32: how}), 5.0)
    assert verdicts(outcome.rows) == {16: "ok", 32: "wrong", 64: "ok"}
    assert outcome.chosen is not None and outcome.chosen.config.blocks == {"BLOCK_M": 64}
    (wrong,) = (row for row in outcome.rows if row.verdict == "wrong")
    assert wrong.reason is not None and "is allowed" in wrong.reason
    assert wrong.time_us is None


def test_a_wrong_candidate_is_not_tried_again() -> None:
    tune(make_problem({32: wrong_by_a_little}), 5.0)
    again = tune(make_problem(), 5.0)
    assert verdicts(again.rows) == {16: "ok", 64: "ok"}
    assert again.chosen is not None and again.chosen.config.blocks == {"BLOCK_M": 64}


def test_a_failing_candidate_is_reported_and_the_rest_go_on() -> None:
    outcome = tune(make_problem({64: fail}), 5.0)
    assert verdicts(outcome.rows) == {16: "ok", 32: "ok", 64: "failed"}
    (failed,) = (row for row in outcome.rows if row.verdict == "failed")
    assert failed.reason == "RuntimeError: the compiler gave up"


def test_a_device_that_runs_no_kernel_is_one_error_and_no_rows() -> None:
    def refuse(out: torch.Tensor) -> None:
        raise Unsupported("no C++ compiler")

    with pytest.raises(Unsupported, match="no C"):
        tune(make_problem({tile: refuse for tile in TILES}), 5.0)
    assert default_store().read() == []


def test_nothing_is_chosen_where_all_are_wrong() -> None:
    outcome = tune(make_problem({tile: wrong_by_a_little for tile in TILES}), 5.0)
    assert outcome.chosen is None
    assert lookup("block_attention_forward", CPU, torch.float32, {"c_q": 64, "n_blocks": 8}, {}) is None


def test_the_budget_is_honoured_and_the_next_run_goes_on() -> None:
    built: set[Config] = set()  # as a cache of built kernels would keep them

    def run(config: Config) -> None:
        if config not in built:
            built.add(config)
            time.sleep(0.3)
        problem.run(config)

    problem = make_problem()
    slow = make_problem(run=run, outputs=problem.outputs)
    start = time.monotonic()
    first = tune(slow, 0.8)
    assert time.monotonic() - start < 1.2
    assert (set(verdicts(first.rows)), first.left) == ({16, 32}, 1)
    second = tune(slow, 0.8)
    assert (set(verdicts(second.rows)), second.left) == ({16, 32, 64}, 0)


def test_integers_are_equal_or_wrong() -> None:
    right = torch.arange(8, dtype=torch.int32)

    def problem_of(wrong: int) -> Problem:
        out = torch.zeros(8, dtype=torch.int32)
        return make_problem(
            run=lambda config: out.copy_(right + (right == 7) * wrong), dtype=torch.int64, outputs=(out,),
            results=lambda: (agreement(out, right),), expected=(torch.ones(8).double(),), plain=(torch.ones(8),),
        )  # fmt: skip

    assert set(verdicts(tune(problem_of(0), 0.0).rows).values()) == {"ok"}
    assert set(verdicts(tune(problem_of(1), 0.0).rows).values()) == {"wrong"}


def test_a_local_optimum_ends_the_search_and_exhaustive_goes_on() -> None:
    delays = {(m, n): 0.001 * (1 + abs(m - 16) // 16 + abs(n - 32) // 16) for m in (16, 32, 64) for n in (16, 32, 64)}
    candidates = [Config({"BLOCK_M": m, "BLOCK_N": n}) for m, n in delays]
    fields: dict[str, Any] = {"candidates": candidates}
    out = torch.zeros(8)

    def run(config: Config) -> None:
        time.sleep(delays[config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]])
        out.fill_(1.0)

    fields |= {"run": run, "outputs": (out,)}
    outcome = tune(make_problem(**fields), 5.0)
    assert outcome.chosen is not None and outcome.chosen.config.blocks == {"BLOCK_M": 16, "BLOCK_N": 32}
    tried = {tuple(row.config.blocks.values()) for row in outcome.rows}
    assert tried == {(16, 16), (16, 32), (16, 64), (32, 32)}, "the start, the best and what is next to that"
    assert outcome.left == 0
    full = tune(make_problem(**fields), 5.0, is_full=True)
    assert len(full.rows) == 9


def test_the_best_of_the_model_is_tried_before_neighbours() -> None:
    outcome = tune(make_problem(), 0.0, predict=lambda config: config.blocks["BLOCK_M"])
    assert list(verdicts(outcome.rows)) == [16], "no time for more"
    modelled = {16: 3.0, 32: 2.0, 64: 1.0}
    outcome = tune(make_problem(), 5.0, predict=lambda config: modelled[config.blocks["BLOCK_M"]])
    assert list(verdicts(outcome.rows)) == [16, 64, 32]


def test_neighbours_are_one_doubling_away_or_what_is_left_of_the_space() -> None:
    space = [Config({"M": m, "S": s}, num_warps=w) for m in (16, 32, 128) for s in (0, 1) for w in (4, 8)]
    found = neighbours(Config({"M": 32, "S": 0}, num_warps=4), space)
    tiles = {(config.blocks["M"], config.blocks["S"], config.num_warps) for config in found}
    assert tiles == {(16, 0, 4), (128, 0, 4), (32, 1, 4), (32, 0, 8)}


def test_earlier_rows_stay_when_the_candidates_change() -> None:
    tune(make_problem(), 5.0)
    outcome = tune(make_problem(candidates=[Config({"BLOCK_M": 16}), Config({"BLOCK_M": 64})]), 5.0)
    assert set(verdicts(outcome.rows)) == {16, 64}
    assert outcome.chosen is not None and outcome.chosen.config.blocks == {"BLOCK_M": 32}, "still the best known"


def test_rows_go_to_the_store_that_is_given(tmp_path: Path) -> None:
    tune(make_problem(), 5.0, store=Store(tmp_path / "shipped"))
    assert default_store().read() == []
    assert len(Store(tmp_path / "shipped").read()) == 1
