"""The cache on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.autotune import store as store_module
from fastattn.autotune.schema import Entry, dump
from fastattn.autotune.store import Store

Make = Callable[..., Any]

# Adds rows for tiles first, first + 1, ..., one at a time; says when it starts.
WRITER = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from fastattn.autotune.key import Key
from fastattn.autotune.schema import ConfigFields, Row
from fastattn.autotune.store import Store

folder, key, first, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store, key = Store(Path(folder)), Key.model_validate_json(key)
print("ready", flush=True)
for tile in range(first, first + count):
    config = ConfigFields(blocks={"BLOCK_M": tile}, num_warps=4, num_stages=2, num_ctas=1)
    store.add(key, [Row(config=config, label="measured", time_us=tile, written=datetime.now(UTC))])
"""


def start_writer(folder: Path, key: Any, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), key.model_dump_json(), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})


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


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path, make_key: Make) -> None:
    key, count = make_key(), 25
    writers = [start_writer(tmp_path, key, first, count) for first in (1, 1001, 2001)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert tiles(Store(tmp_path)) == {first + i for first in (1, 1001, 2001) for i in range(count)}


def test_a_killed_writer_leaves_whole_files_and_no_lock(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    key, store = make_key(), Store(tmp_path)
    for attempt in range(4):
        writer = start_writer(tmp_path, key, 1000 * attempt + 1, 100_000)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.02 + 0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = tiles(store)
            store.add(key, [make_row(10**6 + attempt)])
            assert tiles(store) == before | {10**6 + attempt}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_lock_that_is_never_released_is_a_clear_error(
    tmp_path: Path, make_key: Make, make_row: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    with FileLock(tmp_path / ".lock"), pytest.raises(TimeoutError, match=r"another process holds .*\.lock"):
        Store(tmp_path).add(make_key(), [make_row(16)])


def test_a_reader_never_sees_half_a_file(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store, key = Store(tmp_path), make_key()
    store.add(key, [make_row(1)])
    writer = start_writer(tmp_path, key, 2, 60)
    seen = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while writer.poll() is None:
            now = len(tiles(store))
            assert now >= seen, "rows only become more"
            seen = now
    assert writer.returncode == 0
    assert len(tiles(store)) == 61


def test_names_are_safe_as_file_names(tmp_path: Path, make_key: Make, make_row: Make) -> None:
    store = Store(tmp_path)
    store.add(make_key(device="../../AMD EPYC™ 9/64 (x)"), [make_row(16)])
    (file,) = store.files()
    assert tmp_path in file.resolve().parents
    assert file.read_text() == dump([Entry(key=make_key(device="../../AMD EPYC™ 9/64 (x)"), rows=[make_row(16)])])
