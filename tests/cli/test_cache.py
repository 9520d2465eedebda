"""``fastattn cache``, on caches of a few rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastattn.autotune import choice
from fastattn.autotune.block_attention import Sizes
from fastattn.autotune.device import DeviceName, describe
from fastattn.autotune.devices import device_named
from fastattn.autotune.key import Key, key_for
from fastattn.autotune.rooms import room_of
from fastattn.autotune.schema import ConfigFields, Row
from fastattn.autotune.store import Store, default_store
from fastattn.cli.main import app

CPU = torch.device("cpu")
FORWARD = "block_attention_forward"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_shipped: None) -> Iterator[Path]:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    choice.forget()
    yield tmp_path / "cache"
    choice.forget()


def cache(*words: str | Path, status: int = 0) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, ["cache", *map(str, words)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def key(
    kernel: str = FORWARD, dtype: torch.dtype = torch.float32, place: DeviceName | None = None, **changes: Any
) -> Key:
    """Of a usual call on this machine's CPU, or on ``place``."""
    flags = room_of(kernel).flags(kernel)[0]
    made = key_for(kernel, place or describe(CPU), dtype, Sizes().shape(kernel), flags)
    return made.model_copy(update=changes)


def row(tile: int, time_us: float | None = 1234.0, age: timedelta = timedelta(days=3), **changes: Any) -> Row:
    config = ConfigFields(blocks={"BLOCK_M": tile, "BLOCK_N": tile}, num_warps=8, num_stages=3, num_ctas=1)
    fields: dict[str, Any] = {
        "config": config,
        "label": "measured",
        "time_us": time_us,
        "written": datetime.now(UTC) - age,
    }
    return Row(**(fields | changes))


def test_path_is_one_line_for_scripts(cache_dir: Path) -> None:
    assert cache("path") == f"{cache_dir / 'tune'}\n"


def test_list_has_a_rows_configuration_time_label_and_age() -> None:
    assert "holds no rows" in cache("list")
    default_store().add(key(), [row(32), row(64, 2000.0)])
    said = cache("list")
    assert "block_attention_forward float32 on " in said
    assert "best of 2: BLOCK_M 32, BLOCK_N 32: 1,234.0 µs, measured 3 days ago; in use" in said


def test_list_shows_warps_and_stages_of_a_gpu() -> None:
    h100 = device_named("h100").device_name()
    default_store().add(key(dtype=torch.float16, place=h100), [row(64, label="modelled")])
    assert "BLOCK_M 64, BLOCK_N 64, 8 warps, 3 stages: 1,234.0 µs, modelled 3 days ago; in use" in cache("list")


def test_list_takes_filters() -> None:
    store = default_store()
    store.add(key(), [row(16)])
    store.add(key("block_attention_backward_dq", torch.float16), [row(32, label="modelled")])
    store.add(key(source="f" * 16), [row(64)])

    def kernels(*words: str) -> list[tuple[str, str]]:
        listed = json.loads(cache("list", "--json", *words))
        return [(entry["key"]["kernel"], entry["key"]["dtype"]) for entry in listed]

    assert len(kernels()) == 3
    backward = [("block_attention_backward_dq", "float16")]
    assert kernels("--kernel", "block_attention_backward") == backward
    assert kernels("--dtype", "fp16") == kernels("--label", "modelled") == backward
    assert kernels("--stale") == [(FORWARD, "float32")]
    assert len(kernels("--device", describe(CPU).arch)) == 3
    assert kernels("--device", "h100") == []
    assert "None of the 3 entries" in cache("list", "--device", "h100")
    assert "no longer used, for another source" in cache("list", "--stale")


def test_list_as_json_is_a_rows_whole_truth() -> None:
    default_store().add(key(), [row(32)])
    (entry,) = json.loads(cache("list", "--json"))
    assert entry["stale"] is None and entry["rows"] == 1
    assert entry["chosen"]["config"]["blocks"] == {"BLOCK_M": 32, "BLOCK_N": 32}
    assert entry["age_days"] == pytest.approx(3, abs=0.01)


def test_explain_without_rows_names_the_heuristic() -> None:
    said = cache("explain", "block_attention_backward_dq", "--cluster-size", "32")
    assert "BLOCK_M 32, BLOCK_N 32, by the kernel's heuristic" in said
    assert "nothing was tuned for block_attention_backward_dq" in said


def test_explain_of_a_device_that_is_not_here() -> None:
    h100 = device_named("h100").device_name()
    default_store().add(key(dtype=torch.float16, place=h100), [row(32, label="modelled", terms={"memory_us": 12.5})])
    said = cache("explain", FORWARD, "--device", "h100", "--dtype", "fp16")
    assert "BLOCK_M 32, BLOCK_N 32, 8 warps, 3 stages" in said
    assert "modelled for this device" in said and "NVIDIA H100 80GB HBM3" in said
    assert "memory_us" in said and "12.5" in said
    other = cache("explain", FORWARD, "--device", "h200", "--dtype", "fp16")
    assert "modelled for another device of this architecture" in other


