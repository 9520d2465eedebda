"""The cache that comes with the package: block sizes for GPUs that were never here, modelled (``make caches``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn.autotune.devices import devices
from fastattn.autotune.rooms import kernel_names, room_of
from fastattn.autotune.schema import Entry, best
from fastattn.autotune.source import source_hash
from fastattn.autotune.store import read_file, shipped_store
from fastattn.autotune.upkeep import check

FILES = shipped_store().files()
TABLE = {(device.arch, device.title) for device in devices().values()}


def folders() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in FILES:
        found.setdefault(file.parent.name, []).append(file)
    return found


def entries(files: list[Path]) -> list[Entry]:
    return [entry for file in files for entry in read_file(file)]


def test_every_file_can_be_read() -> None:
    reports = [check(file) for file in FILES]
    assert len(reports) > 20
    assert not [(report.file, report.error) for report in reports if report.error]


@pytest.mark.parametrize("folder", folders())
class TestOfADevice:
    def test_is_one_of_the_table(self, folder: str) -> None:
        assert {(entry.key.arch, entry.key.device) for entry in entries(folders()[folder])} <= TABLE

    def test_choices_are_modelled_from_binaries_that_spill_nothing(self, folder: str) -> None:
        for entry in entries(folders()[folder]):
            assert {row.label for row in entry.rows} == {"modelled"}
            found = best(entry.rows)
            if found is None:
                continue
            # of equal times one has the terms
            terms = next(row.terms for row in entry.rows if row.terms and row.time_us == found.time_us)
            assert terms["compiled"], entry.key
            assert not terms.get("spill_bytes"), entry.key  # AMD's compiler names none

    def test_nearly_every_entry_has_a_choice(self, folder: str) -> None:
        """Of a variant only the choice of its kernel's plain form is compiled: it may spill, and defaults serve."""
        choices = [best(entry.rows) is not None for entry in entries(folders()[folder])]
        assert sum(choices) >= 0.95 * len(choices)

    def test_tiles_are_of_the_space(self, folder: str) -> None:
        for entry in entries(folders()[folder]):
            space = room_of(entry.key.kernel).kernels.TUNING[entry.key.kernel]
            for row in entry.rows:
                assert all(row.config.blocks[name] in space.blocks[name] for name in space.blocks), entry.key

    def test_most_kernels_are_those_of_today(self, folder: str) -> None:
        """Stale rows do no harm, and serve nobody: where this fails, ``make caches`` makes new ones."""
        current = Counter(
            entry.key.source == source_hash(entry.key.kernel)
            for entry in {entry.key.kernel: entry for entry in entries(folders()[folder])}.values()
        )
        assert current[True] >= 0.75 * len(kernel_names())
