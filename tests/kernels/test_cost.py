"""What kernels cost: useful work as a function of shapes, and what the tiles of a configuration make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from fastattn.kernels import (
    block_attention,
    centroid_attention,
    cluster_attention,
    hamming,
    hash_argmax,
    linear_attention,
    linear_attention_step,
    smyrf_hash,
    topk_attention,
)
from fastattn.kernels.config import Config, Cost

COUNTS = {"batch": 2, "heads": 3}
DIMS = {"head_dim": 40, "value_dim": 24}
# odd sizes, so that every kind of tile is cut somewhere
SIZES: dict[Any, dict[str, Any]] = {
    block_attention: {"rounds": 2, "n_blocks": 5, "c_q": 50, "c_k": 70, **DIMS},
    hash_argmax: {"length": 333, "rounds": 4, "head_dim": 40, "columns": 20},
    smyrf_hash: {"length": 333, "rounds": 20, "head_dim": 40},
    hamming: {"length": 3333, "n_clusters": 90, "head_dim": 40},
    cluster_attention: {"length": 3333, "n_clusters": 90, "dim": 40},
    topk_attention: {"n_queries": 3333, "n_clusters": 10, "top_k": 40, **DIMS},
    centroid_attention: {"n_queries": 90, "n_keys": 3333, "top_k": 32, **DIMS},
    linear_attention: {"length": 333, "features": 40, "value_dim": 24, "is_causal": True},
    linear_attention_step: {"features": 40, "value_dim": 24},
}
CASES = [(room, kernel) for room in SIZES for kernel in room.TUNING]


def costs(room: Any, kernel: str, **more: Any) -> Iterator[tuple[Config, Cost]]:
    for config in room.TUNING[kernel].configs("cpu"):
        yield config, room.cost(kernel, **COUNTS, **SIZES[room], config=config, **more)


@pytest.mark.parametrize(("room", "kernel"), CASES, ids=[kernel for _, kernel in CASES])
def test_tiles_do_at_least_the_useful_work(room: Any, kernel: str) -> None:
    plain = room.cost(kernel, **COUNTS, **SIZES[room])
    assert plain.tile_flops == plain.loaded == plain.steps == 0
    assert plain.flops > 0 or kernel in ("cluster_attention_broadcast", "smyrf_hash_lift")
    for config, cost in costs(room, kernel):
        assert cost.tile_flops >= cost.flops, config
        assert cost.tile_exps >= cost.exps, config
        assert cost.loaded >= cost.bytes * 0.999, config
        assert cost.steps >= 1 and cost.operands >= 0
        if "SCATTER" not in config.blocks and "POPCOUNT" not in config.blocks and not cost_depends_on_chunk(kernel):
            assert (cost.flops, cost.bytes, cost.exps) == (plain.flops, plain.bytes, plain.exps)


def cost_depends_on_chunk(kernel: str) -> bool:
    """Causal linear attention's chunks are its tiles."""
    return kernel in ("linear_attention_outputs", "linear_attention_gradients")


@pytest.mark.parametrize(("room", "kernel"), CASES, ids=[kernel for _, kernel in CASES])
def test_half_the_bytes_of_an_element_are_never_more_traffic(room: Any, kernel: str) -> None:
    for (config, wide), (_, narrow) in zip(costs(room, kernel), costs(room, kernel, element_size=2), strict=True):
        assert narrow.loaded <= wide.loaded, config
        assert narrow.bytes <= wide.bytes and narrow.tile_flops == wide.tile_flops, config


@pytest.mark.parametrize("room", SIZES, ids=lambda room: room.__name__.rsplit(".", 1)[-1])
def test_an_unknown_kernel_is_refused(room: Any) -> None:
    with pytest.raises(ValueError, match="kernel must be one of"):
        room.cost("softmax", **COUNTS, **SIZES[room])


# one program of one tile, counted by hand: [32, 16] queries, [64, 16] keys and values, fp32
ONE_BLOCK = {"batch": 1, "heads": 1, "rounds": 1, "n_blocks": 1, "c_q": 32, "c_k": 64, "head_dim": 16, "value_dim": 16}


def block(kernel: str, m: int, n: int, **more: int) -> Cost:
    config = Config({"BLOCK_M": m, "BLOCK_N": n})
    return block_attention.cost(f"block_attention_{kernel}", **(ONE_BLOCK | more), config=config)


