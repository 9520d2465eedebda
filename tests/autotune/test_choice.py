"""Which configuration a call gets."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.autotune.choice import choose, explain, forget, lookup, stamp
from fastattn.autotune.schema import ConfigFields, Entry, Row
from fastattn.kernels.config import Config

Make = Callable[..., Any]

CPU = torch.device("cpu")
SHAPE = {"batch": 1, "heads": 8, "rounds": 4, "n_blocks": 64, "c_q": 64, "c_k": 64, "head_dim": 64, "value_dim": 64}
FLAGS = {"look_back": 0, "wrap": True, "is_causal": False}
CALL = ("block_attention_forward", CPU, torch.float32, SHAPE, FLAGS)


def tile(choice: Any) -> int | None:
    return None if choice.config is None else choice.config.blocks["BLOCK_M"]


def write(tile: int, time_us: float = 1.0, shape: dict[str, int] = SHAPE) -> None:
    """A row for this machine, as a tuner would write it."""
    from fastattn.autotune.device import describe
    from fastattn.autotune.key import key_for
    from fastattn.autotune.store import default_store

    key = key_for("block_attention_forward", describe(CPU), torch.float32, shape, FLAGS)
    config = ConfigFields(blocks={"BLOCK_M": tile}, num_warps=4, num_stages=2, num_ctas=1)
    default_store().add(key, [Row(config=config, label="measured", time_us=time_us, written=datetime.now(UTC))])
    forget()


class TestChoose:
    def test_the_fastest_row_of_the_same_key(self, make_key: Make, make_row: Make) -> None:
        entries = [Entry(key=make_key(), rows=[make_row(16, 3.0), make_row(32, 2.0), make_row(64, 4.0)])]
        choice = choose(make_key(), entries)
        assert tile(choice) == 32
        assert choice.why == "measured on this device"

    def test_this_device_comes_before_faster_rows_of_another(self, make_key: Make, make_row: Make) -> None:
        entries = [
            Entry(key=make_key(device="Faster CPU"), rows=[make_row(16, 1.0)]),
            Entry(key=make_key(threads=4), rows=[make_row(32, 2.0)]),
            Entry(key=make_key(), rows=[make_row(64, 3.0)]),
        ]
        assert tile(choose(make_key(), entries)) == 64
        assert tile(choose(make_key(), entries[:2])) == 32
        assert tile(choose(make_key(), entries[:1])) == 16
        assert choose(make_key(), entries[:1]).why == "measured on another device of this architecture"

    def test_the_nearest_length_serves(self, make_key: Make, make_row: Make) -> None:
        entries = [
            Entry(key=make_key(shape={"c_q": 64, "n_blocks": n}), rows=[make_row(size)])
            for n, size in ((16, 16), (256, 32))
        ]
        asked = make_key(shape={"c_q": 64, "n_blocks": 1024})
        assert tile(choose(asked, entries)) == 32
        assert "n_blocks 256" in choose(asked, entries).why

    def test_a_nearer_length_without_a_usable_row_is_passed_over(self, make_key: Make, make_row: Make) -> None:
        entries = [
            Entry(key=make_key(), rows=[make_row(16, verdict="wrong")]),
            Entry(key=make_key(shape={"c_q": 64, "n_blocks": 4096}), rows=[make_row(32)]),
        ]
        assert tile(choose(make_key(), entries)) == 32

    @pytest.mark.parametrize(
        "change",
        [
            {"source": "f" * 16}, {"triton": "3.8.0"}, {"compiler": "g++ 13"}, {"fp_fusion": False},
            {"arch": "x86_64-avx2"}, {"dtype": "float16"}, {"flags": {}}, {"kernel": "block_attention_backward_dq"},
            {"shape": {"c_q": 128, "n_blocks": 64}}, {"shape": {"c_q": 64}},
        ],
        ids=lambda change: next(iter(change)),
    )  # fmt: skip
    def test_a_row_for_other_code_is_not_used(self, make_key: Make, make_row: Make, change: dict[str, Any]) -> None:
        choice = choose(make_key(), [Entry(key=make_key(**change), rows=[make_row(16)])])
        assert choice.config is None
        assert "c_q" in choice.why or "n_blocks" in choice.why or next(iter(change)) in choice.why

    def test_wrong_rows_are_never_used(self, make_key: Make, make_row: Make) -> None:
        assert choose(make_key(), [Entry(key=make_key(), rows=[make_row(16, verdict="wrong")])]).config is None

    def test_without_any_row_it_says_so(self, make_key: Make) -> None:
        assert choose(make_key(), []).why == "nothing was tuned for block_attention_forward on x86_64-avx512"


H100 = {"arch": "sm_90", "device": "NVIDIA H100 80GB HBM3", "threads": None, "compiler": "ptxas 12.9"}
H200 = H100 | {"device": "NVIDIA H200"}


class TestOrder:
    """Each step of the order, by taking away what comes before it."""

    def test_measured_modelled_and_shipped_rows_have_one_order(self, make_key: Make, make_row: Make) -> None:
        def entry(tile: int, device: dict[str, Any], label: str) -> Entry:
            # what comes earlier is slower here, so that no order by time could do
            return Entry(key=make_key(**device), rows=[make_row(tile, 1000.0 - tile, label=label)])

        own, shipped = "own", "shipped"
        steps = [
            (own, entry(1, H100, "measured"), "measured on this device"),
            (shipped, entry(2, H100, "measured"), "measured on this device, as shipped with fastattn"),
            (own, entry(3, H200, "measured"), "measured on another device of this architecture"),
            (shipped, entry(4, H200, "measured"),
             "measured on another device of this architecture, as shipped with fastattn"),
            (own, entry(5, H100, "modelled"), "modelled for this device"),
            (shipped, entry(6, H100, "modelled"), "modelled for this device, as shipped with fastattn"),
            (own, entry(7, H200, "modelled"), "modelled for another device of this architecture"),
            (shipped, entry(8, H200, "modelled"),
             "modelled for another device of this architecture, as shipped with fastattn"),
        ]  # fmt: skip
        for first, (_, _, why) in enumerate(steps):
            left = {place: [e for where, e, _ in steps[first:] if where == place] for place in (own, shipped)}
            choice = choose(make_key(**H100), left[own], lambda left=left: left[shipped])
            assert (tile(choice), choice.why) == (first + 1, why)
        assert choose(make_key(**H100), []).config is None

    def test_shipped_rows_are_read_only_where_nothing_was_measured_on_this_device(
        self, make_key: Make, make_row: Make
    ) -> None:
        def refuse() -> list[Entry]:
            raise AssertionError("the shipped cache was read")

        assert tile(choose(make_key(), [Entry(key=make_key(), rows=[make_row(16)])], refuse)) == 16
        with pytest.raises(AssertionError, match="shipped"):
            choose(make_key(), [Entry(key=make_key(threads=8), rows=[make_row(16)])], refuse)

    def test_one_chip_may_have_several_names(self, make_key: Make, make_row: Make) -> None:
        a100 = H100 | {"arch": "sm_80", "device": "NVIDIA A100-SXM4-80GB"}
        rows = [Entry(key=make_key(**a100), rows=[make_row(16, label="modelled")])]
        there = choose(make_key(**a100 | {"device": "NVIDIA A100 80GB PCIe"}), rows)
        assert there.why == "modelled for this device"
        assert choose(make_key(**a100 | {"device": "NVIDIA A30"}), rows).why.startswith("modelled for another device")

    def test_a_model_does_not_bring_back_what_was_seen_to_fail(self, make_key: Make, make_row: Make) -> None:
        modelled = [make_row(tile, tile, label="modelled") for tile in (16, 32, 64)]
        shipped = [Entry(key=make_key(**H100), rows=modelled)]
        own = [
            Entry(key=make_key(**H100), rows=[make_row(16, None, verdict="failed")]),
            Entry(
                key=make_key(**H200, shape={"c_q": 64, "n_blocks": 1024}), rows=[make_row(32, None, verdict="wrong")]
            ),
        ]
        assert tile(choose(make_key(**H100), own, lambda: shipped)) == 64

    def test_wrong_results_at_one_length_rule_a_tile_out_at_all(self, make_key: Make, make_row: Make) -> None:
        own = [
            Entry(key=make_key(), rows=[make_row(16, 1.0), make_row(32, 2.0)]),
            Entry(key=make_key(shape={"c_q": 64, "n_blocks": 1024}), rows=[make_row(16, None, verdict="wrong")]),
        ]
        assert tile(choose(make_key(), own)) == 32
        failed = own[1].model_copy(update={"rows": [make_row(16, None, verdict="failed")]})
        assert tile(choose(make_key(), [own[0], failed])) == 16, "memory may have run out there"


def test_a_device_that_is_not_here_is_explained_by_its_name(make_row: Make) -> None:
    from fastattn.autotune.devices import device_named
    from fastattn.autotune.key import key_for
    from fastattn.autotune.store import default_store

    h100 = device_named("h100").device_name()
    key = key_for(CALL[0], h100, torch.float16, SHAPE, FLAGS)
    default_store().add(key, [make_row(64, label="modelled")])
    choice = explain(CALL[0], h100, torch.float16, SHAPE, FLAGS)
    assert (tile(choice), choice.why) == (64, "modelled for this device")


def test_what_is_shipped_serves_until_something_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_row: Make
) -> None:
    from fastattn.autotune import store
    from fastattn.autotune.device import describe
    from fastattn.autotune.key import key_for

    shipped = store.Store(tmp_path / "shipped")
    shipped.add(key_for(CALL[0], describe(CPU), torch.float32, SHAPE, FLAGS), [make_row(16, label="modelled")])
    monkeypatch.setattr(store, "shipped_store", lambda: shipped)
    assert lookup(*CALL) == Config({"BLOCK_M": 16})
    write(32)
    assert lookup(*CALL) == Config({"BLOCK_M": 32})


def test_what_this_process_writes_is_found_at_once() -> None:
    assert lookup(*CALL) is None
    write(32)
    assert lookup(*CALL) == Config({"BLOCK_M": 32})
    write(64, time_us=0.5)
    assert lookup(*CALL) == Config({"BLOCK_M": 64})


def test_nearby_lengths_and_other_counts_get_the_same_row() -> None:
    write(32)
    for changed in ({"n_blocks": 63}, {"n_blocks": 4096}, {"heads": 12}, {"batch": 3}, {"rounds": 1}):
        assert lookup("block_attention_forward", CPU, torch.float32, SHAPE | changed, FLAGS) == Config({"BLOCK_M": 32})
    assert lookup("block_attention_forward", CPU, torch.float32, SHAPE | {"c_q": 128}, FLAGS) is None


def test_flags_that_are_off_may_be_left_out() -> None:
    write(32)
    assert lookup("block_attention_forward", CPU, torch.float32, SHAPE, {"wrap": True}) == Config({"BLOCK_M": 32})
    assert lookup("block_attention_forward", CPU, torch.float32, SHAPE, FLAGS | {"is_causal": True}) is None


def test_another_cache_folder_has_other_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(32)
    assert lookup(*CALL) is not None
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert lookup(*CALL) is None


_seen: list[str] | None = None
_hooked: list[bool] = []


def _note(path: object) -> None:
    if _seen is not None:
        _seen.append(str(path))


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir"):
        _note(args[0])


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is opened or listed while the test runs, told by the interpreter itself, and what is looked for."""
    global _seen
    if not _hooked:
        sys.addaudithook(_watch)  # there is no way to take it off again
        _hooked.append(True)
    _seen = []
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, real=real, **kw: (_note(path), real(path, *a, **kw))[1])
    yield _seen
    _seen = None


