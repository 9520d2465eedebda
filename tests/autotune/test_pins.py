"""Deterministic mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune.choice import explain, forget, lookup
from fastattn.autotune.device import DeviceName, describe
from fastattn.autotune.key import Key, key_for
from fastattn.autotune.pins import default_file, pin_everything, pins_of
from fastattn.autotune.schema import ConfigFields, Entry, Row
from fastattn.autotune.store import default_store, read_file
from fastattn.kernels.config import Config
from fastattn.kernels.settings import configure, settings

Make = Callable[..., Any]

CPU = torch.device("cpu")
KERNEL = "block_attention_forward"
SHAPE = {"c_q": 64, "c_k": 64, "n_blocks": 64}


@pytest.fixture(autouse=True)
def not_configured() -> Iterator[None]:
    yield
    configure(pins=None)


def a_row(tile: int, time_us: float = 1.0, label: str = "measured") -> Row:
    config = ConfigFields(blocks={"BLOCK_M": tile, "BLOCK_N": tile}, num_warps=4, num_stages=2, num_ctas=1)
    return Row(config=config, label=label, time_us=time_us, written=datetime.now(UTC))


def key(**changes: Any) -> Key:
    return key_for(KERNEL, describe(CPU), torch.float32, SHAPE, {}).model_copy(update=changes)


def tuned(tile: int, time_us: float = 1.0) -> None:
    default_store().add(key(), [a_row(tile, time_us)])
    forget()


def asked(dtype: torch.dtype = torch.float32, **changes: int) -> int | None:
    found = lookup(KERNEL, CPU, dtype, SHAPE | changes, {})
    return None if found is None else found.blocks["BLOCK_M"]


def test_a_pinned_configuration_stays_whatever_is_tuned_later() -> None:
    tuned(32)
    assert pin_everything(default_file()) == (1, 1)
    tuned(64, time_us=0.5)
    assert asked() == 32
    choice = explain(KERNEL, CPU, torch.float32, SHAPE, {})
    assert choice.why == f"pinned in {default_file()}"
    assert choice.config == Config({"BLOCK_M": 32, "BLOCK_N": 32})


def test_a_missing_pin_is_the_heuristics_and_never_a_tuned_row() -> None:
    tuned(32)
    pin_everything(default_file())
    default_store().add(key(dtype="float16"), [a_row(64)])
    forget()
    assert asked(torch.float16) is None
    assert explain(KERNEL, CPU, torch.float16, SHAPE, {}).why.startswith("not pinned in ")
    default_file().unlink()
    forget()
    assert asked(torch.float16) == 64


@pytest.mark.parametrize(
    "change", [{"device": "Another CPU"}, {"threads": 64}, {"triton": "0.0"}, {"compiler": "another"}], ids=str
)
def test_one_file_serves_machines_that_differ_in_what_changes_no_result(change: dict[str, Any]) -> None:
    default_store().folder.mkdir(parents=True)
    from fastattn.autotune.store import replace

    replace(default_file(), [Entry(key=key(**change), rows=[a_row(32)])])
    assert asked() == asked(n_blocks=1024) == 32


@pytest.mark.parametrize("change", [{"source": "f" * 16}, {"arch": "sm_90"}, {"dtype": "float16"}], ids=str)
def test_a_pin_for_other_code_is_none(change: dict[str, Any]) -> None:
    default_store().folder.mkdir(parents=True)
    from fastattn.autotune.store import replace

    replace(default_file(), [Entry(key=key(**change), rows=[a_row(32)])])
    assert asked() is None


def test_a_program_may_name_a_file_of_its_own(tmp_path: Path) -> None:
    tuned(32)
    pin_everything(tmp_path / "fleet" / "pins.json")
    tuned(64, time_us=0.5)
    assert asked() == 64, "a file that was only written pins nothing here"
    configure(pins=tmp_path / "fleet" / "pins.json")
    assert settings().pins == tmp_path / "fleet" / "pins.json"
    assert asked() == 32, "at once, without forget()"
    configure(pins=None)
    assert asked() == 64


def test_a_named_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pins must be a file .* got '.*nothing.json'"):
        configure(pins=tmp_path / "nothing.json")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_pins_are_one_warning_and_no_way_back_to_tuned_rows(tmp_path: Path, damage: str) -> None:
    tuned(32)
    file = tmp_path / "pins.json"
    pin_everything(file)
    configure(pins=file)
    if damage == "cut":
        file.write_text(file.read_text()[:50])
    else:
        file.unlink()
    with pytest.warns(RuntimeWarning, match=r"pins\.json is ignored: ") as caught:
        assert asked() is asked(torch.float16) is None
    assert len(caught) == 1


def test_present_pins_stay_unless_they_are_renewed() -> None:
    tuned(32)
    pin_everything(default_file())
    tuned(64, time_us=0.5)
    default_store().add(key(dtype="float16"), [a_row(16)])
    assert pin_everything(default_file()) == (2, 1)
    forget()
    assert (asked(), asked(torch.float16)) == (32, 16)
    assert pin_everything(default_file(), renew=True) == (2, 1)
    forget()
    assert asked() == 64


def test_of_devices_that_disagree_the_measured_and_then_the_own_one_is_pinned() -> None:
    a, b = key(device="A", threads=None), key(device="B", threads=None)
    rows = [Entry(key=a, rows=[a_row(16, label="modelled")]), Entry(key=b, rows=[a_row(32, label="modelled")])]

    def pinned(own: list[Entry], here: set[DeviceName]) -> list[int]:
        return [pin.rows[0].config.blocks["BLOCK_M"] for pin in pins_of(own, rows, here)]

    assert pinned([], set()) == [16]
    assert pinned([], {DeviceName(b.arch, "B", None)}) == [32]
    assert pinned([Entry(key=a, rows=[a_row(64)])], {DeviceName(b.arch, "B", None)}) == [64]


def test_rows_for_other_code_make_no_pins() -> None:
    default_store().add(key(source="f" * 16), [a_row(32)])
    default_store().add(key(kernel="a_kernel_of_another_version"), [a_row(32)])
    assert pin_everything(default_file()) == (0, 0)
    assert read_file(default_file()) == []
