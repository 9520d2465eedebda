"""What a benchmark's row says, and how it is written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.autotune.measure import Timing
from perf.report import Row, markdown, missing_row, rate_row, ratio_row, refuse_if_off, write

SLOW = Timing(median_us=8000.0, low_us=6000.0, high_us=9000.0, runs=5)
FAST = Timing(median_us=2000.0, low_us=1500.0, high_us=3000.0, runs=7)
FACTS = {"CPU": "Some CPU @ 2.0GHz", "vectors": "avx2", "threads": "2"}


def test_a_ratio_is_of_medians_and_its_range_of_the_quartiles_at_their_worst():
    row = ratio_row("a", 64, SLOW, FAST, goal=4.0)
    assert (row.value, row.low, row.high) == (4.0, 2.0, 6.0)


def test_a_rate_is_relative_to_mm_in_the_same_run():
    # half of mm's work in the time that mm takes, twice over
    row = rate_row("a", 64, 5e6, SLOW, 10e6, replace(SLOW, low_us=8000.0, high_us=8000.0), goal=None)
    assert row.value == pytest.approx(50.0)
    assert (row.low, row.high) == pytest.approx((100 * 0.5 * 8 / 9, 100 * 0.5 * 8 / 6))


@pytest.mark.parametrize(
    ("value", "verdict"), [(4.0, "reached"), (3.9, "half reached"), (2.0, "half reached"), (1.9, "below half")]
)
def test_a_speed_is_held_against_its_goal_and_half_of_it(value: float, verdict: str):
    assert Row("a", 64, "x", value, value, value, 4.0, "").verdict == verdict


def test_of_memory_less_is_better():
    row = Row("a", 64, "MB", 300.0, 300.0, 300.0, 400.0, "", smaller=True)
    assert row.verdict == "reached"
    assert replace(row, value=401.0).verdict == "missed"


def test_the_table_has_a_line_for_each_row_with_figure_goal_and_verdict():
    text = markdown("smyrf", [ratio_row("SMYRF against SDPA", 4096, SLOW, FAST, goal=6.0)], FACTS)
    assert (
        "| SMYRF against SDPA | 4096 | 4.0 x (2.0-6.0) | 6 x | half reached | 8.0 ms (of 5) against 2.0 ms (of 7) |"
        in text
    )
    assert "Some CPU @ 2.0GHz" in text


def test_a_comparison_that_could_not_be_made_says_why_and_is_no_number():
    row = missing_row("SMYRF, forward, against a peer", 4096, 8.0, "it does not build")
    assert "| SMYRF, forward, against a peer | 4096 |  | 8 x | not measured | it does not build |" in markdown(
        "smyrf", [row], FACTS
    )


def test_each_bench_has_files_of_its_own_in_a_folder_named_by_the_kind_of_machine(tmp_path: Path):
    path = write("smyrf", [ratio_row("a", 64, SLOW, FAST, goal=None), missing_row("b", 64, None, "")], FACTS, tmp_path)
    assert path.relative_to(tmp_path) == Path("some-cpu-2-0ghz-avx2-2-threads/smyrf.md")
    before = path.read_text()
    other = write("launch", [ratio_row("b", 64, SLOW, FAST, goal=None)], FACTS, tmp_path)
    assert other == path.with_name("launch.md")
    assert path.read_text() == before
    written = json.loads(path.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert written["machine"] == FACTS
    assert [row["value"] for row in written["rows"]] == [4.0, None]


def test_a_wrong_result_stops_a_benchmark():
    right = torch.ones(8)
    refuse_if_off("it", (right,), (right,))
    for wrong in (right + 1e-2, torch.full((8,), float("nan"))):
        with pytest.raises(RuntimeError, match="it is wrong on this machine"):
            refuse_if_off("it", (right, wrong), (right, right))
