"""Configurations where nothing was tuned depend on the architecture, and serve where that is not known."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune.source import ROOMS
from fastattn.kernels import block_attention
from fastattn.kernels.config import Config
from fastattn.kernels.launch import device_kind

KERNELS = [(room, kernel) for room in ROOMS for kernel in import_module(f"fastattn.kernels.{room}").KERNELS]
GPUS = ("cuda:75", "cuda:80", "cuda:86", "cuda:90", "cuda:100", "cuda:120", "hip:gfx90a", "hip:gfx942")


def default(room: str, kernel: str, device_type: str) -> Config:
    module = import_module(f"fastattn.kernels.{room}")
    return module.example_launch(kernel, torch.float16, head_dim=64, device_type=device_type).config


@pytest.mark.parametrize(("room", "kernel"), KERNELS)
def test_a_gpu_takes_at_least_the_tile_that_any_of_its_vendor_takes(room: str, kernel: str):
    for gpu in GPUS:
        any_gpu, this = default(room, kernel, gpu.split(":")[0]), default(room, kernel, gpu)
        assert this.blocks.keys() == any_gpu.blocks.keys()
        assert all(this.blocks[name] >= size for name, size in any_gpu.blocks.items()), gpu


def test_a_gpu_of_an_unknown_architecture_takes_what_any_takes():
    for room, kernel in KERNELS:
        assert default(room, kernel, "cuda:75") == default(room, kernel, "cuda")
        assert default(room, kernel, "hip:gfx90a") == default(room, kernel, "hip")


def test_gradients_of_keys_have_larger_tiles_where_tensor_cores_read_from_shared_memory():
    at = {gpu: block_attention.heuristic("block_attention_backward_dkv", gpu, 64, 64, 64, 2) for gpu in GPUS}
    assert at["cuda:90"].blocks == {"BLOCK_M": 64, "BLOCK_N": 64}
    assert at["cuda:80"].blocks == {"BLOCK_M": 32, "BLOCK_N": 64}


@pytest.fixture
def forget_devices() -> Iterator[None]:
    device_kind.cache_clear()
    yield
    device_kind.cache_clear()


@pytest.mark.usefixtures("forget_devices")
def test_a_device_is_called_as_ahead_of_time_targets_are(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(major=12, minor=0, gcnArchName="gfx942:sramecc+:xnack-")

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    gpu = torch.device("cuda:0")
    assert (device_kind(gpu), device_kind(gpu), device_kind(torch.device("cpu"))) == ("cuda:120", "cuda:120", "cpu")
    assert asked == [gpu]  # a launch asks each time, the driver is asked once
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_kind(torch.device("cuda:1")) == "hip:gfx942"
