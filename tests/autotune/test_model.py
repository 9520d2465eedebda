"""The time model: what each term is, and how more of anything moves the time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune.block_attention import Sizes, cost, example
from fastattn.autotune.cpu_rates import Rates
from fastattn.autotune.device import DeviceName
from fastattn.autotune.devices import cpu_device, device_named, devices
from fastattn.autotune.model import Modelled, modelled_time
from fastattn.kernels.config import Config, Cost

H100, A100, MI300X = (device_named(name) for name in ("h100", "a100", "mi300x"))
CPU = cpu_device(Rates(1e11, 2e11, 1e10), DeviceName("x86_64", "Some CPU", 2))
TILES = {"BLOCK_M": 64, "BLOCK_N": 64}
CONFIG = Config(TILES, num_warps=4, num_stages=2)
# a gigaflop of products in a thousand programs of ten steps
COST = Cost(
    flops=1e9, bytes=1e6, exps=1e6, tile_flops=1e9, tile_exps=1e6, pointwise=8e6, dots=2e4, operands=1e7, results=8e7,
    loaded=4e6, steps=1e4,
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Of a binary."""

    registers: int | None = 64
    spill_bytes: int | None = 0
    shared_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=lambda: {"FFMA": 8})
    tensor_core_instructions: dict[str, int] = field(default_factory=lambda: {"HGMMA": 8})


def model(**changes: Any) -> Modelled:
    given: dict[str, Any] = {"device": A100, "cost": COST, "dtype": "float16", "programs": 1000, "config": CONFIG}
    return modelled_time(**(given | changes))


def test_terms_are_work_over_rates() -> None:
    terms = model().terms
    assert terms["products"] == pytest.approx(1e9 / 312e12 * 1e6)
    assert terms["operands"] == pytest.approx(1e7 * 2 / A100.tile_bandwidth * 1e6)
    assert terms["exps"] == pytest.approx(1e6 / A100.exps * 1e6)
    assert terms["memory"] == pytest.approx(1e6 / 2039e9 * 1e6)
    assert terms["cache"] == pytest.approx(4e6 / A100.cached_bandwidth * 1e6)
    blocks = A100.threads_per_sm // 128
    assert terms["steps"] == pytest.approx(1e4 / (108 * blocks) * A100.step_us / 2)
    assert terms["start"] == pytest.approx(1e3 / (108 * blocks) * A100.program_us)
    assert terms["launch"] == A100.launch_us


BUSY = ("products", "operands", "exps", "pointwise", "memory", "cache", "start", "steps")


def test_the_time_lies_between_the_longest_term_and_their_sum() -> None:
    for device in devices().values():
        found = model(device=device, programs=100 * device.sms * device.threads_per_sm)  # full waves
        busy = [float(found.terms[name]) for name in BUSY]
        assert max(busy) <= found.time_us - device.launch_us <= sum(busy) * 1.0001, device.name


def test_on_a_cpu_terms_add_up() -> None:
    found = model(device=CPU, dtype="float32")
    busy = [float(found.terms[name]) for name in (*BUSY, "spills")]
    assert found.time_us == pytest.approx(CPU.launch_us + sum(busy))
    assert (found.terms["blocks_per_sm"], found.terms["tail"]) == (1, 1)


def test_launches_are_equal_and_one_after_the_other() -> None:
    one, four = model(), model(cost=replace(COST, launches=4), programs=250)
    assert four.terms["products"] == one.terms["products"]
    assert four.terms["launch"] == 4 * A100.launch_us
    assert four.time_us > one.time_us


def test_cores_with_nothing_left_to_do_wait_for_the_others() -> None:
    even, odd = model(device=CPU, programs=2), model(device=CPU, programs=3)
    assert odd.time_us - CPU.launch_us == pytest.approx(4 / 3 * (even.time_us - CPU.launch_us), rel=0.01)
    assert float(odd.terms["tail"]) == pytest.approx(4 / 3, rel=0.01)


def test_a_last_wave_is_shorter_than_a_full_one_but_longer_than_its_share() -> None:
    blocks = Figures(registers=255)  # two programs on a multiprocessor
    slots = 2 * 108
    per_program = {name: value / 1000 for name, value in vars(COST).items() if name not in ("launches", "rate")}

    def time_of(programs: int) -> float:
        cost = Cost(**{name: programs * value for name, value in per_program.items()})
        return model(cost=cost, programs=programs, binary=blocks).time_us - A100.launch_us

    one, two = time_of(slots), time_of(2 * slots)
    assert two == pytest.approx(2 * one)
    assert 1.4 * one < time_of(slots + 1) <= two


@pytest.mark.parametrize("name", ["tile_flops", "tile_exps", "pointwise", "operands", "bytes", "loaded", "steps"])
@pytest.mark.parametrize("device", [A100, H100, MI300X, CPU], ids=lambda device: device.name)
def test_more_work_never_takes_less_time(device: Any, name: str) -> None:
    more = replace(COST, **{name: 100 * getattr(COST, name)})
    assert model(device=device, cost=more).time_us > model(device=device).time_us


def test_occupancy_hides_what_is_beside_the_longest_term() -> None:
    few, many = (model(binary=Figures(registers=n)) for n in (255, 64))
    assert (few.terms["blocks_per_sm"], many.terms["blocks_per_sm"]) == (2, 8)
    assert few.terms["limit"] == "registers"
    assert many.time_us < few.time_us


