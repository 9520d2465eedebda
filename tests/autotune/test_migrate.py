"""Files of older versions of the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.autotune import migrate, schema
from fastattn.autotune.schema import SCHEMA_VERSION, Entry, Unreadable, dump, load
from fastattn.autotune.store import Store

Make = Callable[..., Any]


def seconds_to_microseconds(document: dict[str, Any]) -> dict[str, Any]:
    """From a version whose rows had a time in seconds."""
    for entry in document["entries"]:
        for row in entry["rows"]:
            row["time_us"] = row.pop("seconds") * 1e6
    return document


def list_to_entries(document: dict[str, Any]) -> dict[str, Any]:
    """From a version in which entries were called kernels."""
    return {"entries": document["kernels"]}


@pytest.fixture
def two_versions_later(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if the format had changed twice since."""
    first = SCHEMA_VERSION
    monkeypatch.setattr(schema, "SCHEMA_VERSION", first + 2)
    monkeypatch.setitem(migrate.MIGRATIONS, first, list_to_entries)
    monkeypatch.setitem(migrate.MIGRATIONS, first + 1, seconds_to_microseconds)
    return first


def old_text(version: int, entry: Entry) -> str:
    (fields,) = json.loads(dump([entry]))["entries"]
    for row in fields["rows"]:
        row["seconds"] = row.pop("time_us") / 1e6
    return json.dumps({"schema_version": version, "kernels": [fields]})


def test_every_step_up_to_the_present_version_is_there() -> None:
    oldest = min(migrate.MIGRATIONS, default=SCHEMA_VERSION)
    assert sorted(migrate.MIGRATIONS) == list(range(oldest, SCHEMA_VERSION))


def test_an_old_file_is_read_as_it_is_and_upgraded_by_the_next_write(
    tmp_path: Path, make_key: Make, make_row: Make, two_versions_later: int
) -> None:
    store, entry = Store(tmp_path), Entry(key=make_key(), rows=[make_row(16, 250.0)])
    file = store.file(make_key())
    file.parent.mkdir(parents=True)
    text = old_text(two_versions_later, entry)
    file.write_text(text)
    assert store.read() == [entry]
    assert file.read_text() == text, "reading leaves it to those who know no later version"
    store.add(make_key(), [make_row(32)])
    assert json.loads(file.read_text())["schema_version"] == two_versions_later + 2
    (upgraded,) = store.read()
    assert [(row.config.blocks["BLOCK_M"], row.time_us) for row in upgraded.rows] == [(16, 250.0), (32, 100.0)]


def test_a_step_that_fails_on_a_damaged_file_makes_it_unreadable(two_versions_later: int) -> None:
    with pytest.raises(Unreadable, match=f"schema version {two_versions_later}, from which it .*KeyError: 'kernels'"):
        load(json.dumps({"schema_version": two_versions_later, "entries": []}))


@pytest.mark.parametrize(
    ("version", "why"),
    [(-1, "no longer reads"), (SCHEMA_VERSION + 1, f"knows up to {SCHEMA_VERSION}"), (True, "no schema version")],
)
def test_a_version_without_a_way_here_is_unreadable(version: int, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        load(json.dumps({"schema_version": version, "entries": []}))
