"""The device table: sane figures with sources, and devices that are read from a driver or measured."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastattn.autotune import cpu_rates
from fastattn.autotune.cpu_rates import Rates
from fastattn.autotune.device import DeviceName, describe
from fastattn.autotune.devices import Device, at_hand, device_named, devices, of_driver
from fastattn.kernels.ahead import shared_memory_limit

KIB, MIB = 1024, 1024**2
EVERY = list(devices().values())
NAMED = [device.name for device in EVERY]
CPU = torch.device("cpu")


def test_the_table_has_the_devices_that_it_should() -> None:
    assert set(devices()) == {
        "t4", "a10", "a100-40gb", "a100", "l4", "l40s", "h100", "h100-pcie", "h200", "b200", "rtx3090", "rtx4090",
        "rtx5090", "mi250", "mi300x",
    }  # fmt: skip


@pytest.mark.parametrize("device", EVERY, ids=NAMED)
def test_figures_are_in_their_units(device: Device) -> None:
    assert 20 <= device.sms <= 400
    assert 1.0 <= device.clock_ghz <= 3.0
    assert 3e11 <= device.bandwidth <= 8e12  # bytes per second
    assert 8e12 <= device.flops["float32"] <= device.flops["float16"] <= 2.5e15
    assert 4 * MIB <= device.l2_bytes <= 128 * MIB
    assert 64 * KIB <= device.shared_per_block <= device.shared_per_sm <= 228 * KIB
    assert device.threads_per_sm in (1024, 1536, 2048) and device.blocks_per_sm in (16, 24, 32)
    assert device.threads_per_sm % device.warp_size == 0
    assert device.bandwidth < device.cached_bandwidth < device.tile_bandwidth
    # one exp takes as long as some additions, and far longer than its share of a product
    assert device.exps < device.pointwise < device.flops["float16"]
    assert 0.1 < device.step_us <= device.program_us <= device.launch_us < 10


@pytest.mark.parametrize("device", EVERY, ids=NAMED)
def test_published_rates_are_multiprocessors_times_clock_times_a_multiprocessors_rate(device: Device) -> None:
    """Powers of two a clock: 2 to 4 % of rounding, and 8 % where plain ALUs run at another clock than tensor cores."""
    for dtype, rate in device.flops.items():
        per_clock = rate / (device.sms * device.clock_ghz * 1e9)
        nearest = 2 ** round(torch.tensor(per_clock).log2().item())
        is_other_clock = dtype == "float32" and device.arch in ("sm_90", "sm_100")
        assert per_clock == pytest.approx(nearest, rel=0.085 if is_other_clock else 0.015), dtype


def test_newer_devices_of_a_line_are_faster() -> None:
    for line in (
        ["t4", "a10", "l40s"], ["a100-40gb", "a100", "h100", "h200", "b200"], ["rtx3090", "rtx4090", "rtx5090"],
        ["mi250", "mi300x"], ["h100-pcie", "h100"],
    ):  # fmt: skip
        for older, newer in pairwise(line):
            a, b = devices()[older], devices()[newer]
            assert a.bandwidth <= b.bandwidth and a.flops["bfloat16"] <= b.flops["bfloat16"], (older, newer)
    assert devices()["h200"].flops == devices()["h100"].flops  # other memory, same chip


@pytest.mark.parametrize("device", EVERY, ids=NAMED)
def test_every_figure_has_sources_of_its_vendor(device: Device) -> None:
    vendor = ("amd.com", "llvm") if device.kind == "hip" else ("nvidia.com",)
    assert len(device.sources) >= 3
    for source in device.sources:
        assert source.startswith("https://") and any(name in source for name in vendor)


@pytest.mark.parametrize("device", EVERY, ids=NAMED)
def test_shared_memory_is_what_the_compiler_is_held_to(device: Device) -> None:
    assert device.shared_per_block == shared_memory_limit(device.target)


def test_targets_and_names_are_those_of_compilers_and_cache_keys() -> None:
    assert devices()["h100"].target == "cuda:90" and devices()["mi300x"].target == "hip:gfx942"
    assert devices()["h100"].device_name() == DeviceName("sm_90", "NVIDIA H100 80GB HBM3")
    titles = [title for device in EVERY for title in (device.title, *device.also)]
    assert len(titles) == len(set(titles))


def test_exact_fp32_is_made_of_tf32_where_that_pays() -> None:
    h100, t4, mi300x = (devices()[name] for name in ("h100", "t4", "mi300x"))
    assert h100.rate("tf32x3") == h100.flops["tf32"] / 3 > h100.rate("float32")
    assert t4.rate("tf32x3") == t4.rate("float32")
    assert mi300x.rate("tf32x3") == mi300x.rate("float32")  # AMD's kernels run exact fp32
    assert h100.rate("something else") == h100.rate("float32")


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of t4, a10, .*, got 'h900'"):
        device_named("h900")


def properties(**changes: Any) -> Any:
    """Of an RTX 4080, which is not in the table, as torch gives them."""
    told = {
        "name": "NVIDIA GeForce RTX 4080", "major": 8, "minor": 9, "multi_processor_count": 76, "warp_size": 32,
        "L2_cache_size": 64 * MIB, "max_threads_per_multi_processor": 1536, "regs_per_multiprocessor": 65536,
        "shared_memory_per_multiprocessor": 100 * KIB, "shared_memory_per_block_optin": 99 * KIB,
        "clock_rate": 2505000, "memory_clock_rate": 11201000, "memory_bus_width": 256,
    }  # fmt: skip
    return SimpleNamespace(**{name: value for name, value in (told | changes).items() if value is not None})


RTX_4080 = DeviceName("sm_89", "NVIDIA GeForce RTX 4080")


def test_an_unknown_gpu_is_read_from_its_driver() -> None:
    device = of_driver(RTX_4080, properties())
    assert (device.sms, device.l2_bytes, device.clock_ghz) == (76, 64 * MIB, 2.505)
    assert device.bandwidth == pytest.approx(716.8e9, rel=0.01)  # as published
    assert device.flops["float32"] == pytest.approx(48.7e12, rel=0.01)
    assert device.flops["float16"] == pytest.approx(97.5e12, rel=0.01)  # with fp32 sums
    assert device.device_name() == RTX_4080
    assert device.notes == ("rates are those of sm_89 at this clock",)


def test_what_the_driver_does_not_tell_is_the_architectures_and_said_so() -> None:
    told = properties(clock_rate=None, memory_clock_rate=None, shared_memory_per_block_optin=None)
    device = of_driver(RTX_4080, told)
    assert device.shared_per_block == 99 * KIB
    assert device.clock_ghz == devices()["l4"].clock_ghz
    assert any("clock is that of NVIDIA L4" in note for note in device.notes)
    assert any("bandwidth is that of NVIDIA L4" in note for note in device.notes)


def test_a_gpu_of_the_table_is_known_by_any_of_its_titles() -> None:
    pcie = DeviceName("sm_80", "NVIDIA A100 80GB PCIe")
    assert of_driver(pcie, properties(name=pcie.name)) is devices()["a100"]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="architecture sm_61; known are sm_75"):
        of_driver(DeviceName("sm_61", "NVIDIA GeForce GTX 1080"), properties())
    with pytest.raises(ValueError, match="must be a CPU or a CUDA or HIP device, got 'xpu'"):
        at_hand(torch.device("xpu"))


# ---- the CPU


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the machine was measured; each time it is found to be a little faster."""
    calls: list[int] = []

    def measure() -> Rates:
        calls.append(len(calls))
        return Rates(1e11 + len(calls), 2e11, 1e10)

    monkeypatch.setattr(cpu_rates, "measure", measure)
    cpu_rates._rates.cache_clear()
    return calls


