"""Looking after caches."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune.device import describe
from fastattn.autotune.key import Key, key_for
from fastattn.autotune.schema import ConfigFields, Entry, Row, Unreadable
from fastattn.autotune.store import Store
from fastattn.autotune.upkeep import check, chosen, differences, entries_at, staleness

Make = Callable[..., Any]

SHAPE = {"c_q": 64, "n_blocks": 64}


def current(**changes: Any) -> Key:
    key = key_for("block_attention_forward", describe(torch.device("cpu")), torch.float32, SHAPE, {})
    return key.model_copy(update=changes)


def a_row(tile: int, time_us: float | None = 1.0, **changes: Any) -> Row:
    config = ConfigFields(blocks={"BLOCK_M": tile, "BLOCK_N": tile}, num_warps=4, num_stages=2, num_ctas=1)
    fields: dict[str, Any] = {"config": config, "label": "measured", "time_us": time_us, "written": datetime.now(UTC)}
    return Row(**(fields | changes))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"source": "f" * 16}, "for another source"),
        ({"triton": "0.1", "compiler": "g++ 1"}, "for another triton and compiler"),
        ({"kernel": "sliding_attention"}, "got 'sliding_attention'"),
    ],
    ids=["current", "source", "Triton", "kernel"],
)
def test_a_stale_key_says_why(change: dict[str, Any], why: str | None) -> None:
    found = staleness(current(**change))
    assert found == why or (why is not None and found is not None and why in found)


def test_a_check_counts_what_is_usable_and_what_is_stale(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one_block = ConfigFields(blocks={"BLOCK_M": 16}, num_warps=4, num_stages=2, num_ctas=1)
    newer = ConfigFields(blocks={"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2, num_ctas=1, clusters=2)
    rows = [a_row(16), a_row(32, None, verdict="wrong"), a_row(64, None), a_row(16, config=one_block)]
    store.add(current(), [*rows, a_row(16, config=newer)])
    store.add(current(source="f" * 16), [a_row(16)])
    report = check(store.file(current()))
    assert (report.error, report.entries, report.rows) == (None, 2, 6)
    assert report.unused == {
        "wrong": 1, "without a time": 1, "with other blocks than its kernel's": 1, "unknown knobs (clusters)": 1
    }  # fmt: skip
    assert report.stale == {"for another source": 1}


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"schema_version": 1, "entries": [3]}'], ids=str)
def test_a_check_of_a_damaged_file_says_what_is_wrong(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.json").write_bytes(content)
    report = check(tmp_path / "file.json")
    assert report.error
    with pytest.raises(Unreadable, match=r"file\.json: "):
        entries_at(tmp_path / "file.json")


def test_entries_are_found_in_files_folders_and_cache_folders(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path / "tune")
    store.add(make_key(), [make_row(16)])
    for place in (store.file(make_key()), tmp_path / "tune", tmp_path):
        assert [entry.key for entry in entries_at(place)] == [make_key()]
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*elsewhere"):
        entries_at(tmp_path / "elsewhere")


def test_differences_have_both_choices_and_their_times(make_key: Make, make_row: Make) -> None:
    first = [
        Entry(key=make_key(kernel="a"), rows=[make_row(16, 10.0), make_row(32, 20.0)]),
        Entry(key=make_key(kernel="b"), rows=[make_row(16, 10.0)]),
        Entry(key=make_key(kernel="c"), rows=[make_row(16, 10.0)]),
    ]
    second = [
        Entry(key=make_key(kernel="a"), rows=[make_row(16, 40.0), make_row(32, 30.0)]),
        Entry(key=make_key(kernel="b"), rows=[make_row(16, 20.0)]),
        Entry(key=make_key(kernel="d"), rows=[make_row(16, 10.0)]),
    ]
    found = {
        d.key.kernel: (d.same_config, d.ratio, d.first is None, d.second is None) for d in differences(first, second)
    }
    assert found == {
        "a": (False, 3.0, False, False), "b": (True, 2.0, False, False),
        "c": (False, None, False, True), "d": (False, None, True, False),
    }  # fmt: skip


def test_a_modelled_row_is_chosen_where_nothing_was_measured(make_row: Make) -> None:
    modelled = make_row(16, 1.0, label="modelled")
    assert chosen([modelled, make_row(32, 5.0)]) == make_row(32, 5.0)
    assert chosen([modelled, make_row(32, None, verdict="failed")]) == modelled
    assert chosen([]) is None
