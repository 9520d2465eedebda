"""What block_attention has for Reformer and causal SMYRF: own keys, buckets, duplicates, a local round, dropout. The
kernel against the definition in fp64, and what must be so whatever runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.ops import block_attention as op
from fastattn.ops.block_attention import block_attention
from fastattn.reference import block_attention as reference
from tests.accuracy import assert_as_accurate
from tests.ops.cases import IMPLS, Case, cut_after, gradients, leaves, needs_compiler

# each combination of head dims, tiles and boolean options is a build of its own, so that tests share them
LONG = Case(
    batch=2, heads=4, kv_heads=2, n_queries=37, n_keys=37, head_dim=20, value_dim=12,
    rounds=3, n_blocks=3, c_q=15, c_k=13,
)  # fmt: skip
REFORMER = {"look_back": 1, "self_mode": "last_resort", "is_causal": True, "correct_duplicates": True, "key_mask": True}
SMYRF = {"self_mode": "once", "is_causal": True, "correct_duplicates": True, "local": True, "key_mask": True}
CASES = {
    "last resort, causal, look back": REFORMER | {"correct_duplicates": False},
    "last resort, causal, look back, duplicates, buckets, local": REFORMER | {"bucket": True, "local": True},
    "once, causal, duplicates, local, dropout": SMYRF | {"dropout_p": 0.4},
    "duplicates": {"correct_duplicates": True},
    "duplicates, look both ways": {"correct_duplicates": True, "look_back": 1, "look_ahead": 1},
    "duplicates, all blocks twice": {"correct_duplicates": True, "look_back": 11, "look_ahead": 8},
    "duplicates, buckets, look ahead, no wrap": {
        "correct_duplicates": True, "bucket": True, "look_ahead": 1, "wrap": False,
    },
    "dropout, look back": {"dropout_p": 0.4, "seed": 2**62 + 3, "look_back": 1},
    "some blocks used, look both ways": {"used": [2, 1], "look_back": 1, "look_ahead": 2},
    "some blocks used, last resort, causal, look back, duplicates, buckets, local": REFORMER
    | {"used": [2, 1], "look_back": 3, "bucket": True, "local": True},
}  # fmt: skip


def options_of(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the tensors that they name."""
    options = dict(options)
    if options.pop("local", False):
        options["local_index"] = replace(case, rounds=1, n_blocks=6, c_q=7, c_k=5).indices(4)
    if options.pop("bucket", False):
        g = torch.Generator().manual_seed(5)
        shape = (case.batch, case.heads, case.rounds)
        for name, length in (("q_bucket", case.n_queries), ("k_bucket", case.n_keys)):
            options[name] = torch.randint(2, (*shape, length), generator=g, dtype=torch.int32)
    if "used" in options:
        options["n_used_blocks"] = torch.tensor(options.pop("used"), dtype=torch.int32)
    if options.pop("key_mask", False):
        options["key_mask"] = torch.arange(case.n_keys).expand(case.batch, -1) % 5 != 0
    return options


def solve(attend: Any, dtype: torch.dtype, options: dict[str, Any], dout: Tensor, case: Case = LONG) -> list[Tensor]:
    """(out, lse, dq, dk, dv) on inputs that were made in dout's dtype."""
    inputs, indices, options = (
        leaves(*(x.to(dtype) for x in case.inputs(dout.dtype))),
        case.indices(),
        options_of(case, options),
    )
    if "n_used_blocks" in options:
        indices = [cut_after(index, options["n_used_blocks"]) for index in indices]
    out, lse = attend(*inputs, *indices, **options)
    return [out.detach(), lse.detach(), *gradients(out, inputs, dout)]


