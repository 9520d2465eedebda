"""The one door to a device: what kind of argument a value is, who runs a launch, and what is kept between calls."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import CFUNCTYPE, c_uint, c_void_p, cast
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.block_attention import forward
from fastattn.kernels.config import Config, cdiv, next_power_of_2
from fastattn.kernels.cpu import build, engine
from fastattn.kernels.cpu.build import find_compiler
from fastattn.kernels.errors import Unsupported, UnsupportedNow
from fastattn.kernels.launch import Launch, argument_type, dot_precision, run, run_planned, signature

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")


@triton.jit
def add_kernel(x, n, large, factor, flag, BLOCK: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) + factor * (large // 4294967296)
    if flag:
        value += 100.0
    tl.store(x + i, value, mask=i < n)


def launch(x, **changes):
    args = {"x": x, "n": 5, "large": 2**33, "factor": 0.5, "flag": True, "KIND": "plain"} | changes
    return Launch(add_kernel, (1,), args, Config({"BLOCK": 16}))


def test_a_signature_is_in_the_kernels_order_with_constants_apart():
    types, constants = signature(launch(torch.zeros(8)))
    assert list(types) == ["x", "n", "large", "factor", "flag", "BLOCK", "KIND"]
    assert list(types.values()) == ["*fp32", "i32", "i64", "fp32", "i1", "constexpr", "constexpr"]
    assert constants == {"BLOCK": 16, "KIND": "plain"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "i32"), (-(2**31), "i32"), (2**31 - 1, "i32"), (2**31, "i64"), (True, "i1"), (1.0, "fp32")]
    + [(torch.zeros(1, dtype=dtype), name) for dtype, name in [(torch.bfloat16, "*bf16"), (torch.int64, "*i64")]],
    ids=str,
)
def test_types_are_named_as_triton_names_them(value, expected):
    assert argument_type(value) == expected


def test_what_is_no_argument_is_refused():
    with pytest.raises(TypeError, match="got str"):
        argument_type("text")


@needs_compiler
def test_every_kind_of_argument_arrives():
    x = torch.arange(8.0)
    run([launch(x), launch(x, flag=False, n=2)])
    assert torch.equal(x, torch.tensor([102.0, 103, 103, 104, 105, 5, 6, 7]))


def test_nothing_to_launch_is_nothing_to_do():
    run([])


def test_a_device_without_a_back_end_is_named():
    x = torch.zeros(8, device="meta")
    with pytest.raises(Unsupported, match="meta"):
        run([launch(x)])
    with pytest.raises(Unsupported, match="meta"):
        run_planned("key", {"x": x}, lambda: [launch(x)])


def test_fp32_products_are_exact_unless_torch_was_told_otherwise():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == ("ieee" if torch.version.hip else "tf32")
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 1000])
def test_the_arithmetic_of_sizes_is_tritons(n):
    assert next_power_of_2(n) == triton.next_power_of_2(n)
    assert cdiv(n, 16) == triton.cdiv(n, 16)


@triton.jit
def gather_kernel(x, rows_ptr, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    rows = tl.load(rows_ptr + i, mask=i < n, other=-1)
    value = tl.load(x + rows, mask=rows >= 0, other=0.0)
    tl.store(y + i, tl.load(y + i, mask=i < n) * 2.0 + value, mask=i < n)


def gathers(x, rows, y, rounds=1):
    args = {"x": x, "rows_ptr": rows, "y": y, "n": len(rows)}
    return [Launch(gather_kernel, (1,), args, Config({"BLOCK": 16}), {"rows_ptr": len(x)})] * rounds


def gather_again(x, rows, y, rounds=1, key=()):
    """Whether the launches were asked for."""
    asked = []

    def launches():
        asked.append(True)
        return gathers(x, rows, y, rounds)

    run_planned((rounds, *key), {"x": x, "rows": rows, "y": y}, launches)
    return bool(asked)


@pytest.fixture
def fresh():
    """An engine that remembers nothing; what is on disk stays."""
    engine.forget()
    yield
    engine.forget()


@needs_compiler
@pytest.mark.usefixtures("fresh")
class TestPlans:
    def test_other_tensors_of_the_same_layout_need_no_second_plan(self):
        for seed in range(3):
            torch.manual_seed(seed)
            x, y, rows = torch.randperm(9).float(), torch.zeros(6), torch.randint(0, 9, (6,), dtype=torch.int32)
            assert gather_again(x, rows, y, rounds=3) == (seed == 0)
            assert torch.equal(y, x[rows.long()] * 7)  # each round doubles what the one before left

    def test_a_tensor_with_two_names_does_not_bind_them_for_later_calls(self):
        x, rows = torch.ones(6), torch.arange(6, dtype=torch.int32)
        gather_again(x, rows, x)
        assert torch.equal(x, torch.full((6,), 3.0))
        x, y = torch.arange(6.0), torch.zeros(6)
        assert not gather_again(x, rows.flip(0), y)
        assert torch.equal(y, x.flip(0)) and torch.equal(x, torch.arange(6.0))

    @pytest.mark.parametrize(
        "change",
        [
            {"x": torch.ones(10)},
            {"x": torch.ones(18)[::2]},
            {"x": torch.ones(9, dtype=torch.int32)},
            {"y": torch.zeros(7)},
            {"rows": torch.zeros(5, dtype=torch.int32)},
            {"key": ("another",)},
        ],
        ids=["length", "stride", "dtype", "other tensor", "index", "key"],
    )
    def test_whatever_changes_types_or_values_has_a_plan_of_its_own(self, change):
        same = {"x": torch.ones(9), "rows": torch.zeros(6, dtype=torch.int32), "y": torch.zeros(6)}
        gather_again(**same)
        assert not gather_again(**same)
        assert gather_again(**(same | change))

    def test_a_plan_does_not_outlive_what_it_was_built_from(self):
        tensors = (torch.ones(9), torch.zeros(6, dtype=torch.int32), torch.zeros(6))
        gather_again(*tensors)
        engine.forget()
        assert gather_again(*tensors)

    def test_a_plan_made_while_the_engine_forgets_is_not_kept(self):
        tensors = {"x": torch.ones(9), "rows": torch.zeros(6, dtype=torch.int32), "y": torch.zeros(6)}

        def launches():
            engine.forget()
            return gathers(*tensors.values())

        run_planned((1,), tensors, launches)
        assert gather_again(*tensors.values())

    def test_plans_are_bounded_and_the_oldest_goes(self, monkeypatch):
        monkeypatch.setattr(engine, "_MOST_PLANS", 3)
        rows, y = torch.zeros(6, dtype=torch.int32), torch.zeros(6)
        assert [gather_again(torch.ones(n), rows, y) for n in (4, 5, 6, 7, 6, 5, 4)] == [True] * 4 + [False] * 2 + [
            True
        ]

    def test_no_tensor_is_kept_alive(self):
        x, rows, y = torch.ones(9), torch.zeros(6, dtype=torch.int32), torch.zeros(6)
        gather_again(x, rows, y)
        kept = [weakref.ref(tensor) for tensor in (x, rows, y)]
        del x, rows, y
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3

    def test_many_threads_may_use_one_plan(self):
        def use(seed: int) -> bool:
            x = torch.full((9,), float(seed))
            rows, y = torch.zeros(6, dtype=torch.int32), torch.zeros(6)
            for _ in range(200):
                gather_again(x, rows, y.zero_(), rounds=2)
            return torch.equal(y, torch.full((6,), 3.0 * seed))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(use, range(8)))

    def test_a_tensor_that_has_no_name_is_refused(self):
        x, rows, y = torch.ones(9), torch.zeros(6, dtype=torch.int32), torch.zeros(6)
        with pytest.raises(ValueError, match="argument y"):
            run_planned((), {"x": x, "rows": rows, "y": y.clone()}, lambda: gathers(x, rows, y))


@needs_compiler
class TestRows:
    @pytest.mark.parametrize("bad", [9, -2, 2**31 - 1, -(2**31)])
    @pytest.mark.parametrize("planned", [False, True])
    def test_a_row_out_of_range_is_refused_before_anything_runs(self, bad, planned):
        x, y = torch.ones(9), torch.zeros(100_000)
        rows = torch.zeros(100_000, dtype=torch.int32)
        rows[77_777] = bad
        with pytest.raises(ValueError, match=rf"rows must hold -1 or rows below 9, got values from {min(bad, 0)} to"):
            gather_again(x, rows, y) if planned else run(gathers(x, rows, y))
        assert (y == 0).all()

    def test_rows_in_range_pass_up_to_the_last_and_down_to_minus_1(self):
        y = torch.zeros(3)
        run(gathers(torch.arange(9.0), torch.tensor([8, -1, 0], dtype=torch.int32), y))
        assert torch.equal(y, torch.tensor([8.0, 0, 0]))

    def test_each_name_is_checked_also_where_a_plan_was_made_with_one_tensor_for_two(self):
        q, index = torch.randn(1, 1, 16, 16), torch.arange(16, dtype=torch.int32).view(1, 1, 1, 1, 16)
        forward(q, q, q, index, index, scale=1.0)
        wrong = index.clone()
        wrong[..., 3] = 16
        with pytest.raises(ValueError, match="k_index"):
            forward(q, q, q, index, wrong, scale=1.0)

    @pytest.mark.parametrize("rows", [torch.zeros(6, dtype=torch.int64), torch.zeros(12, dtype=torch.int32)[::2]])
    def test_what_the_check_cannot_read_is_refused(self, rows):
        with pytest.raises(TypeError, match=r"rows must be contiguous and torch\.int32"):
            run(gathers(torch.ones(9), rows, torch.zeros(6)))


@triton.jit
def shift_kernel(x, zeros, n, delay, BLOCK: tl.constexpr):
    """The later a program, the longer it takes, so that those of the next launch would overtake it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + (i + BLOCK) % n, mask=i < n) + 1.0
    for step in range(0, tl.program_id(0) * delay):
        value += tl.load(zeros + (step + tl.arange(0, BLOCK)) % BLOCK)
    tl.store(x + n + i, value, mask=i < n)


