"""The cache's file format: one JSON file a kernel and device, one row a timed configuration.

A file holds entries (a key and its rows); a row is one line, so that files can be read, compared and reviewed. Within a
schema version keys, entries and rows may only gain fields, and who rewrites a file keeps the fields that it does not
know. Whatever breaks that rule gets the next version number, and a step in :mod:`fastattn.autotune.migrate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from fastattn.autotune.key import Count, Key
from fastattn.autotune.migrate import NoWay, migrate
from fastattn.kernels.config import Config

SCHEMA_VERSION = 1
MEASURED, MODELLED = "measured", "modelled"  # how a time is known: it was taken, or worked out without the device
OK, WRONG, FAILED = "ok", "wrong", "failed"

_Positive = Annotated[float, Field(gt=0)]


class Unreadable(Exception):
    """A text that is no cache file of this schema; the message says why."""


class ConfigFields(BaseModel):
    """:class:`~fastattn.kernels.config.Config`, as JSON. A knob that only a later fastattn knows makes the row unusable
    here, not unreadable."""

    model_config = ConfigDict(frozen=True, extra="allow")

    blocks: dict[str, Annotated[int, Field(ge=0, lt=2**63)]]  # some are switches
    num_warps: Count
    num_stages: Count
    num_ctas: Count


class Row(BaseModel):
    """What is known of one configuration.

    label: how the time is known, :data:`MEASURED` or :data:`MODELLED`. time_us, spread_us: median and quartiles of the
    kernel alone, all its rounds. runs: how many. verdict: ``"ok"``, or why the configuration must not be used:
    ``"wrong"`` (its results), ``"failed"`` (to build or to run), or a word of a later version; ``reason`` says more.
    error, tolerance: the largest deviation from the reference and the largest allowed, as shares of the largest value.
    problem: the exact sizes that were run. terms: figures behind a modelled time, or of the binary. written: when, UTC.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    config: ConfigFields
    label: str
    verdict: str = OK
    time_us: _Positive | None = None
    spread_us: tuple[_Positive, _Positive] | None = None
    runs: int = 0
    error: float | None = None
    tolerance: float | None = None
    reason: str | None = None
    problem: dict[str, int] = {}
    terms: dict[str, float | int | str | bool | None] = {}
    written: AwareDatetime

    def launch_config(self) -> Config:
        return Config.from_dict(self.config.model_dump())

    def identity(self) -> str:
        return json.dumps([self.config.model_dump(), self.label], sort_keys=True)


class Entry(BaseModel):
    """All rows under one key."""

    model_config = ConfigDict(frozen=True, extra="allow")

    key: Key
    rows: list[Row]


def best(rows: Iterable[Row], label: str | None = None) -> Row | None:
    """The fastest usable row of a label, None is any; equal times are told apart by their configuration, the same way
    everywhere."""
    timed = [
        (row.time_us, row.identity(), row)
        for row in rows
        if label in (None, row.label) and row.verdict == OK and row.time_us is not None and not row.config.model_extra
    ]
    return min(timed, key=lambda item: item[:2])[2] if timed else None


def merge(*sources: Iterable[Entry]) -> list[Entry]:
    """All entries and rows of ``sources``; of one configuration under one key and label the latest row stays."""
    entries: dict[str, Entry] = {}
    rows: dict[str, dict[str, Row]] = {}
    for entry in (entry for source in sources for entry in source):
        name = entry.key.identity()
        entries[name] = entry
        known = rows.setdefault(name, {})
        for row in entry.rows:
            identity = row.identity()
            earlier = known.get(identity)
            if earlier is None or row.written >= earlier.written:
                known[identity] = row
    return [
        entries[name].model_copy(update={"rows": [rows[name][row] for row in sorted(rows[name])]})
        for name in sorted(entries)
    ]


def dump(entries: Iterable[Entry]) -> str:
    """The text of a cache file."""
    blocks = []
    for entry in entries:
        fields = entry.model_dump(mode="json", exclude_unset=True)
        key, rows = fields.pop("key"), fields.pop("rows")
        lines = ",\n".join("    " + json.dumps(row) for row in rows)
        others = "".join(f",\n   {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        blocks.append(f'  {{"key": {json.dumps(key)},\n   "rows": [\n{lines}\n   ]{others}}}')
    return f'{{\n "schema_version": {SCHEMA_VERSION},\n "entries": [\n' + ",\n".join(blocks) + "\n ]\n}\n"


def load(text: str) -> list[Entry]:
    """The entries of a cache file's text. Raises :class:`Unreadable`."""
    try:
        document: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is not JSON ({error})") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if type(version) is not int:
        raise Unreadable("it has no schema version")
    try:
        entries = migrate(document, version, SCHEMA_VERSION).get("entries")
    except NoWay as error:
        raise Unreadable(str(error)) from error
    if not isinstance(entries, list):
        raise Unreadable("it has no list of entries")
    try:
        return [Entry.model_validate(entry) for entry in entries]
    except ValidationError as error:
        first = error.errors()[0]
        raise Unreadable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