def test_a_launch_too_small_for_full_waves_uses_every_multiprocessor() -> None:
    assert model(programs=432).terms["waves"] == pytest.approx(432 / (16 * 108))
    few = model(programs=432)  # four on each, for whose units it is as good as 16
    assert few.time_us - A100.launch_us < 2 * sum(float(few.terms[name]) for name in BUSY[:6])


def test_spills_are_paid_for_in_every_step() -> None:
    plain, spilling = model(binary=Figures()), model(binary=Figures(spill_bytes=64))
    assert plain.terms["spills"] == 0
    assert float(spilling.terms["spills"]) == pytest.approx(2 * 64 * 128 * 1e4 / A100.spill_bandwidth * 1e6)
    assert spilling.time_us > plain.time_us


def test_stages_hide_the_wait_for_a_tile() -> None:
    one, three = (model(config=Config(TILES, num_stages=n)) for n in (1, 3))
    assert float(one.terms["steps"]) == pytest.approx(3 * float(three.terms["steps"]))


def test_what_a_device_cannot_run_takes_for_ever() -> None:
    found = model(binary=Figures(shared_bytes=164 * 1024))
    assert math.isinf(found.time_us)
    assert found.terms == {"blocks_per_sm": 0, "limit": "shared memory"}


def test_warps_that_share_a_small_tile_are_idle() -> None:
    def products(warps: int, results: float, device: Any = A100) -> float:
        config, cost = Config({"BLOCK_M": 16}, num_warps=warps), replace(COST, results=results)
        return float(model(config=config, cost=cost, device=device).terms["products"])

    assert products(4, 2e4 * 64 * 64) == products(8, 2e4 * 64 * 64)
    assert products(4, 2e4 * 16 * 16) == pytest.approx(4 * products(1, 2e4 * 16 * 16))
    # plain ALUs do not mind
    fp32 = [modelled_time(A100, COST, "float32", 1000, Config(TILES, num_warps=n)).terms["products"] for n in (1, 8)]
    assert fp32[0] == fp32[1]


def test_hopper_reaches_its_rate_with_instructions_of_four_warps_alone() -> None:
    slow, fast = (
        float(model(device=H100, binary=Figures(tensor_core_instructions={name: 8})).terms["products"])
        for name in ("HMMA", "HGMMA")
    )
    assert slow == pytest.approx(fast / 0.62)
    assert model(device=H100).terms["products"] == fast  # as far as can be told from tiles
    small = Config({"BLOCK_M": 32, "BLOCK_N": 32})
    assert model(device=H100, config=small).terms["products"] == pytest.approx(slow)


def test_a_binary_without_tensor_core_instructions_runs_on_plain_alus() -> None:
    binary = Figures(tensor_core_instructions={})
    assert model(binary=binary).terms["products"] == pytest.approx(1e9 / A100.rate("float32") * 1e6)
    assert model(binary=Figures(instructions={}, tensor_core_instructions={})) == model(binary=Figures())  # not known


def test_the_blocks_of_a_cluster_wait_for_one_another_in_every_step() -> None:
    alone, together = (model(device=H100, config=replace(CONFIG, num_ctas=n)).terms for n in (1, 2))
    assert "clusters" not in alone
    assert float(together["clusters"]) > 0


def test_integers_and_exact_products_have_rates_of_their_own() -> None:
    def products(rate: str | None, dtype: str = "float16") -> float:
        return float(model(cost=replace(COST, rate=rate, dots=0, operands=0), dtype=dtype).terms["products"])

    assert products("int8") == pytest.approx(products(None) / 2)
    assert products("tf32x3") == pytest.approx(6 * products(None))
    assert products("float32") == products(None, "float32") == pytest.approx(16 * products(None))


def test_tiles_beyond_the_first_cache_of_a_core_are_farther_away() -> None:
    assert CPU.l1_bytes is not None
    near, far = (model(device=CPU, cost=replace(COST, held=n * CPU.l1_bytes)) for n in (0.25, 2))
    assert near.terms["spills"] == 0
    assert float(far.terms["spills"]) == pytest.approx(1e4 * 1.75 * CPU.l1_bytes / CPU.spill_bandwidth * 1e6)


def test_costs_without_a_configuration_are_refused() -> None:
    with pytest.raises(ValueError, match="configuration"):
        model(cost=Cost(1, 1, 1))
    with pytest.raises(ValueError, match="programs must be at least 1"):
        model(programs=0)


@pytest.mark.parametrize("name", ["h100", "a100", "l4", "rtx4090", "mi300x"])
def test_on_gpus_middling_tiles_beat_the_smallest(name: str) -> None:
    """Without a binary: what the offline tuner has to choose its compiles by."""
    sizes, device = Sizes(length=65536, cluster_size=128), device_named(name)

    def time_of(m: int, n: int) -> float:
        config = Config({"BLOCK_M": m, "BLOCK_N": n})
        kernel = "block_attention_forward"
        grid = example(kernel, sizes, torch.float16, device.kind, config).grid
        return modelled_time(device, cost(kernel, sizes, 2, config), "float16", math.prod(grid), config).time_us

    assert time_of(64, 64) < time_of(16, 16)