def test_the_cpu_is_measured_in_less_than_a_second() -> None:
    start = time.process_time()
    found = cpu_rates.measure()
    # of processor time: how long the machine's other work keeps this waiting is not ours to say
    assert (time.process_time() - start) / torch.get_num_threads() < 1.5 * cpu_rates.SECONDS + 0.3
    assert 1e9 < found.float32 <= found.bfloat16 < 1e14
    assert 1e8 < found.bandwidth < 1e12


def test_the_cpu_is_a_device_with_the_name_of_its_cache_keys(measured: list[int]) -> None:
    device = at_hand(CPU)
    assert device == device_named("cpu")
    assert device.device_name() == describe(CPU)
    assert device.sms == torch.get_num_threads()
    assert device.rate("bfloat16") > device.rate("float16") == device.rate("float32")
    assert device.l1_bytes is not None and 8 * KIB <= device.l1_bytes < device.l2_bytes


def test_rates_are_kept_and_measured_again_on_another_machine(
    measured: list[int], cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cpu_rates.rates()
    cpu_rates._rates.cache_clear()  # as in another process
    assert cpu_rates.rates() == first and len(measured) == 1
    (file,) = (cache_dir / "rates").iterdir()
    assert json.loads(file.read_text()) == vars(first)
    monkeypatch.setattr("fastattn.kernels.cpu.machine.fingerprint", lambda: "another")
    cpu_rates._rates.cache_clear()
    assert cpu_rates.rates() != first and len(measured) == 2
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    cpu_rates.rates()
    assert len(measured) == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"float32": "fast"}', '{"float32": -1.0, "bfloat16": 1.0, "bandwidth": 1.0}']
)
def test_damaged_rates_are_measured_again(measured: list[int], cache_dir: Path, text: str) -> None:
    first = cpu_rates.rates()
    (file,) = (cache_dir / "rates").iterdir()
    file.write_text(text)
    cpu_rates._rates.cache_clear()
    assert cpu_rates.rates() == replace(first, float32=first.float32 + 1)
    assert json.loads(file.read_text())["float32"] == first.float32 + 1
