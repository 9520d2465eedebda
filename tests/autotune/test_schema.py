"""The cache's file format."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastattn.autotune.choice import choose
from fastattn.autotune.key import Key
from fastattn.autotune.schema import MEASURED, WRONG, Entry, Row, Unreadable, best, dump, load, merge

Make = Callable[..., Any]


def test_what_is_written_is_read_again(make_key: Make, make_row: Make) -> None:
    rows = [make_row(16, spread_us=(90.0, 110.0), runs=7, terms={"flops": 1e9}), make_row(32, None, verdict=WRONG)]
    entries = merge([Entry(key=make_key(), rows=rows), Entry(key=make_key(dtype="float16"), rows=[make_row(64)])])
    assert load(dump(entries)) == entries


def test_a_row_is_one_line(make_key: Make, make_row: Make) -> None:
    entry = Entry(key=make_key(), rows=[make_row(tile) for tile in (16, 32, 64)])
    assert sum('"time_us"' in line for line in dump([entry]).splitlines()) == 3


def test_of_a_configuration_the_latest_row_stays(make_key: Make, make_row: Make) -> None:
    earlier = Entry(key=make_key(), rows=[make_row(16, 100.0, minute=1), make_row(32, 50.0, minute=1)])
    later = Entry(key=make_key(), rows=[make_row(16, 70.0, minute=2)])
    for both in ([earlier], [later]), ([later], [earlier]):
        (entry,) = merge(*both)
        assert {row.config.blocks["BLOCK_M"]: row.time_us for row in entry.rows} == {16: 70.0, 32: 50.0}


def test_a_modelled_row_does_not_replace_a_measured_one(make_key: Make, make_row: Make) -> None:
    (entry,) = merge(
        [Entry(key=make_key(), rows=[make_row(16, 100.0)])],
        [Entry(key=make_key(), rows=[make_row(16, 10.0, minute=5, label="modelled")])],
    )
    assert len(entry.rows) == 2
    row = best(entry.rows, MEASURED)
    assert row is not None and row.time_us == 100.0


def test_wrong_failed_and_untimed_rows_are_never_best(make_row: Make) -> None:
    bad = [make_row(16, 1.0, verdict="wrong"), make_row(32, 1.0, verdict="failed"), make_row(64, None)]
    assert best(bad, MEASURED) is None
    assert best([*bad, make_row(128, 9.0)], MEASURED) == make_row(128, 9.0)


def test_equal_times_are_told_apart_the_same_way_in_any_order(make_row: Make) -> None:
    rows = [make_row(tile, 5.0) for tile in (64, 16, 32)]
    assert best(rows, MEASURED) == best(rows[::-1], MEASURED)


def test_fields_that_a_later_version_adds_survive_a_rewrite(make_key: Make, make_row: Make) -> None:
    document = json.loads(dump([Entry(key=make_key(), rows=[make_row(16)])]))
    (entry,) = document["entries"]
    entry["pinned"] = "by hand"
    entry["key"]["numa_nodes"] = 2
    entry["rows"][0]["energy_mj"] = 3
    (again,) = json.loads(dump(merge(load(json.dumps(document)))))["entries"]
    assert again["pinned"] == "by hand"
    assert again["key"]["numa_nodes"] == 2
    assert again["rows"][0]["energy_mj"] == 3


def test_a_row_with_an_unknown_knob_is_kept_but_not_used(make_key: Make, make_row: Make) -> None:
    document = json.loads(dump([Entry(key=make_key(), rows=[make_row(16, 1.0), make_row(32, 2.0)])]))
    document["entries"][0]["rows"][0]["config"]["cluster_launch"] = True
    (entry,) = load(json.dumps(document))
    row = best(entry.rows, MEASURED)
    assert len(entry.rows) == 2
    assert row is not None and row.config.blocks == {"BLOCK_M": 32}


def test_a_key_with_an_unknown_field_is_another_key(make_key: Make) -> None:
    key, newer = make_key(), make_key(numa_nodes=2)
    assert key.identity() != newer.identity()
    assert Key.differences(key, newer) == ["numa_nodes"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ('{"schema_version": 1, "entr', "not JSON"),
        ("[1, 2]", "no schema version"),
        ('{"schema_version": 1}', "no list of entries"),
        ('{"schema_version": 2, "entries": []}', "schema version 2, and this fastattn knows up to 1"),
        ('{"schema_version": 1, "entries": [{"key": {"kernel": "k"}, "rows": []}]}', "key.source"),
    ],
    ids=["empty", "half-written", "other JSON", "no entries", "newer schema", "half a key"],
)
def test_a_damaged_text_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        load(text)


@pytest.mark.parametrize("time_us", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(make_row: Make, time_us: float) -> None:
    with pytest.raises(ValueError, match="time_us"):
        make_row(16, time_us)


def test_rows_are_immutable(make_row: Make) -> None:
    row: Row = make_row(16)
    with pytest.raises(ValueError, match="frozen"):
        row.time_us = 1.0  # pyright: ignore[reportAttributeAccessIssue]


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
) | st.sampled_from([0, -1, 10**400, "2025-01-01T00:00:00", "wrong", 1e308])


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(way for name, below in inner for way in places(below, (*at, name)))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_file_it_is_refused_or_serves(data: Any, make_key: Make, make_row: Make) -> None:
    rows = [make_row(tile, tile, spread_us=(1.0, 2.0), terms={"flops": 1.0}) for tile in (16, 32)]
    document = json.loads(dump([Entry(key=make_key(), rows=rows), Entry(key=make_key(threads=4), rows=rows[:1])]))
    *way, last = data.draw(st.sampled_from([way for way in places(document) if way]))
    inner = document
    for name in way:
        inner = inner[name]
    inner[last] = data.draw(junk)
    try:
        entries = load(json.dumps(document))
    except Unreadable:
        return
    choose(make_key(), entries)
    again = merge(entries, entries)
    assert merge(load(dump(again))) == again


def test_a_text_that_nests_too_deep_is_refused() -> None:
    with pytest.raises(Unreadable, match="not JSON"):
        load("[" * 100_000)


def test_a_time_of_writing_without_a_zone_is_refused(make_row: Make) -> None:
    with pytest.raises(ValueError, match="written"):
        make_row(16, written="2025-01-01T00:00:00")
