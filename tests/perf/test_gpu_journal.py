"""The journal of a run: whatever is killed, what was told stays, and what is left follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.gpu_journal import Journal, Story


def test_a_line_that_a_kill_cut_off_takes_no_other_with_it(tmp_path: Path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("plan", stage="tune", steps=["a", "b"])
    with journal.path.open("a") as stream:
        stream.write('{"kind": "end", "sta')
    journal.write("end", stage="tune", step="b", status="done")
    assert journal.read().left("tune") == ["a"]


def test_nothing_is_left_where_nothing_was_planned(tmp_path: Path):
    story = Journal(tmp_path / "journal.jsonl").read()
    assert (story.left("tune"), story.start, story.seconds()) == ([], None, 0.0)


def test_steps_keep_their_order_over_plans_and_end_once():
    lines = [
        {"kind": "plan", "stage": "tests", "steps": ["b", "a"]},
        {"kind": "begin", "stage": "tests", "step": "b"},
        {"kind": "end", "stage": "tests", "step": "b", "status": "failed", "why": "first"},
        {"kind": "end", "stage": "tests", "step": "b", "status": "failed", "why": "second"},
        {"kind": "plan", "stage": "tests", "steps": ["c", "a"]},
        {"kind": "begin", "stage": "tests", "step": "c"},
        {"kind": "plan", "stage": "tune", "steps": ["x"]},
    ]
    story = Story(lines)
    assert story.planned("tests") == ["b", "a", "c"]
    assert (story.left("tests"), story.begun("tests")) == (["a", "c"], ["c"])
    assert story.ends("tests")["b"]["why"] == "first"


def test_time_between_runs_is_not_spent():
    lines = [
        {"kind": "run", "at": 0.0},
        {"kind": "stage", "stage": "tests", "at": 1.0},
        {"kind": "end", "stage": "tests", "step": "a", "at": 11.0},
        {"kind": "run", "at": 1000.0},
        {"kind": "stage", "stage": "tests", "at": 1001.0},
        {"kind": "over", "stage": "tests", "at": 1006.0},
        {"kind": "stage", "stage": "tune", "at": 1006.0},
        {"kind": "over", "stage": "tune", "at": 1008.0},
    ]
    story = Story(lines)
    assert (story.seconds("tests"), story.seconds("tune"), story.seconds()) == pytest.approx((15.0, 2.0, 17.0))


def test_a_line_is_json_with_its_kind_and_time(tmp_path: Path):
    journal = Journal(tmp_path / "folder" / "journal.jsonl")
    journal.write("over", stage="tune", cut=True)
    line = json.loads(journal.path.read_text())
    assert line.pop("at") > 1.7e9
    assert line == {"kind": "over", "stage": "tune", "cut": True}
