"""Products of tiles are right for every shape, type and transposition, at every level that this machine can run."""

from __future__ import annotations

import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn.kernels.cpu
from fastattn.kernels.cpu import build, machine

FLOATS = {"float": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TYPES = FLOATS | {"int8_t": torch.int8}
SIDES = [(False, False), (False, True), (True, False), (True, True)]  # the left operand is transposed, the right one is
BLOCK = (64, 64, 64)
# M, N, K: blocks of attention; rows that leave a remainder; fewer columns than lanes; less than a pair of k
SHAPES = [
    BLOCK, (128, 32, 32), (16, 128, 64), (32, 16, 128), (4, 256, 64), (256, 8, 16), (8, 4, 32), (16, 2, 16),
    (64, 1, 32), (1, 64, 8), (4, 16, 1), (16, 16, 2), (2, 4, 1), (1, 1, 1),
]  # fmt: skip

SOURCE = """
template <class Acc, class T, int M, int N, int K, bool LEFT, bool RIGHT>
void run(const void* a, const void* b, const void* start, void* result, int32_t* begun, int32_t* ended) {
  constexpr int W = least(WIDEST, N);
  const AmxSession<fits_amx<T, M, N, K, W>()> session{};
  product<Acc, M, N, K, W, T, LEFT, T, RIGHT>((const T*)a, (const T*)b,
    [&](int i, int j) __attribute__((always_inline)) -> V<Acc, W> {
      ++begun[i * N + j];
      return load<Acc, W>((const Acc*)start + i * N + j);
    },
    [&](int i, int j, V<Acc, W> x) __attribute__((always_inline)) {
      ++ended[i * N + j];
      store((Acc*)result + i * N + j, x);
    });
}
typedef void Run(const void*, const void*, const void*, void*, int32_t*, int32_t*);
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int lanes_at_once() { return WIDEST; }
EXPORT int pairs(int width) {
  return (width == 4 ? multiplies_pairs<bf16, 4>() : multiplies_pairs<bf16, WIDEST>()) +
         2 * (width == 4 ? multiplies_pairs<int8_t, 4>() : multiplies_pairs<int8_t, WIDEST>());
}
EXPORT int by_amx() {
  return fits_amx<bf16, 16, 16, 32, WIDEST>() + 2 * fits_amx<bf16, 16, 16, 16, WIDEST>() +
         4 * fits_amx<float, 64, 64, 64, WIDEST>();
}
"""


@lru_cache
def cases(kind: str) -> list[tuple[int, int, int, bool, bool]]:
    """A block with each side transposed or not; the other shapes one way each, and another way for each type."""
    turns = enumerate(SHAPES, start=list(TYPES).index(kind))
    return [(*shape, *sides) for at, shape in turns for sides in (SIDES if shape == BLOCK else [SIDES[at % 4]])]


@lru_cache
def library(level: machine.Level) -> ctypes.CDLL:
    folder = Path(fastattn.kernels.cpu.__file__).parent
    text = "".join(
        (folder / f"{name}.h").read_text() for name in ("vectors", "halves", "memory", "functions", "products")
    )
    text += SOURCE
    for kind in TYPES:
        total = "int32_t" if kind == "int8_t" else "float"
        runs = (
            f"run<{total}, {kind}, {m}, {n}, {k}, {int(left)}, {int(right)}>" for m, n, k, left, right in cases(kind)
        )
        text += f"EXPORT Run* const {kind}_runs[] = {{{', '.join(runs)}}};\n"
    return build.load(build.Recipe("products", (hashlib.sha256(text.encode()).hexdigest(),), lambda: text, level))


def run(level: machine.Level, kind: str, at: int, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """start + a @ b by the case's generated code; a (M, K), b (K, N), start (M, N)."""
    m, n, _, left, right = cases(kind)[at]
    a, b = (a.T if left else a).contiguous(), (b.T if right else b).contiguous()
    result, begun, ended = torch.empty_like(start), *torch.zeros(2, m, n, dtype=torch.int32)
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 6)
    runs = (ctypes.c_void_p * len(cases(kind))).in_dll(library(level), f"{kind}_runs")
    function(runs[at])(*(x.data_ptr() for x in (a, b, start, result, begun, ended)))
    firsts = torch.arange(n) % min(level.lanes, n) == 0
    assert torch.equal(begun, firsts.int().expand(m, n)), "the start of each vector is asked for once"
    assert torch.equal(ended, begun), "each vector is handed over once"
    return result


def operands(kind: str, m: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    a, b, start = (torch.randn(*shape, generator=numbers) for shape in ((m, k), (k, n), (m, n)))
    return a.to(TYPES[kind]), b.to(TYPES[kind]), start


def exact(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """In float64, by adding up products, so that infinities and NaN come out as IEEE 754 says."""
    return start.double() + (a.double()[:, :, None] * b.double()[None]).sum(1)


def bound(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Of the error of K products added one by one in fp32, each product and each sum rounded to the nearest."""
    roundings = (a.shape[1] + 1) * 2.0**-24
    return roundings / (1 - roundings) * exact(a.abs(), b.abs(), start.abs())


pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler"),
    pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name),
]


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_are_summed_up_in_fp32(level, kind):
    for at, (m, n, k, left, right) in enumerate(cases(kind)):
        a, b, start = operands(kind, m, n, k, seed=at)
        error = (run(level, kind, at, a, b, start).double() - exact(a, b, start)).abs()
        worst = (error / bound(a, b, start)).max()
        assert worst <= 1, f"{m} x {n} x {k}, transposed: {left}, {right}"


def test_int8_is_exact_and_wraps_as_int32_does(level):
    numbers = torch.Generator().manual_seed(0)
    for at, (m, n, k, left, right) in enumerate(cases("int8_t")):
        a, b = (torch.randint(-128, 128, shape, generator=numbers).to(torch.int8) for shape in ((m, k), (k, n)))
        a[0], b[:, 0] = -128, -128  # the largest product
        start = torch.randint(-(2**31), 2**31, (m, n), generator=numbers).to(torch.int32)
        start[0, 0] = 2**31 - 1
        expected = (start.long() + a.long() @ b.long()).to(torch.int32)
        assert expected[0, 0] < 0
        found = run(level, "int8_t", at, a, b, start)
        assert torch.equal(found, expected), f"{m} x {n} x {k}, transposed: {left}, {right}"


@pytest.mark.parametrize("kind", FLOATS)
def test_infinities_and_nan_come_out_as_ieee_754_says(level, kind):
    inf, nan = torch.inf, torch.nan
    for at, (m, n, k, left, right) in enumerate(cases(kind)):
        a, b, start = operands(kind, m, n, k, seed=at)
        for x, values in ((a, (inf, nan)), (b, (-inf, nan)), (start, (inf, -inf, nan))):
            places = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(at))
            # a few, so that many results stay finite
            for place, value in zip(places[: 1 + x.numel() // 8], values, strict=False):
                x.view(-1)[place] = value
        a[0, -1], b[-1, 0] = inf, 0.0  # whose product is NaN, either way round
        a[-1, 0], b[0, -1] = 0.0, -inf
        found, expected = run(level, kind, at, a, b, start).double(), exact(a, b, start)
        kinds = found.isnan(), found == inf, found == -inf
        for one, other in zip(kinds, (expected.isnan(), expected == inf, expected == -inf), strict=True):
            assert torch.equal(one, other), f"{m} x {n} x {k}, transposed: {left}, {right}"
        finite = expected.isfinite()
        assert ((found - expected).abs() <= bound(a, b, start))[finite].all()


def test_bf16_of_any_magnitude_is_off_by_no_more_than_stated(level):
    """Results from 2^-150 to 2^120 with operands that cancel, and subnormal operands."""
    for at, (m, n, k, left, right) in enumerate(cases("bf16")):
        numbers = torch.Generator().manual_seed(at)
        a, b, start = operands("bf16", m, n, k, seed=at)
        a, b, start = (
            (x.float() * 2.0 ** torch.randint(low, high, x.shape, generator=numbers)).to(x.dtype)
            for x, low, high in ((a, -133, 60), (b, -50, 50), (start, -149, 60))
        )
        # subnormal operands and results may count as zero
        sides = k + a.double().abs().sum(1)[:, None] + b.double().abs().sum(0)[None]
        off = (run(level, "bf16", at, a, b, start).double() - exact(a, b, start)).abs()
        assert (off <= bound(a, b, start) + sides * 2.0**-126).all(), f"{m} x {n} x {k}, transposed: {left}, {right}"


def test_pairs_are_multiplied_where_the_machine_can(level):
    bf16, int8 = 1, 2
    found = library(level).pairs(level.lanes), library(level).pairs(4)
    x86 = int8 if machine.features() & {"sse2"} else 0
    assert library(level).lanes_at_once() == level.lanes
    assert found == ((bf16 | int8,) * 2 if level is machine.AVX512_BF16 else (x86, x86))


def order_of_sums(level: machine.Level) -> float:
    """2**24 + 1 - 2**24: 1 where the products of even k and those of odd k are added up apart, as AMX does; 0 where
    they are added one by one."""
    m, n, k = BLOCK
    a, b = torch.ones(m, k).bfloat16(), torch.zeros(k, n).bfloat16()
    b[0], b[1], b[2] = 2.0**24, 1.0, -(2.0**24)
    found = {run(level, "bf16", at, a, b, torch.zeros(m, n)).unique().item() for at in range(len(SIDES))}
    assert cases("bf16")[len(SIDES) - 1][:3] == BLOCK and len(found) == 1
    return found.pop()


def test_large_products_of_bf16_are_by_amx_where_the_machine_can(level):
    has_amx = level is machine.AMX_BF16
    assert library(level).by_amx() == has_amx
    assert order_of_sums(level) == has_amx


def test_every_thread_may_multiply(level):
    """Each has registers of its own, which are divided anew."""
    m, n, k = BLOCK
    a, b, start = operands("bf16", m, n, k, seed=0)
    expected = run(level, "bf16", 0, a, b, start)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run(level, "bf16", 0, a, b, start), range(64)))
    assert all(torch.equal(x, expected) for x in found)
