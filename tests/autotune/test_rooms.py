"""Every kernel can be tuned: what its room says is what its op looks up and runs, and a wrong result is found out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastattn.autotune import choice, rooms
from fastattn.autotune.problem import Problem, candidates_of, deviation
from fastattn.autotune.schema import MEASURED, ConfigFields, Row
from fastattn.autotune.store import default_store
from fastattn.autotune.tune import key_of, tune
from fastattn.cli._tuning import definitions
from fastattn.kernels.config import Config, TuningSpace
from fastattn.ops import (
    block_attention,
    centroid_attention,
    cluster_attention,
    hamming_kmeans,
    hash_argmax,
    hash_bits,
    linear_attention,
    linear_attention_step,
    smyrf_hash,
    topk_attention,
)

CPU = torch.device("cpu")
KERNELS = rooms.kernel_names()
BUILT = Path(os.environ["FASTATTN_CACHE_DIR"], "cpu")  # where all tests keep what the compiler built
TINY = {
    "length": 70, "cluster_size": 16, "head_dim": 16, "value_dim": 24, "heads": 2, "rounds": 2, "columns": 8,
    "n_clusters": 7, "n_queries": 9, "top_k": 5, "n_bits": 40,
}  # fmt: skip

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def built_kernels_are_kept(cache_dir: Path) -> None:
    """Rows are each test's own; builds are not."""
    BUILT.mkdir(mode=0o700, parents=True, exist_ok=True)
    (cache_dir / "cpu").symlink_to(BUILT)


def tiny(room: ModuleType) -> Any:
    return room.Sizes(**{name: size for name, size in TINY.items() if name in room.Sizes.__dataclass_fields__})


@cache
def problems_of(room: ModuleType) -> list[Problem]:
    names = [name for name in KERNELS if rooms.room_of(name) is room]
    return list(room.problems(tiny(room), torch.float32, CPU, definitions(room), names))


def problem_of(kernel: str, **flags: Any) -> Problem:
    """That with the flags ``flags`` on; the plain one without."""
    room = rooms.room_of(kernel)
    wanted = next(each for each in room.flags(kernel) if all(each[name] == value for name, value in flags.items()))
    return next(each for each in problems_of(room) if (each.kernel, each.flags) == (kernel, wanted))


# what other flags change most: own keys, whose kernel goes before or after, and states that a tile's length asks for
MORE: list[tuple[str, dict[str, Any]]] = [
    ("block_attention_forward", {"once": True}),
    ("block_attention_backward_dkv", {"last_resort": True}),
    ("linear_attention_outputs", {"is_causal": True}),
    ("linear_attention_gradients", {"is_causal": True, "own_keys": True}),
    ("topk_attention_forward", {"is_causal": True}),
]


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "flags"),
    [*((kernel, {}) for kernel in KERNELS), *MORE],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_the_default_is_right_and_one_wrong_number_is_found_out(kernel: str, flags: dict[str, Any]) -> None:
    problem = problem_of(kernel, **flags)
    (row,) = tune(problem, 0.0).rows
    assert row.verdict == "ok", row.reason
    assert row.time_us is not None and row.time_us > 0
    error, tolerance = problem.deviation()
    assert error <= tolerance
    for output in problem.outputs:
        written = output.clone()
        place = written.isfinite().flatten().nonzero()[5]  # bits that are -inf may stay so when more is added
        output.view(-1)[place] = written.view(-1)[place] + (1 if not output.is_floating_point() else 0.01)
        error, tolerance = problem.deviation()
        output.copy_(written)
        assert error > tolerance


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_written_is_found_out(kernel: str) -> None:
    problem = problem_of(kernel)
    problem.spoil()
    error, tolerance = problem.deviation()
    assert not error <= tolerance


