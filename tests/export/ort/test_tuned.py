"""What is compiled ahead for a GPU has the tuner's tiles where there are some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.autotune import choice
from fastattn.autotune.device import DeviceName
from fastattn.autotune.key import key_for
from fastattn.autotune.rooms import room_of
from fastattn.autotune.schema import ConfigFields, Row
from fastattn.autotune.store import default_store
from fastattn.export.ort import needs
from fastattn.kernels.block_attention import Pattern
from fastattn.kernels.config import Config
from fastattn.kernels.linear_attention import Pattern as LinearPattern

H100 = DeviceName("sm_90", "NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of one test's own, without what came with the package."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fastattn.autotune.store.shipped_store", default_store)
    choice.forget()
    yield
    choice.forget()


def tune(kernel: str, config: Config, flags: Mapping[str, Any], dtype: torch.dtype, **sizes: int) -> None:
    """A row for an H100, as the tuner writes it."""
    key = key_for(kernel, H100, dtype, room_of(kernel).Sizes(**sizes).shape(kernel), flags)
    fields = ConfigFields(**config.to_dict())
    default_store().add(key, [Row(config=fields, label="modelled", time_us=1.0, written=datetime.now(UTC))])
    choice.forget()


def configs(op: str, device_type: str, **changes: Any) -> dict[str, Config]:
    call = needs.Call(op, torch.float16, 64, 64, torch.float16, changes)
    return {variant.kernel: variant.launch.config for variant in needs.variants([call], device_type)}


def test_blocks_of_this_size_and_pattern_take_their_own() -> None:
    kernel, other = "block_attention_forward", Config({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 3, 2)
    tune(kernel, other, vars(Pattern()), torch.float16, cluster_size=64, head_dim=64, value_dim=64)
    assert configs("BlockAttention", "cuda:90") == {kernel: other}
    for device_type in ("cuda:80", "cpu"):
        assert configs("BlockAttention", device_type)[kernel] != other
    assert configs("BlockAttention", "cuda:90", q_cluster_size=128)[kernel] != other
    assert configs("BlockAttentionWithOptions", "cuda:90", is_causal=1)[kernel] != other


@pytest.mark.parametrize("is_causal", [False, True])
def test_linear_attention_takes_its_own_whether_or_not_it_has_a_mask(is_causal: bool) -> None:
    kernel = "linear_attention_states"
    other = Config(configs("LinearAttention", "cuda:90", is_causal=int(is_causal))[kernel].blocks, 2, 5)
    flags = vars(LinearPattern(is_causal=is_causal))
    tune(kernel, other, flags, torch.float16, head_dim=64, value_dim=64)
    assert configs("LinearAttention", "cuda:90", is_causal=int(is_causal))[kernel] == other
    assert configs("LinearAttention", "cuda:90", is_causal=int(not is_causal))[kernel] != other


def test_a_step_takes_its_own() -> None:
    kernel = "linear_attention_step"
    other = Config(configs("LinearAttentionStep", "cuda:90")[kernel].blocks, 2, 5)
    tune(kernel, other, {"feature_map": "relu"}, torch.float16, head_dim=64, value_dim=64)
    assert configs("LinearAttentionStep", "cuda:90", feature_map=1) == {kernel: other}
    assert configs("LinearAttentionStep", "cuda:90")[kernel] != other


def test_a_gpu_gets_no_kernels_of_ops_that_only_the_cpu_has() -> None:
    calls = [*needs.every_call([64], ["fp16"])]
    assert {call.op for call in calls} > needs.GPU_OPS
    rooms = ("block_attention", "hash_argmax", "hamming_hash", "linear_attention")
    kernels = {variant.kernel for variant in needs.variants(calls, "cuda:90")}
    assert kernels and all(kernel.startswith(rooms) for kernel in kernels)