def test_explain_takes_sizes_and_flags_of_every_room() -> None:
    answers = json.loads(
        cache("explain", "linear_attention", "length=512", "is_causal=true", "--head-dim", "32", "--json")
    )
    assert [answer["kernel"] for answer in answers][:2] == ["linear_attention_states", "linear_attention_scan"]
    assert all(answer["config"]["blocks"] and answer["row"] is None for answer in answers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("sliding",), "got 'sliding'"),
        ((FORWARD, "--dtype", "fp8"), "dtype must be one of"),
        ((FORWARD, "--device", "cuda:zero"), "cuda:zero"),
        ((FORWARD, "bits=3"), "block_attention_forward has no size or flag bits; it has length, cluster_size"),
        ((FORWARD, "causal"), "sizes and flags must be like length=4096 or is_causal=true, got 'causal'"),
        ((FORWARD, "length=0"), "length must be at least 1"),
    ],
    ids=["kernel", "dtype", "device", "size", "word", "zero"],
)
def test_explain_names_bad_options(words: tuple[str, ...], message: str) -> None:
    said = cache("explain", *words, status=1)
    assert message in said


def test_verify_counts_and_prune_moves_stale_rows_into_a_backup() -> None:
    store = default_store()
    store.add(key(), [row(16), row(32, None, verdict="wrong")])
    store.add(key(source="f" * 16), [row(64)])
    said = cache("verify")
    assert "2 entries, 3 rows, 2 usable, 1 wrong" in said
    assert "stale: 1 entries for another source" in said
    assert len(store.read()) == 2, "it only looks"
    pruned = cache("verify", "--prune")
    assert "moved 1 stale entries into " in pruned
    assert [entry.key for entry in store.read()] == [key()]
    (backup,) = store.folder.glob("pruned-*.json")
    assert "1 rows are new" in cache("merge", backup)
    assert len(store.read()) == 2
    assert "moved 1 stale" in cache("verify", "--prune")
    assert "moved 0 stale entries" in cache("verify", "--prune")


def test_verify_fails_where_a_file_cannot_be_read(cache_dir: Path) -> None:
    default_store().add(key(), [row(16)])
    (file,) = default_store().files()
    file.write_text("{")
    assert f"unreadable {file}: it is not JSON" in cache("verify", status=1)
    assert "1 files in" in cache("verify", cache_dir, status=1)
    assert "there is no file or folder" in cache("verify", cache_dir / "elsewhere", status=1)
    assert "name no other" in cache("verify", cache_dir, "--prune", status=1)


def test_merge_brings_another_machines_rows_and_the_latest_stay(tmp_path: Path) -> None:
    default_store().add(key(), [row(16, 10.0), row(32, 20.0)])
    other = Store(tmp_path / "other")
    other.add(key(), [row(16, 5.0, age=timedelta(0)), row(32, 30.0, age=timedelta(days=9)), row(64, 40.0)])
    other.add(key(device="Another CPU"), [row(64)])
    assert "2 rows are new, 1 were replaced by later ones" in cache("merge", tmp_path / "other")
    times = {r.config.blocks["BLOCK_M"]: r.time_us for e in default_store().read() if e.key == key() for r in e.rows}
    assert times == {16: 5.0, 32: 20.0, 64: 40.0}
    assert "0 rows are new, 0 were replaced" in cache("merge", tmp_path / "other")


def test_a_damaged_file_stops_a_merge_before_anything_is_written(tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.add(key(), [row(16)])
    other.add(key("block_attention_backward_dq"), [row(16)])
    file = other.file(key())
    file.write_text("{")
    assert f"{file}: it is not JSON" in cache("merge", tmp_path / "other", status=1)
    assert default_store().read() == []


def test_diff_shows_other_choices_and_times_that_are_apart(tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    for dtype, mine, theirs in ((torch.float32, (16, 10.0), (32, 5.0)), (torch.float16, (16, 10.0), (16, 10.5))):
        default_store().add(key(dtype=dtype), [row(*mine)])
        other.add(key(dtype=dtype), [row(*theirs)])
    said = cache("diff", tmp_path / "other", status=1)
    assert "first  BLOCK_M 32, BLOCK_N 32: 5.0 µs" in said
    assert "the second's time is 2.00 of the first's" in said
    assert "float16" not in said
    assert "2 entries in both, 1 with another choice; 0 only in the first, 0 only in the second" in said
    assert len(json.loads(cache("diff", tmp_path / "other", "--apart", "1.01", "--json", status=1))) == 2
    assert cache("diff", tmp_path / "other", tmp_path / "other").startswith("2 entries in both, 0 with")
    other.add(key("block_attention_backward_dq"), [row(16)])
    said = cache("diff", tmp_path / "other", "--apart", "9", status=1)
    assert "1 only in the first" in said and "backward" not in said
    assert "no file or folder" in cache("diff", tmp_path / "elsewhere", status=2)


def test_pin_keeps_what_is_best_now_until_it_is_turned_off(cache_dir: Path) -> None:
    default_store().add(key(), [row(16)])
    pins = cache_dir / "tune" / "pins.json"
    assert f"{pins}: 1 configurations, 1 of them new" in cache("pin")
    default_store().add(key(), [row(64, 5.0)])
    where = ("explain", FORWARD)
    assert "pinned in" in (said := cache(*where)) and "BLOCK_M 16" in said
    assert f"Calls go by {pins}" in cache("list")
    assert "0 unreadable; 2 entries" in cache("verify"), "pins are looked at too"
    assert "pins are kept as" in cache("pin", "--off")
    assert "BLOCK_M 64" in cache(*where)
    assert "nothing was pinned" in cache("pin", "--off")
    assert "--off stands alone" in cache("pin", "--off", "--renew", status=1)


def test_pins_for_other_machines_leave_this_one_as_it_is(tmp_path: Path) -> None:
    default_store().add(key(), [row(16)])
    assert "1 configurations" in cache("pin", "--output", tmp_path / "fleet.json")
    assert "measured on this device" in cache("explain", FORWARD)