@needs_compiler
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_kernel_is_as_accurate_as_plain_pytorch(options: dict[str, Any]) -> None:
    dout = torch.randn(2, 4, 37, 12, generator=torch.Generator().manual_seed(3))
    actual = solve(block_attention, torch.float32, options | {"impl": "triton"}, dout)
    plain, exact = (solve(reference.block_attention, dtype, options, dout) for dtype in (torch.float32, torch.float64))
    empty = exact[1] == -math.inf
    assert torch.equal(actual[1] == -math.inf, empty)
    for name, *results in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        a, p, e = (x.masked_fill(empty, 0.0) for x in results) if name == "lse" else results
        assert_as_accurate(a, p, e, name)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"self_mode": "once", "dropout_p": 0.4}
    case = replace(LONG, rounds=1)
    dout = torch.randn(2, 4, 37, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = solve(block_attention, dtype, options | {"impl": "triton"}, dout, case)
    plain, exact = (solve(reference.block_attention, d, options, dout, case) for d in (dtype, torch.float64))
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        if name != "lse":
            assert_as_accurate(a, p, e, name)


def alone() -> tuple[Case, Tensor, Tensor, Tensor]:
    """One block of rows 0 .. 7 of which the odd keys are masked, and one of row 8 alone; row 9 is in no block."""
    case = replace(LONG, batch=1, n_queries=10, n_keys=10, rounds=1, n_blocks=2, c_q=8, c_k=8)
    index = torch.full((1, 4, 1, 2, 8), -1, dtype=torch.int32)
    index[..., 0, :], index[..., 1, 3] = torch.arange(8), 8
    key_mask = (torch.arange(10) % 2 == 0).unsqueeze(0)
    return case, index, index.clone(), key_mask


@pytest.mark.parametrize("impl", IMPLS)
class TestOwnKey:
    def test_as_last_resort_gives_its_value_and_sends_the_gradient_there_alone(self, impl: str) -> None:
        case, q_index, k_index, key_mask = alone()
        q, k, v = leaves(*case.inputs())
        options: dict[str, Any] = {"self_mode": "last_resort", "key_mask": key_mask, "scale": 0.3, "impl": impl}
        out, lse = block_attention(q, k, v, q_index, k_index, **options, is_causal=True)
        s = 0.3 * (q * k.repeat_interleave(2, 1)).sum(-1)
        values = v.repeat_interleave(2, 1)
        # row 0 has no key before it, row 8 no other in its block; 1's only key is 0
        for row in (0, 8):
            assert torch.equal(out[:, :, row], values[:, :, row])
            torch.testing.assert_close(lse[:, :, row], s[:, :, row], rtol=1e-6, atol=1e-6)
        assert torch.equal(out[:, :, 1], values[:, :, 0])
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        dq, dk, dv = gradients(out, (q, k, v), dout)
        assert not dq[:, :, [0, 8, 9]].any() and not dk[:, :, 8].any()
        torch.testing.assert_close(dv[:, :, 8], dout[:, :, 8].unflatten(1, (2, 2)).sum(2), rtol=1e-6, atol=1e-6)

    def test_that_equals_another_key_is_not_taken_for_it(self, impl: str) -> None:
        # row 1 meets row 0's key alone, which is its own in all but the place
        case, q_index, k_index, _ = alone()
        inputs = [x.detach() for x in case.inputs()]
        for x in inputs:
            x[:, :, 1] = x[:, :, 0]
        q, k, v = leaves(*inputs)
        out, _ = block_attention(q, k, v, q_index, k_index, self_mode="last_resort", is_causal=True, impl=impl)
        dout = torch.zeros_like(out)
        dout[:, :, 1] = 1.0
        _, _, dv = gradients(out, (q, k, v), dout)
        torch.testing.assert_close(dv[:, :, 0], torch.full_like(dv[:, :, 0], 2.0))  # of two heads
        assert not dv[:, :, 1].any()

    @pytest.mark.parametrize("self_mode", ["last_resort", "once"])
    def test_that_is_masked_or_of_a_row_in_no_block_is_none(self, self_mode: str, impl: str) -> None:
        case, q_index, k_index, key_mask = alone()
        key_mask[:, [0, 8]] = False
        q, k, v = case.inputs()
        for x in (q, k, v):
            x[:, :, 9] = math.nan
        k[:, :, [0, 8]], v[:, :, [0, 8]] = math.nan, math.nan
        inputs = leaves(q, k, v)
        options: dict[str, Any] = {"self_mode": self_mode, "key_mask": key_mask, "is_causal": True, "impl": impl}
        out, lse = block_attention(*inputs, q_index, k_index, **options)
        rows = torch.tensor([0, 1, 8, 9])
        assert not out[:, :, rows].any() and (lse[:, :, rows] == -math.inf).all()
        assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, 2]).all()
        dout = torch.ones_like(out)
        dout[:, :, 9] = math.nan
        dq, dk, dv = gradients(out, inputs, dout)
        assert not dq[:, :, rows].any() and not dk[:, :, rows].any() and not dv[:, :, rows].any()
        assert all(torch.isfinite(x).all() for x in (dq, dk, dv))

    def test_once_is_dense_attention_in_one_block_and_no_block_changes_that(self, impl: str) -> None:
        case = replace(LONG, batch=1, n_queries=16, n_keys=16)
        q, k, v = case.inputs()
        index = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 1, 16).expand(1, 4, 1, 1, 16)
        without = torch.where(torch.arange(16) == 5, -1, index)  # a row's own key need not be in its block
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        options: dict[str, Any] = {"self_mode": "once", "is_causal": True, "impl": impl}
        out, _ = block_attention(q, k, v, index, index, **options)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
        out, _ = block_attention(q, k, v, index, without, **options)
        torch.testing.assert_close(out[:, :, :6], dense[:, :, :6], rtol=1e-5, atol=1e-5)
        twice, _ = block_attention(q, k, v, index.expand(1, 4, 2, 1, 16), index.expand(1, 4, 2, 1, 16), **options)
        torch.testing.assert_close(twice[:, :, 0], dense[:, :, 0], rtol=0, atol=0)
        assert (twice - dense)[:, :, 2:].abs().max() > 0.01

    @pytest.mark.parametrize("options", [REFORMER, SMYRF], ids=["last resort", "once"])
    def test_leaves_no_gradient_to_the_future(self, options: dict[str, Any], impl: str) -> None:
        inputs = leaves(*LONG.inputs())
        out, _ = block_attention(*inputs, *LONG.indices(), **options_of(LONG, options), impl=impl)
        dout = torch.ones_like(out)
        dout[:, :, 20:] = 0
        assert not any(gradient[:, :, 20:].any() for gradient in gradients(out, inputs, dout))


