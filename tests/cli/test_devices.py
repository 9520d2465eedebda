"""`fastattn devices`: the table, and what this machine has."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fastattn.autotune import cpu_rates
from fastattn.autotune.cpu_rates import Rates
from fastattn.autotune.devices import devices
from fastattn.cli.main import app


@pytest.fixture(autouse=True)
def rates_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rates, "rates", lambda: Rates(1.2e11, 2.4e11, 1e10))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("COLUMNS", "200")


def test_it_shows_every_device_and_the_one_at_hand() -> None:
    result = CliRunner().invoke(app, ["devices"])
    assert result.exit_code == 0, result.output
    for name, device in devices().items():
        (line,) = (line for line in result.output.splitlines() if f" {name} " in line)
        assert device.title in line and device.arch in line
    (h100,) = (line for line in result.output.splitlines() if " h100 " in line)
    assert [cell.strip() for cell in h100.split("│")[4:-1]] == [
        "132", "1.83", "3,350", "989.0", "989.0", "67.0", "227", "50"
    ]  # fmt: skip
    assert "0.24" in result.output and "0.12" in result.output  # TFLOP/s of this CPU


def test_json_has_every_figure_with_its_sources() -> None:
    result = CliRunner().invoke(app, ["devices", "--json"])
    found = json.loads(result.output)
    assert [device["name"] for device in found["devices"]] == list(devices())
    assert all(device["sources"] for device in found["devices"])
    (cpu,) = found["at_hand"]
    assert cpu["kind"] == "cpu" and cpu["flops"]["float32"] == 1.2e11 and cpu["notes"]
