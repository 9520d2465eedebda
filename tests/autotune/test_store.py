"""The cache on disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn.autotune import store as store_module
from fastattn.autotune.schema import Entry, dump, merge
from fastattn.autotune.store import Store, read_file
from tests.autotune.writers import DEATHS, write_rows

Make = Callable[..., Any]

# Forks processes that have imported all they need: a hundred of them start in the time of one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.autotune.writers"])


KERNELS = [f"kernel_{number}" for number in range(10)]  # each has a file


@pytest.fixture
def start_writer(tmp_path: Path, make_key: Make) -> Iterator[Callable[..., Any]]:
    """Starts a process that adds ``count`` rows from tile ``first`` on, to ten files in turn
    (:func:`~tests.autotune.writers.write_rows`)."""
    started = []

    def start(first: int, count: int, death: str | None = None) -> Any:
        keys = [make_key(kernel=kernel).model_dump_json() for kernel in KERNELS]
        arguments = (tmp_path / "tune", keys, first, count, tmp_path / f"log-{first}", death)
        writer = FORKS.Process(target=write_rows, args=arguments, name=str(first), daemon=True)
        writer.start()
        started.append(writer)
        return writer

    yield start
    for writer in started:
        writer.kill()
        writer.join()


def returned(tmp_path: Path) -> set[int]:
    """Tiles whose ``add`` has returned in some process."""
    return {int(tile) for log in tmp_path.glob("log-*") for tile in log.read_text().split()}


def tiles(store: Store) -> set[int]:
    return {row.config.blocks["BLOCK_M"] for entry in store.read() for row in entry.rows}


def test_rows_of_many_calls_come_together(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path)
    store.add(make_key(), [make_row(16), make_row(32)])
    store.add(make_key(), [make_row(64)])
    store.add(make_key(dtype="float16"), [make_row(128)])
    store.add(make_key(device="Another CPU"), [make_row(256)])
    assert tiles(store) == {16, 32, 64, 128, 256}
    assert len(store.files()) == 2


def test_nothing_is_made_by_reading(tmp_path: Path) -> None:
    assert Store(tmp_path / "tune").read() == []
    assert not (tmp_path / "tune").exists()


def test_only_an_architectures_files_are_read(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path)
    store.add(make_key(arch="sm_90"), [make_row(16)])
    store.add(make_key(arch="sm_90a"), [make_row(32)])
    assert [entry.key.arch for entry in store.read("block_attention_forward", "sm_90")] == ["sm_90"]


@pytest.mark.parametrize(
    "text",
    ["", '{"schema_version": 1, "entries": [{"key"', '{"schema_version": 99, "entries": []}', "\x00\x01"],
    ids=["empty", "half-written", "newer schema", "binary"],
)
def test_a_file_that_cannot_be_read_is_ignored_kept_aside_and_rebuilt(
    tmp_path: Path, make_key: Make, make_row: Make, text: str
) -> None:
    store, key = Store(tmp_path), make_key()
    file = store.file(key)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="is ignored: ") as caught:
        assert store.read() == []
        assert store.read() == []
    assert len(caught) == 1, "one warning, however often it is read"
    assert file.read_text() == text, "reading leaves the file alone"
    with pytest.warns(RuntimeWarning, match=f"kept as {file.name}.unreadable-1"):
        store.add(key, [make_row(16)])
    assert file.with_name(f"{file.name}.unreadable-1").read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles(store) == {16}


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_is_an_error_that_leaves_all_as_it_was(
    tmp_path: Path, make_key: Make, make_row: Make, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    store.add(make_key(), [make_row(16)])
    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(store_module, "dump", refuse)
        else:
            patch.setattr(os, step, refuse)
        with pytest.raises(OSError, match="No space left"):
            store.add(make_key(), [make_row(32)])
    assert not list(tmp_path.rglob("*.tmp"))
    store.add(make_key(), [make_row(64)])
    assert tiles(store) == {16, 64}


def test_what_may_not_be_read_is_one_warning_and_is_never_replaced(
    tmp_path: Path, make_key: Make, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = Store(tmp_path)
    store.add(make_key(), [make_row(16)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.warns(RuntimeWarning, match="cannot be read .*Permission denied") as caught:
            assert store.read() == store.read() == []
        assert len(caught) == 1
        with pytest.raises(PermissionError):
            store.add(make_key(), [make_row(32)])
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        with pytest.warns(RuntimeWarning, match="cannot be read .*Permission denied") as caught:
            assert store.read() == store.read() == []
        assert len(caught) == 1
    assert tiles(store) == {16}


def test_a_file_where_the_folder_should_be_is_one_warning(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    (tmp_path / "tune").write_text("not a folder")
    store = Store(tmp_path / "tune")
    with pytest.warns(RuntimeWarning, match="is ignored: it cannot be read") as caught:
        assert store.read() == store.read() == []
    assert len(caught) == 1
    with pytest.raises(OSError, match="tune"):
        store.add(make_key(), [make_row(16)])


def test_a_folder_that_is_taken_away_is_made_again(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path / "tune")
    store.add(make_key(), [make_row(16)])
    shutil.rmtree(tmp_path / "tune")
    assert store.read() == []
    store.add(make_key(), [make_row(32)])
    assert tiles(store) == {32}


def test_what_is_taken_out_stands_in_the_backup(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store, backup = Store(tmp_path), tmp_path / "backup.json"
    for kernel, dtype in (("a", "float16"), ("a", "float32"), ("b", "float16")):
        store.add(make_key(kernel=kernel, dtype=dtype), [make_row(16)])
    taken = store.take_out(lambda entry: entry.key.dtype == "float16", backup)
    assert {entry.key.kernel for entry in taken} == {"a", "b"}
    assert [(entry.key.kernel, entry.key.dtype) for entry in store.read()] == [("a", "float32")]
    assert [file.name for file in store.files()] == ["a.json"], "a file without entries is none"
    assert read_file(backup) == merge(taken)
    store.add_entries(read_file(backup))
    assert len(store.read()) == 3


def test_files_put_aside_do_not_replace_each_other(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store, key = Store(tmp_path), make_key()
    file = store.file(key)
    file.parent.mkdir(parents=True)
    for text in ("first", "second"):
        file.write_text(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store.add(key, [make_row(16)])
    assert [aside.read_text() for aside in sorted(file.parent.glob("*.unreadable-*"))] == ["first", "second"]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, start_writer: Make) -> None:
    firsts, count = (1, 1001, 2001), 15
    writers = [start_writer(first, count) for first in firsts]
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    assert tiles(Store(tmp_path / "tune")) == {first + i for first in firsts for i in range(count)}


def test_a_hundred_killed_writers_lose_nothing_that_was_added(
    tmp_path: Path, start_writer: Make, make_key: Make, make_row: Make
) -> None:
    store, delays = Store(tmp_path / "tune"), random.Random(0)
    steady = start_writer(1, 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(100):
            death = DEATHS[number] if number < len(DEATHS) else None
            victim = start_writer(10**6 * (number + 1) + number, 1000, death)
            if death is None:
                log = tmp_path / f"log-{victim.name}"
                while not (log.exists() and log.stat().st_size):
                    time.sleep(0.001)
                time.sleep(delays.uniform(0.0, 0.02))  # into the next rows
                victim.kill()
            victim.join(60)
            assert victim.exitcode == -signal.SIGKILL
        steady.kill()
        steady.join()
        assert returned(tmp_path) <= tiles(store)
        assert len({tile // 10**6 for tile in returned(tmp_path)}) == 101
        assert len(returned(tmp_path) & set(range(100_000))) > 10, "the other writer went on"
        for kernel in KERNELS:
            store.add(make_key(kernel=kernel), [make_row(5 * 10**8)])
        assert 5 * 10**8 in tiles(store), "no lock is left"
    assert not list(tmp_path.rglob("*.tmp")), "nor half a file, once each was written again"


def test_a_lock_that_is_never_released_is_a_clear_error(
    tmp_path: Path, make_key: Make, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    with FileLock(tmp_path / ".lock"), pytest.raises(TimeoutError, match=r"another process holds .*\.lock"):
        Store(tmp_path).add(make_key(), [make_row(16)])


def test_a_reader_never_sees_half_a_file(tmp_path: Path, start_writer: Make) -> None:
    store, writer, seen = Store(tmp_path / "tune"), start_writer(1, 30), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while writer.is_alive():
            now = len(tiles(store))
            assert now >= seen, "rows only become more"
            seen = now
    assert writer.exitcode == 0
    assert tiles(store) == returned(tmp_path) == set(range(1, 31))


def test_names_are_safe_as_file_names(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path)
    store.add(make_key(device="../../AMD EPYC™ 9/64 (x)"), [make_row(16)])
    (file,) = store.files()
    assert tmp_path in file.resolve().parents
    assert file.read_text() == dump([Entry(key=make_key(device="../../AMD EPYC™ 9/64 (x)"), rows=[make_row(16)])])