@triton.jit
def back_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + n + i, mask=i < n), mask=i < n)


@CFUNCTYPE(None, CFUNCTYPE(None, c_void_p), c_void_p, c_uint, c_uint)
def alone(body, data, threads, flags):
    """A thread pool that has no thread to give."""
    body(data)


POOLS = {
    "OpenMP": lambda driver: driver.parallel,
    "plain threads": lambda _: None,
    "none": lambda _: cast(alone, c_void_p).value,
}


@needs_compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_all_programs_of_a_launch_end_before_the_next_begins(threads, pool):
    driver = engine.driver()
    driver.parallel = POOLS[pool](driver)
    n, rounds = 16 * 61, 10
    x = torch.cat([torch.arange(float(n)), torch.zeros(n)])
    args = {"x": x, "zeros": torch.zeros(16), "n": n, "delay": 2000}
    pair = [Launch(kernel, (61,), args, Config({"BLOCK": 16})) for kernel in (shift_kernel, back_kernel)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        run(pair * rounds)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(x[:n], torch.arange(float(n)).roll(-16 * rounds) + rounds)


@needs_compiler
def test_a_grid_without_programs_runs_nothing_and_does_not_stop_the_next():
    x = torch.arange(8.0)
    run([replace(launch(x), grid=(0,)), launch(x, n=1), replace(launch(x), grid=(2, 0, 3))])
    assert torch.equal(x, torch.tensor([101.0, 1, 2, 3, 4, 5, 6, 7]))


@needs_compiler
def test_a_grid_beyond_32_bits_is_unsupported():
    with pytest.raises(Unsupported, match="2\\*\\*31 programs"):
        run([replace(launch(torch.zeros(8)), grid=(2**31,))])


@triton.jit
def scale_kernel(x, n, FACTOR: tl.constexpr):
    tl.store(x, n * FACTOR)


@needs_compiler
def test_constants_that_are_equal_but_of_two_types_have_kernels_of_their_own():
    n, results = 2**24 + 1, []
    for factor in (1, 1.0):
        x = torch.zeros(1, dtype=torch.int32)
        run([Launch(scale_kernel, (1,), {"x": x, "n": n, "FACTOR": factor}, Config())])
        results.append(x.item())
    assert results == [n, n - 1]  # a float has no room for the last bit


@triton.jit
def unknown_kernel(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


@needs_compiler
@pytest.mark.usefixtures("fresh")
class TestPrepare:
    def test_what_was_prepared_on_meta_tensors_is_not_built_again(self, monkeypatch):
        assert engine.prepare([launch(torch.zeros(8, device="meta"))]) == [None]
        monkeypatch.setattr(build, "load", None)
        x = torch.arange(8.0)
        run([launch(x)])
        assert x[0] == 101

    def test_reasons_stand_beside_the_launches_that_they_are_for(self):
        unknown = Launch(unknown_kernel, (1,), {"x": torch.zeros(16)}, Config({"BLOCK": 16}))
        first, second, third = engine.prepare([launch(torch.zeros(8)), unknown, launch(torch.zeros(8), flag=False)])
        assert first is None and third is None
        assert isinstance(second, Unsupported) and "atomic" in str(second)

    def test_nothing_is_run_where_one_launch_cannot_be(self):
        x = torch.zeros(16)
        unknown = Launch(unknown_kernel, (1,), {"x": x}, Config({"BLOCK": 16}))
        for _ in range(2):
            with pytest.raises(Unsupported, match="atomic"):
                run([launch(x), unknown])
        assert (x == 0).all()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("error", "times"), [(Unsupported, 1), (UnsupportedNow, 2)])
def test_only_trouble_that_lasts_is_remembered(monkeypatch, error, times):
    tried = []

    def load(recipe):
        tried.append(recipe.name)
        raise error("the moon is full")

    monkeypatch.setattr(build, "load", load)
    for _ in range(2):
        with pytest.raises(error, match="moon"):
            run([launch(torch.zeros(8))])
    assert tried.count("add_kernel") == times


@pytest.mark.usefixtures("fresh")
def test_a_reason_that_is_remembered_holds_no_tensors(monkeypatch):
    def load(recipe):
        raise Unsupported("the moon is full")

    monkeypatch.setattr(build, "load", load)
    x = torch.zeros(8)
    with suppress(Unsupported):
        run([launch(x)])
    kept = weakref.ref(x)
    del x
    assert kept() is None