def test_the_disk_is_not_touched_after_the_first_time(touched: list[str]) -> None:
    write(32)
    touched.clear()
    lookup(*CALL)
    assert any(file.endswith("block_attention_forward.json") for file in touched)
    touched.clear()
    assert lookup(*CALL) == Config({"BLOCK_M": 32})
    other_length = SHAPE | {"n_blocks": 128}
    assert lookup("block_attention_forward", CPU, torch.float32, other_length, FLAGS) == Config({"BLOCK_M": 32})
    assert lookup("block_attention_forward", CPU, torch.float32, SHAPE | {"c_q": 16}, FLAGS) is None, "shipped rows too"
    touched.clear()
    assert lookup("block_attention_forward", CPU, torch.float32, SHAPE | {"c_q": 32}, FLAGS) is None
    assert touched == []


def test_a_repeated_lookup_takes_microseconds() -> None:
    write(32)
    lookup(*CALL)
    best = float("inf")
    for _ in range(20):  # the least of many, for others may be using the machine
        start = time.perf_counter()
        for _ in range(500):
            lookup(*CALL)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 5e-6


def test_threads_may_look_up_while_another_writes_and_forgets() -> None:
    write(8, time_us=1000.0)
    stop, failures, answers = threading.Event(), [], set()

    def ask(own: int) -> None:
        try:
            while not stop.is_set():
                for n_blocks in (64, 128, 256 * own):
                    found = lookup(CALL[0], CPU, torch.float32, SHAPE | {"n_blocks": n_blocks}, FLAGS)
                    answers.add(None if found is None else found.blocks["BLOCK_M"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(own,)) for own in range(1, 5)]
    for thread in threads:
        thread.start()
    tiles = range(9, 19)
    for size in tiles:
        write(size, time_us=1000.0 - size)
        found = lookup(*CALL)
        assert found is not None and found.blocks["BLOCK_M"] == size, "nothing that was answered before is left"
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert answers <= {8, *tiles} and len(answers) > 1


