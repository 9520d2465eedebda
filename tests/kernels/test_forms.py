"""What a later Triton might add to an operation is refused, since it may change what the operation means."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl

from fastattn.kernels.cpu.frontend import ttir
from fastattn.kernels.cpu.ttir import parse
from fastattn.kernels.errors import Unsupported


@triton.jit
def many_kernel(x, y, n, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + i * n + j, mask=j < n, other=0.0, eviction_policy="evict_first", cache_modifier=".ca")
    a = tl.dot(a, tl.trans(a), input_precision="ieee") + tl.cumsum(a, 1) + tl.max(a, 1)[:, None]
    for step in range(n):
        a = tl.clamp(a, 0.0, 2.0) * step
    tl.store(y + tl.max_contiguous(tl.multiple_of(i * n + j, [1, 8]), [1, 8]), tl.gather(a, (i + j) % BLOCK, 1))


@pytest.fixture(scope="module")
def text() -> str:
    return ttir(many_kernel, {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 16})


def changed(text: str, pattern: str, by: str) -> str:
    new, count = re.subn(pattern, by, text, count=1)
    assert count == 1, pattern
    return new


def test_what_triton_prints_today_is_known(text):
    assert parse(text).name == "many_kernel"


@pytest.mark.parametrize("more", [" {mode = 1 : i32}", " {mode}", " mode = fast", ", mode = fast", " saturated"])
@pytest.mark.parametrize("operation", ["arith.mulf", "arith.cmpi slt,", "tt.dot", "tt.clampf", "tt.splat"])
def test_a_new_attribute_is_refused(text, operation, more):
    with pytest.raises(Unsupported, match=r"test_forms\.py:\d+: the form .*(?:mode|saturated)"):
        parse(changed(text, rf"({operation} %[^:\n]*?)(?= :)", rf"\1{more}"))


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        (r"\{axis = 1 : i32\}", "{axis = 1 : i32, mode = 1 : i32}"),
        (r"<\{axis = 1 : i32\}>", "<{axis = 1 : i32, order = 1 : i32}>"),
        (r"reverse = false\}", "reverse = false, exclusive = true}"),
        (r"\{order = array<i32: 1, 0>\}", "{order = array<i32: 1, 0>, shuffled = array<i1: 0, 1>}"),
        (r"arith\.muli %", "arith.muli wide %"),
        (r"scf\.for %", "scf.for unsigned %"),
    ],
)
def test_an_addition_to_what_an_operation_has_is_refused(text, pattern, by):
    with pytest.raises(Unsupported, match="form"):
        parse(changed(text, pattern, by))


@pytest.mark.parametrize(
    "more", [" overflow<nsw, nuw>", " {tt.divisibility = dense<[1, 8]> : tensor<2xi32>, other.hint = 3 : i32}"]
)
def test_what_only_permits_or_hints_is_passed_over(text, more):
    parse(changed(text, r"(arith\.muli %[^:\n]*?)(?= :)", rf"\1{more}"))