def calls() -> dict[str, Callable[[], object]]:
    """A call of the op of every room on inputs of the sizes of :data:`TINY`, forward and backward, with all flags."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, 2, *shape, requires_grad=True)

    def block() -> None:
        q, k, v = draw(70, 16), draw(70, 16), draw(70, 24)
        index = torch.arange(80, dtype=torch.int32).where(torch.arange(80) < 70, -1).int()
        index = index.view(1, 1, 1, 5, 16).expand(1, 2, 2, 5, 16).contiguous()
        reformer = {"look_back": 1, "is_causal": True, "self_mode": "last_resort"}
        for options in ({}, {"is_causal": True, "self_mode": "once"}, reformer):
            block_attention.block_attention(q, k, v, index, index, **options)[0].sum().backward()

    def centroids() -> None:
        q, k, v = draw(9, 16), draw(70, 16), draw(70, 24)
        for top_k in (5, 0):
            centroid_attention.centroid_attention(q, k, v, top_k=top_k)[0].sum().backward()

    def topk() -> None:
        q, k, v = draw(70, 16), draw(70, 16), draw(70, 24)
        clusters, lists = torch.zeros(1, 2, 70, dtype=torch.int32), torch.zeros(1, 2, 7, 5, dtype=torch.int32)
        for is_causal in (False, True):
            topk_attention.topk_attention(q, k, v, clusters, lists, is_causal=is_causal)[0].sum().backward()

    def linear() -> None:
        q, k, v = draw(70, 16), draw(70, 16), draw(70, 24)
        for is_causal in (False, True):
            linear_attention.attend_linear(q, k, v, feature_map="elu", is_causal=is_causal)[0].sum().backward()

    def hamming() -> None:
        codes = hash_bits.hash_bits(torch.randn(1, 2, 70, 16), torch.randn(40, 17))
        hamming_kmeans.hamming_kmeans(codes, 7, n_bits=40, n_iterations=2)

    def cluster() -> None:
        clusters = torch.zeros(1, 2, 70, dtype=torch.int32)
        cluster_attention.cluster_sums(torch.randn(1, 2, 70, 16), clusters, 7)
        cluster_attention.cluster_broadcast(torch.randn(1, 2, 7, 16), clusters)

    def step() -> None:
        q, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 24)
        s, z = torch.randn(1, 2, 16, 24), torch.randn(1, 2, 16)
        linear_attention_step.step_linear(q, q, v, s, z, feature_map="elu")

    return {
        "block_attention": block,
        "hash_argmax": lambda: hash_argmax.hash_argmax(torch.randn(1, 2, 70, 16), torch.randn(2, 16, 2, 8), 16),
        "smyrf_hash": lambda: smyrf_hash.smyrf_hash(*torch.randn(2, 1, 2, 70, 16), torch.randn(18, 2)),
        "hamming": hamming,
        "cluster_attention": cluster,
        "topk_attention": topk,
        "centroid_attention": centroids,
        "linear_attention": linear,
        "linear_attention_step": step,
    }


@pytest.mark.parametrize("room", dict.fromkeys(map(rooms.room_of, KERNELS)), ids=lambda room: room.__name__[18:])
def test_the_op_finds_the_rows_of_its_room(room: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {}
    for problem in problems_of(room):  # a tile that no heuristic takes, so that it is known again
        config[key_of(problem).identity()] = Config({name: 2**10 for name in problem.candidates[0].blocks})
        fields = ConfigFields(**config[key_of(problem).identity()].to_dict())
        default_store().add(
            key_of(problem), [Row(config=fields, label=MEASURED, time_us=1.0, written=datetime.now(UTC))]
        )
    choice.forget()
    found: dict[str, Config | None] = {}
    name = room.__name__.rpartition(".")[2]
    kernels = __import__(f"fastattn.kernels.{name}", fromlist=["_"])
    real = choice.lookup

    def spy(
        kernel: str, device: torch.device, dtype: torch.dtype, shape: Mapping[str, int], flags: Mapping[str, Any]
    ) -> Config | None:
        key = choice.explain(kernel, device, dtype, shape, flags).key
        answer = real(kernel, device, dtype, shape, flags)
        if key is not None:
            found[key.identity()] = answer
        return answer

    def only_asked(key: Any, tensors: Any, launches: Callable[[], Iterator[Any]], *, made: int = 0) -> None:
        list(launches())
        for tensor in list(tensors.values())[len(tensors) - made :]:
            tensor.zero_()

    ops = [block_attention, centroid_attention, cluster_attention, hash_argmax, hash_bits, hamming_kmeans]
    for op in (*ops, linear_attention, linear_attention_step, smyrf_hash, topk_attention):
        monkeypatch.setattr(op, "lookup", spy)
    monkeypatch.setattr(kernels, "run_planned", only_asked)
    calls()[name]()
    assert {key: found.get(key) for key in config} == config


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda:90", "hip:gfx942"])
def test_candidates_begin_with_the_heuristic_and_repeat_nothing(kernel: str, device_type: str) -> None:
    room = rooms.room_of(kernel)
    for flags in room.flags(kernel):
        for sizes in room.representative(64):
            found = room.candidates(kernel, device_type, sizes, 2, flags)
            assert len(found) == len(set(found)) > 1
            for config in (found[0], found[-1]):
                launch = room.example(kernel, sizes, torch.float16, device_type, config, flags)
                assert launch.config == config
                assert launch.grid[0] >= 1
                cost = room.cost(kernel, sizes, 2, config, flags)
                assert cost.steps > 0 and cost.bytes > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_example_for_an_amd_gpu_asks_for_tf32(kernel: str) -> None:
    room = rooms.room_of(kernel)
    sizes = room.representative(64)[0]
    config = room.candidates(kernel, "hip:gfx90a", sizes, 2, {})[0]
    assert room.example(kernel, sizes, torch.float16, "hip:gfx90a", config).args.get("PRECISION", "ieee") == "ieee"


def test_blocks_of_a_cluster_are_tried_where_there_are_clusters() -> None:
    room = rooms.room_of("block_attention_forward")
    ctas = {
        target: {config.num_ctas for config in room.candidates("block_attention_forward", target, room.Sizes(), 2)}
        for target in ("cpu", "cuda:89", "cuda:90", "cuda:100", "hip:gfx942")
    }
    assert ctas == {"cpu": {1}, "cuda:89": {1}, "cuda:90": {1, 2}, "cuda:100": {1, 2}, "hip:gfx942": {1}}


def test_candidates_are_sorted_by_doublings_and_fit_the_sizes() -> None:
    space = TuningSpace({"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64)})
    found = candidates_of(space, Config({"BLOCK_M": 32, "BLOCK_N": 32}), "cpu", {"BLOCK_M": 100, "BLOCK_N": 20})
    tiles = [tuple(config.blocks.values()) for config in found]
    assert tiles == [(32, 32), (16, 32), (32, 16), (64, 32), (16, 16), (64, 16)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_that_make_no_sense_are_refused_by_name(kernel: str) -> None:
    room = rooms.room_of(kernel)
    for field in room.Sizes.__dataclass_fields__:
        with pytest.raises(ValueError, match=f"^{field} must"):
            room.Sizes(**{field: 0})


def test_kernels_are_found_by_the_start_of_their_names() -> None:
    assert rooms.kernel_names("linear_attention_st") == ["linear_attention_states", "linear_attention_step"]
    assert rooms.kernel_names("all") == KERNELS
    assert len(KERNELS) == len(set(KERNELS)) == 25
    for start in ("", "attention", "block_attention_own_key"):
        with pytest.raises(ValueError, match="kernel must be all, one of block_attention_forward, "):
            rooms.kernel_names(start)
    with pytest.raises(ValueError, match="got 'nothing'"):
        rooms.room_of("nothing")


def test_deviation_is_relative_to_the_largest_value() -> None:
    inf, nan = float("inf"), float("nan")
    truth = torch.tensor([100.0, 1.0, -inf], dtype=torch.float64)
    assert deviation(torch.tensor([100.0, 2.0, -inf]), truth) == pytest.approx(0.01)
    assert deviation(torch.tensor([100.0, 1.0, 0.0]), truth) == inf
    assert deviation(torch.tensor([100.0, nan, -inf]), truth) == inf
    assert deviation(torch.tensor([100.0, inf, -inf]), truth) == inf
