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
from fastattn.export.ort import cuda_steps, needs
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


@pytest.mark.parametrize(
    ("op", "kernel", "flags", "sizes"),
    [
        ("HashArgmax", "hash_argmax_digit", {}, {"columns": 32}),  # of 64 buckets
        ("HashBits", "hamming_hash", {}, {}),
        ("SmyrfHash", "smyrf_hash_project", {}, {}),
        ("SmyrfHash", "smyrf_hash_lift", {}, {}),
        ("ClusterSums", "cluster_attention_sums", {}, {}),
        ("CentroidAttention", "centroid_attention_forward",
         {"HAS_MASK": False, "HAS_VALUES": True, "HAS_PEAKS": True, "HAS_DROPOUT": False}, {}),
        ("TopkKeys", "centroid_attention_candidates", {"HAS_MASK": False, "HAS_DROPOUT": False}, {}),
        ("HammingKmeans", "hamming_count", {}, {}),
        ("TopkAttention", "topk_attention_forward", {"is_causal": False, "dropout": False}, {}),
    ],
)  # fmt: skip
def test_hashes_and_clusters_take_their_own(
    op: str, kernel: str, flags: dict[str, bool], sizes: dict[str, int]
) -> None:
    own = configs(op, "cuda:90")[kernel]
    other = Config(own.blocks, 8 if own.num_warps != 8 else 4, 5)
    dtype = {"hamming_count": torch.int64, "smyrf_hash_lift": torch.float32}.get(kernel, torch.float16)
    tune(kernel, other, flags, dtype, **sizes)
    assert configs(op, "cuda:90")[kernel] == other
    for device_type in ("cuda:80", "cpu"):
        assert configs(op, device_type)[kernel] != other


def test_more_clusters_than_a_tuner_has_rows_take_the_heuristics() -> None:
    assert configs("HammingKmeans", "cuda:90", n_clusters=5000)
    assert configs("TopkAttention", "cuda:90", n_clusters=5000, topk=6000)


def test_a_gpu_has_all_kernels_of_the_cpu_and_those_between_them() -> None:
    calls = [*needs.every_call([64], ["fp16"])]
    assert {call.op for call in calls} > needs.GPU_OPS
    on_cpu, on_gpu = ({x.kernel for x in needs.variants(calls, device)} for device in ("cpu", "cuda:90"))
    assert on_gpu == on_cpu | {*cuda_steps.KERNELS} and not on_cpu & {*cuda_steps.KERNELS}
