"""The one door to a device: what kind of argument a value is, and who runs a launch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config, cdiv, next_power_of_2
from fastattn.kernels.cpu.build import find_compiler
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch, argument_type, dot_precision, run, signature


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


@pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
def test_every_kind_of_argument_arrives():
    x = torch.arange(8.0)
    run([launch(x), launch(x, flag=False, n=2)])
    assert torch.equal(x, torch.tensor([102.0, 103, 103, 104, 105, 5, 6, 7]))


def test_nothing_to_launch_is_nothing_to_do():
    run([])


def test_a_device_without_a_back_end_is_named():
    with pytest.raises(Unsupported, match="meta"):
        run([launch(torch.zeros(8, device="meta"))])


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