def test_block_attention_in_one_tile_is_as_counted_by_hand() -> None:
    cost = block("forward", 32, 64)
    assert cost.tile_flops == cost.flops == 2 * 32 * 64 * (16 + 16)
    assert cost.tile_exps == cost.exps == 32 * 64
    assert cost.steps == cost.launches == 1
    q, k, v, out, lse, index = 32 * 16, 64 * 16, 64 * 16, 32 * 16, 32, 32 + 64
    assert cost.loaded == cost.bytes == 4 * (q + k + v + 2 * out + 2 * lse + index)
    # q k^T reads q and k, p v reads p and v
    assert cost.operands == (32 + 64) * 16 + (32 + 16) * 64
    assert cost.results == 32 * 64 + 32 * 16


def test_half_a_tile_of_queries_loads_the_keys_twice() -> None:
    whole, halves = block("forward", 32, 64), block("forward", 16, 64)
    assert halves.tile_flops == whole.tile_flops
    assert halves.steps == 2
    assert halves.loaded - whole.loaded == 64 * (4 * 32 + 4)


def test_tiles_beyond_a_block_are_work_for_nothing() -> None:
    cost = block("forward", 128, 64)
    assert cost.tile_flops == 4 * cost.flops
    assert cost.loaded == cost.bytes  # masked rows are not read


def test_the_gradient_of_keys_keeps_keys_and_loads_queries_again() -> None:
    cost = block("backward_dkv", 16, 32)
    assert cost.steps == 2 * 2
    q_rows = 32 * 4 * (16 + 16 + 1 + 1 + 1)  # q, dout, index, lse, delta
    assert cost.loaded - cost.bytes == q_rows


def test_neighbours_are_passed_by_but_read_from_memory_once() -> None:
    alone, three = block("forward", 32, 64), block("forward", 32, 64, neighbours=3)
    assert (three.flops, three.tile_flops, three.steps) == (3 * alone.flops, 3 * alone.tile_flops, 3)
    assert three.bytes == alone.bytes
    assert three.loaded > alone.loaded


def test_a_list_of_several_tiles_passes_twice_for_the_gradient_of_queries() -> None:
    sizes = {"batch": 1, "heads": 1, "n_queries": 64, "n_clusters": 1, "top_k": 64, "head_dim": 16, "value_dim": 16}
    kernel = "topk_attention_backward_dq"
    one, two = (
        topk_attention.cost(kernel, **sizes, config=Config({"BLOCK_M": 64, "BLOCK_N": n})) for n in (64, 32)
    )  # fmt: skip
    # one tile and a half, since the last one of a cluster is half full in the mean
    assert one.tile_flops == 1.5 * one.flops == 1.5 * 2 * 64 * 64 * 48
    assert two.tile_flops == 1.5 * 2 * 64 * 64 * (48 + 32)
    assert (one.steps, two.steps) == (1.5, 6)


def test_parts_of_keys_are_cut_into_tiles_one_by_one() -> None:
    sizes = {"batch": 1, "heads": 1, "n_queries": 16, "n_keys": centroid_attention.PART + 1, "top_k": 1, **DIMS}
    config = Config({"BLOCK_M": 16, "BLOCK_N": 128})
    cost = centroid_attention.cost("centroid_attention_forward", **sizes, config=config)
    assert cost.steps == centroid_attention.PART // 128 + 1


def test_a_causal_chunk_of_linear_attention_is_a_tile() -> None:
    sizes = {"batch": 1, "heads": 1, "length": 256, "features": 64, "value_dim": 64, "is_causal": True}
    config = Config({"BLOCK_M": 128, "BLOCK_F": 64, "BLOCK_DV": 64})
    cost = linear_attention.cost("linear_attention_outputs", **sizes, config=config)
    # two tiles: features with the state, features with features, weights with values
    assert cost.tile_flops == 2 * 2 * (128 * 64 * 64 + 128 * 128 * 64 + 128 * 64 * 128)
    assert cost.flops == cost.tile_flops
    assert cost.steps == 2


def test_rows_that_are_added_one_by_one_are_a_step_each() -> None:
    config = Config({"BLOCK_N": 16, "BLOCK_C": 16, "SCATTER": 1})
    cost = cluster_attention.cost(
        "cluster_attention_sums", batch=1, heads=1, length=1024, n_clusters=10, dim=64, config=config
    )
    assert cost.steps == 1024 + 11  # and the sums are set to 0


def test_codes_are_compared_by_counting_bits_or_by_products_of_signs() -> None:
    sizes = {"batch": 1, "heads": 1, "length": 64, "n_clusters": 64}
    make: Callable[[int], Cost] = lambda popcount: hamming.cost(  # noqa: E731
        "hamming_assign", **sizes, config=Config({"BLOCK_N": 64, "BLOCK_C": 64, "POPCOUNT": popcount})
    )
    assert (make(1).rate, make(0).rate) == ("popcount", "int8")
    assert make(1).tile_flops == make(0).tile_flops == 2 * 64 * 64 * 64
    assert make(1).pointwise < make(0).pointwise