@pytest.mark.parametrize("impl", IMPLS)
class TestCorrectedDuplicates:
    def test_make_two_equal_rounds_one(self, impl: str) -> None:
        case = replace(LONG, rounds=1)
        q_index, k_index = case.indices()
        once, lse = block_attention(*case.inputs(), q_index, k_index, impl=impl)
        three = (index.expand(-1, -1, 3, -1, -1) for index in (q_index, k_index))
        out, same = block_attention(*case.inputs(), *three, correct_duplicates=True, impl=impl)
        torch.testing.assert_close(out, once, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(same, lse, rtol=1e-6, atol=1e-6)

    def test_make_a_window_over_all_blocks_dense_attention(self, impl: str) -> None:
        options: dict[str, Any] = {"look_back": 6, "look_ahead": 2, "correct_duplicates": True, "impl": impl}
        out, _ = block_attention(*LONG.inputs(), *LONG.indices(), **options)
        dense = torch.nn.functional.scaled_dot_product_attention(*LONG.inputs(), enable_gqa=True)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)

    def test_change_nothing_where_there_is_none(self, impl: str) -> None:
        case = replace(LONG, rounds=1)
        plain = block_attention(*case.inputs(), *case.indices(), impl=impl)
        corrected = block_attention(*case.inputs(), *case.indices(), correct_duplicates=True, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(plain, corrected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
class TestUsedBlocks:
    CASE = replace(LONG, batch=1, heads=1, kv_heads=1, n_queries=26, n_keys=26, rounds=2, n_blocks=2, c_q=13, c_k=13)

    def padded(self, n_more: int) -> tuple[Tensor, Tensor]:
        q_index, k_index = (torch.nn.functional.pad(x, (0, 0, 0, n_more), value=-1) for x in self.CASE.indices())
        return q_index, k_index

    def test_are_all_there_is(self, impl: str) -> None:
        """To the last bit, however many others there are, forward and backward."""
        options: dict[str, Any] = {"look_back": 1, "look_ahead": 2}
        used = torch.tensor([2], dtype=torch.int32)
        results = []
        for n_more in (0, 1, 5):
            inputs = leaves(*self.CASE.inputs())
            out, lse = block_attention(*inputs, *self.padded(n_more), n_used_blocks=used, impl=impl, **options)
            results.append((out, lse, *gradients(out, inputs, torch.ones_like(out))))
        plain, ignorant = (
            reference.block_attention(*self.CASE.inputs(), *self.padded(n_more), **options)[0] for n_more in (0, 1)
        )
        torch.testing.assert_close(results[0][0], plain, rtol=1e-6, atol=1e-6)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        assert (ignorant - plain).abs().max() > 0.1

    @pytest.mark.parametrize("number", [0, 4, -1])
    def test_are_some_of_those_that_are(self, number: int, impl: str) -> None:
        used = torch.tensor([number], dtype=torch.int32)
        with pytest.raises(ValueError, match=r"^n_used_blocks must hold numbers from 1 to 3, got values from"):
            block_attention(*self.CASE.inputs(), *self.padded(1), n_used_blocks=used, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
class TestDropout:
    def test_with_probability_nought_is_none(self, impl: str) -> None:
        plain = block_attention(*LONG.inputs(), *LONG.indices(), impl=impl)
        seeded = block_attention(*LONG.inputs(), *LONG.indices(), dropout_p=0.0, seed=5, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(plain, seeded, strict=True))

    def test_leaves_lse_and_the_mean_over_seeds(self, impl: str) -> None:
        case = replace(LONG, batch=1, n_queries=16, n_keys=16, rounds=1)
        options: dict[str, Any] = {"dropout_p": 0.25, "impl": impl}
        plain, lse = block_attention(*case.inputs(), *case.indices(), impl=impl)
        drawn = [block_attention(*case.inputs(), *case.indices(), seed=seed, **options) for seed in range(64)]
        assert all(torch.equal(other, lse) for _, other in drawn)
        outs = torch.stack([out for out, _ in drawn])
        deviation = outs.std(0) / math.sqrt(len(drawn))
        assert (outs.mean(0) - plain).abs().max() < 6 * deviation.max()
        assert outs.std(0).amax(-1).min() > 0

    def test_takes_a_seed_as_a_number_or_as_a_tensor(self, impl: str) -> None:
        options: dict[str, Any] = {"dropout_p": 0.4, "look_back": 1, "impl": impl}
        seeds = (2**62 + 3, torch.tensor(2**62 + 3), 2**62 + 4)
        one, same, other = (block_attention(*LONG.inputs(), *LONG.indices(), seed=s, **options)[0] for s in seeds)
        assert torch.equal(one, same) and not torch.equal(one, other)


@needs_compiler
def test_dropout_does_not_depend_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 9, "look_back": 1, "impl": "triton"}
    case = replace(LONG, rounds=1, c_q=20, c_k=20)
    results = []
    for tile in (16, 32):
        monkeypatch.setattr(op, "lookup", lambda *_, tile=tile: Config({"BLOCK_M": tile, "BLOCK_N": 48 - tile}))
        monkeypatch.setattr(op, "stamp", lambda tile=tile: tile)
        results.append(solve(block_attention, torch.float32, options, torch.ones(2, 4, 37, 12), case))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_each_set_of_options_is_tuned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def lookup(kernel: str, device: torch.device, dtype: torch.dtype, shape: Any, flags: Any) -> None:
        asked.append({name: value for name, value in flags.items() if value})

    def flags_of(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        asked.clear()
        block_attention(*LONG.inputs(), *LONG.indices(), **options_of(LONG, options), impl="triton")
        yield from asked

    monkeypatch.setattr(op, "lookup", lookup)
    monkeypatch.setattr(op, "stamp", lambda: "of this test")
    assert list(flags_of({})) == [{"wrap": True}]
    seen = [flags for options in CASES.values() for flags in flags_of(options)]
    assert len(seen) == len(CASES)  # kernels of own keys are not tuned
    assert len({tuple(flags.items()) for flags in seen}) == len(CASES)