def test_the_number_of_threads_and_the_cache_folder_change_the_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = [stamp()]
    assert stamp() == stamps[0]
    forget()
    stamps.append(stamp())
    monkeypatch.setenv("FASTATTN_CACHE_DIR", "/elsewhere")
    stamps.append(stamp())
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    stamps.append(stamp())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    stamps.append(stamp())
    torch.set_num_threads(threads)
    assert len(set(stamps)) == len(stamps)


def test_a_damaged_cache_does_not_break_a_lookup() -> None:
    from fastattn.autotune.store import default_store

    write(32)
    (file,) = default_store().files()
    file.write_text(file.read_text()[:100])
    forget()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert lookup(*CALL) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lookup(*CALL) is None


def test_explain_names_the_row() -> None:
    write(32, time_us=12.0)
    choice = explain(*CALL)
    assert choice.row is not None and choice.row.time_us == 12.0
    assert choice.key is not None and choice.key.dtype == "float32"
    assert choice.why == "measured on this device"


def test_importing_the_tuner_loads_neither_triton_nor_pydantic() -> None:
    code = (
        "import sys; before = set(sys.modules); import fastattn.autotune; "
        "print(sorted({'triton', 'pydantic', 'filelock'} & (set(sys.modules) - before)))"
    )
    said = subprocess.run([sys.executable, "-c", "import torch; " + code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
