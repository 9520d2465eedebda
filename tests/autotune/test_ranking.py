"""The time model's order of a kernel's whole space against times that were measured: on this machine's kind of CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from fastattn.autotune.cpu_rates import Rates
from fastattn.autotune.rooms import kernel_names
from fastattn.kernels.config import Config
from perf import ranking
from perf.ranking import LEAST_CORRELATION, MOST_LOST, Point, Ranking, least_times, spearman

# by `python -m perf ranking`, on one core of a Zen 4; the model's constants are older than these times
RECORDED = Path(ranking.__file__).parent / "results" / "ranking.json"
FOUND = {one.kernel: one for one in ranking.rankings(ranking.read(RECORDED))}
# Spaces in which most candidates take much the same time, in an order that the model does not see: of the sums all
# products are within 25 %, and twenty times as slow as the choice.
LESS = {"cluster_attention_sums": 0.4, "centroid_attention_backward_dq": 0.6, "linear_attention_step": 0.4}


def test_every_kernel_was_measured() -> None:
    assert {*FOUND} | ranking.LATER == {*kernel_names()}
    assert sum(len(one.points) for one in FOUND.values()) > 250


@pytest.mark.parametrize("kernel", FOUND)
def test_the_models_first_choice_is_nearly_the_best(kernel: str) -> None:
    assert FOUND[kernel].lost <= MOST_LOST


@pytest.mark.parametrize("kernel", [kernel for kernel, one in FOUND.items() if one.verdict != "flat"])
def test_the_models_order_is_that_of_the_times(kernel: str) -> None:
    assert FOUND[kernel].correlation >= LESS.get(kernel, LEAST_CORRELATION)


def test_few_kernels_are_flat() -> None:
    flat = [kernel for kernel, one in FOUND.items() if one.verdict == "flat"]
    assert all(FOUND[kernel].spread <= ranking.FLAT for kernel in flat)
    assert len(flat) <= 4


def test_correlation_is_that_of_ranks() -> None:
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)  # equal values share a rank
    assert math.isnan(spearman([1, 1], [1, 2]))


def of_times(*pairs: tuple[float, float]) -> Ranking:
    """Of (measured, modelled) times."""
    return ranking.ranking([Point("kernel", {}, {"BLOCK": i}, *pair) for i, pair in enumerate(pairs)])


def test_verdicts() -> None:
    assert of_times((10, 1), (20, 2), (30, 3)).verdict == "reached"
    assert of_times((10, 3), (20, 2), (30, 1)).verdict == "missed"
    late = of_times((12, 1), (10, 1.1), (30, 3), (40, 4), (50, 5), (60, 6))
    assert late.correlation > LEAST_CORRELATION and late.lost == pytest.approx(1.2) and late.verdict == "missed"
    assert of_times((10, 3), (10.5, 2), (11, 1)).verdict == "flat"


def test_a_time_is_the_least_of_all_turns() -> None:
    ticks: Iterator[float] = iter(range(10**6))
    clock = {"now": 0.0}
    took = {Config({"BLOCK": 1}): [3e-3] * 7 + [1e-3] + [3e-3] * 99, Config({"BLOCK": 2}): [2e-3] * 99}

    def call(config: Config) -> Any:
        next(ticks)
        clock["now"] += took[config].pop(0)

    calls = {config: (lambda config=config: call(config)) for config in took}
    found = least_times(calls, 0.0, lambda: clock["now"])
    assert {c.blocks["BLOCK"]: round(us) for c, us in found.items()} == {1: 1000, 2: 2000}
    assert next(ticks) == 2 * ranking.LEAST_TURNS


def test_what_is_written_is_read_again_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [point for kernel in ("hash_argmax_digit", "hamming_update") for point in FOUND[kernel].points]
    path, drawn = tmp_path / "ranking.json", []
    facts = {"CPU": "Some CPU", "vectors": "x86_64-avx512"}
    ranking.write(own, Rates(1e11, 2e11, 2e10), facts, path)
    assert [(p.kernel, p.blocks, p.measured) for p in ranking.read(path)] == [
        (p.kernel, p.blocks, p.measured) for p in own
    ]
    monkeypatch.setattr(ranking, "draw", lambda found, path: drawn.append(path.name))
    text = ranking.report_of(path)
    assert drawn == ["ranking.svg"] and path.with_suffix(".md").read_text() == text
    assert "| hash_argmax_digit | 12 |" in text and "| flat |" in text
    assert "nothing of occupancy, shared memory or tensor cores" in text


@pytest.mark.parametrize("kernel", ["hash_argmax_digit"])
def test_measuring_runs_the_whole_space_with_its_problem(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the building of it, which takes a second for each candidate."""
    ran = []
    problem = ranking.problem_of(kernel, ranking.sizes_of(kernel))

    class Recorder:
        candidates = problem.candidates

        def run(self, config: Config) -> None:
            ran.append(config)

    monkeypatch.setattr(ranking, "problem_of", lambda kernel, sizes: Recorder())
    points = ranking.measure(kernel, 0.0, ranking.device_of(RECORDED))
    assert set(ran) == set(problem.candidates) and len(points) == len(problem.candidates)
    assert all(point.modelled > 0 and point.measured >= 0 for point in points)
