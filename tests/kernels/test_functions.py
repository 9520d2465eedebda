"""The element functions of generated code give what PyTorch, numpy and whole numbers say, at every level and width."""

from __future__ import annotations

import ctypes
import hashlib
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import fastattn.kernels.cpu
from fastattn.kernels.cpu import build, machine

pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler"),
    pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name),
]

# exported name -> (formula of a, or of a and b, type of the operands, type of the result)
FLOATS = {
    name: (f"{name}({arguments})", "float", "float")
    for arguments, names in {
        "a": ["power_of_two", "power_of_e", "logarithm", "logarithm2", "sine", "cosine", "error_function",
              "square_root", "reciprocal_root", "floor_of", "ceil_of", "absolute"],
        "a, b": ["float_remainder", "max_number", "min_number", "max_nan", "min_nan"],
    }.items()
    for name in names
}  # fmt: skip
HALVES = {
    f"{name}_{kind}": (f"{name}<{kind}>(a)", source, target)
    for kind in ("f16", "bf16")
    for name, source, target in (
        ("unpack", "uint16_t", "float"), ("pack", "float", "uint16_t"), ("round_to", "float", "float"),
        ("round_toward_zero", "float", "float"),
    )
}  # fmt: skip
PAIRS = {
    8: ["max_signed", "min_signed", "max_unsigned", "min_unsigned", "divide", "divide_unsigned", "remainder",
        "remainder_unsigned", "shift_right_unsigned"],
}  # fmt: skip
PAIRS[16] = PAIRS[8]
PAIRS[32] = PAIRS[64] = [*PAIRS[8], "multiply_high_unsigned", "multiply_high_signed"]
INTEGERS = {
    f"{name}_{bits}": (f"{name}({arguments})", f"int{bits}_t", f"int{bits}_t")
    for bits, pairs in PAIRS.items()
    for name, arguments in [*((name, "a, b") for name in pairs), ("absolute", "a"), ("population_count", "a")]
}
CONVERSIONS = {
    **{f"to_{bits}": (f"to_unsigned_integer<int{bits}_t>(a)", "float", f"int{bits}_t") for bits in PAIRS},
    **{f"float_of_{bits}": ("convert_unsigned<float>(a)", f"int{bits}_t", "float") for bits in PAIRS},
    **{f"long_of_{bits}": ("convert_unsigned<int64_t>(a)", f"int{bits}_t", "int64_t") for bits in (8, 16, 32)},
    "bits_of_float": ("bits_to<int32_t>(a)", "float", "int32_t"),
    "float_of_bits": ("bits_to<float>(a)", "int32_t", "float"),
}
SPECIAL = np.array([0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 2.0**-149], np.float32)
ALL = FLOATS | HALVES | INTEGERS | CONVERSIONS
# W = 0: scalars
LOOP = """
template <int W, class T, class R, class F> INLINE void map(const T* p, const T* q, R* y, int64_t n, F f) {
  if constexpr (W == 0) for (int64_t i = 0; i < n; ++i) y[i] = f(p[i], q[i]);
  else for (int64_t i = 0; i < n; i += W) {
    V<T, W> a, b;
    memcpy(&a, p + i, sizeof a);
    memcpy(&b, q + i, sizeof b);
    V<R, W> r = f(a, b);
    memcpy(y + i, &r, sizeof r);
  }
}
#define EXPORT(NAME, W, T, R, FORMULA) \\
  extern "C" __attribute__((visibility("default"))) \\
  void NAME##_##W(const T* p, const T* q, R* y, int64_t n) { \\
    map<W>(p, q, y, n, [](auto a, auto b) { return FORMULA; }); \\
  }
"""


def widths(name: str, level: machine.Level) -> list[int]:
    """Scalars (0), one lane, the machine's width and, of floats, a wider one; all of those that are cut into parts."""
    if name in HALVES or name == "multiply_high_unsigned_32":
        return [0, 1, 2, 4, 8, 16]
    return sorted({0, 1, level.lanes, 16 if name in FLOATS else level.lanes})


@lru_cache
def library(level: machine.Level) -> ctypes.CDLL:
    folder = Path(fastattn.kernels.cpu.__file__).parent
    parts = [(folder / f"{name}.h").read_text() for name in ("vectors", "halves", "functions")] + [LOOP]
    for name, (formula, source, target) in ALL.items():
        parts += [f"EXPORT({name}, {width}, {source}, {target}, ({formula}))\n" for width in widths(name, level)]
    text = "".join(parts)
    key = (hashlib.sha256(text.encode()).hexdigest(),)
    return build.load(build.Recipe("functions", key, lambda: text, level))


def numpy_type(name: str) -> np.dtype:
    return np.dtype("float32" if name == "float" else name.removesuffix("_t"))


def results(level: machine.Level, name: str, a: np.ndarray, b: np.ndarray | None = None):
    """(width, result) of the function for every width that it was built with."""
    _, source, target = ALL[name]
    count = -(-len(a) // 16) * 16
    p, q = (np.resize(x, count).astype(numpy_type(source), copy=False) for x in (a, a if b is None else b))
    for width in widths(name, level):
        y = np.empty(count, numpy_type(target))
        pointers = (ctypes.c_void_p(x.ctypes.data) for x in (p, q, y))
        getattr(library(level), f"{name}_{width}")(*pointers, ctypes.c_int64(count))
        yield width, y[: len(a)]


def floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def same(y: np.ndarray, expected: np.ndarray) -> bool:
    """The same bits, but any NaN for NaN."""
    nan = np.isnan(expected)
    kind = np.uint32 if y.dtype == np.float32 else np.uint16
    return np.array_equal(np.isnan(y), nan) and np.array_equal(y.view(kind)[~nan], expected.view(kind)[~nan])


@lru_cache
def samples() -> np.ndarray:
    """Floats of all sizes, and many where a function has an edge."""
    generator = np.random.default_rng(0)
    marks = [
        0.0, 1.0, 2.0**-126, 2.0**-149, 2.0**-25, 0.9375, 4.0, 88.73, 103.98, 110.0, 127.0, 128.0, 149.5, 159.0, 1e5,
    ]  # fmt: skip
    near = np.array([*marks, np.inf], np.float32).view(np.uint32)[:, None] + np.arange(-64, 64)
    quarters = np.float32(np.arange(1, 70_000) * (np.pi / 2)).view(np.uint32)
    dense = np.concatenate([
        generator.integers(0, 2**32, 200_000),
        np.float32(generator.uniform(-150, 150, 60_000)).view(np.uint32),
        0x3F800000 + np.arange(-20_000, 20_000),  # where logarithms are small
        quarters, quarters + 1, quarters - 1, quarters ^ 2**31,  # where sine or cosine are
        near.ravel(), near.ravel() + 2**31,
    ])  # fmt: skip
    return floats(dense & 0xFFFFFFFF)


APPROXIMATE = {
    "power_of_two": torch.exp2, "power_of_e": torch.exp, "logarithm": torch.log, "logarithm2": torch.log2,
    "sine": torch.sin, "cosine": torch.cos, "error_function": torch.erf, "reciprocal_root": lambda x: 1 / x.sqrt(),
}  # fmt: skip


@lru_cache
def in_double(name: str) -> np.ndarray:
    return APPROXIMATE[name](torch.from_numpy(samples()).double()).numpy()


def finite(y: np.ndarray) -> np.ndarray:
    """Infinity as the number that it is rounded from at least, so that next to it there is an error to speak of."""
    return np.clip(y.astype(np.float64), -(2.0**128), 2.0**128)


@pytest.mark.parametrize("name", APPROXIMATE)
def test_functions_of_floats_are_within_3_units_in_the_last_place(name, level):
    number = ~np.isnan(in_double(name))
    expected = finite(in_double(name)[number])
    # the unit of a normal number; results below have fewer places, of which none is lost to more than rounding
    unit = 2.0 ** (np.frexp(np.maximum(np.abs(expected), 2.0**-126))[1] - 24)
    allowed = np.where(np.abs(expected) < 2.0**-126, 1, 3) * unit
    zero = expected == 0
    for width, y in results(level, name, samples()):
        assert np.array_equal(np.isnan(y), ~number), width
        y = y[number]
        error = np.abs(finite(y) - expected)
        worst = np.argmax(error / allowed)
        assert error[worst] <= allowed[worst], (width, samples()[number][worst], y[worst], expected[worst])
        assert np.array_equal(np.signbit(y[zero]), np.signbit(expected[zero])), width


@pytest.mark.parametrize("name", ["square_root", "floor_of", "ceil_of", "absolute"])
def test_roots_whole_numbers_and_absolute_values_are_exact(name, level):
    function = {"square_root": np.sqrt, "floor_of": np.floor, "ceil_of": np.ceil, "absolute": np.abs}[name]
    with np.errstate(invalid="ignore"):
        expected = function(samples())
    for width, y in results(level, name, samples()):
        assert same(y, expected), width


def pairs_of_samples() -> tuple[np.ndarray, np.ndarray]:
    a = samples()
    b = np.random.default_rng(1).permutation(a)
    a, b = np.append(a, SPECIAL.repeat(len(SPECIAL))), np.append(b, np.tile(SPECIAL, len(SPECIAL)))
    return a, b


def test_remainders_of_floats_are_those_of_fmod(level):
    a, b = pairs_of_samples()
    with np.errstate(invalid="ignore"):
        expected = np.fmod(a, b)
    for width, y in results(level, "float_remainder", a, b):
        assert same(y, expected), width


@pytest.mark.parametrize("name", ["max_number", "min_number", "max_nan", "min_nan"])
def test_maximum_and_minimum_of_floats_drop_or_keep_nan(name, level):
    a, b = pairs_of_samples()
    function = {"max_number": np.fmax, "min_number": np.fmin, "max_nan": np.maximum, "min_nan": np.minimum}[name]
    with np.errstate(invalid="ignore"):
        expected = function(a, b)
    for width, y in results(level, name, a, b):
        assert np.array_equal(y, expected, equal_nan=True), width  # either zero will do


# ---- fp16 and bf16

HALF_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def patterns(kind: str) -> torch.Tensor:
    """All 65,536 numbers of the type."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(HALF_TYPES[kind])


@lru_cache
def to_be_rounded(kind: str) -> np.ndarray:
    """Random floats, and those next to and halfway between numbers of the type, also beyond the largest."""
    values = patterns(kind).double()
    limit = 65536.0 if kind == "f16" else 2.0**128
    values = values[values.isfinite()].unique()
    values = torch.cat([values, torch.tensor([-limit, limit])]).sort().values
    halfway = ((values[1:] + values[:-1]) / 2).float().numpy().view(np.uint32)
    whole = values[1:-1].float().numpy().view(np.uint32)
    fine = np.random.default_rng(2).uniform(-(2.0**-13), 2.0**-13, 100_000)  # where fp16 has fewer places
    numbers = [halfway, halfway + 1, halfway - 1, whole, whole + 1, whole - 1, np.float32(fine).view(np.uint32)]
    nan = 0x7F800001 + np.arange(0, 2**23 - 1, 1023)  # all kinds: some have nothing in the bits that are kept
    return np.concatenate([floats(np.concatenate(numbers)), floats(nan), floats(nan + 2**31), samples()])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_all_halves_are_unpacked_to_the_floats_that_they_are(kind, level):
    values = patterns(kind)
    expected = values.float().numpy()
    for width, y in results(level, f"unpack_{kind}", values.view(torch.uint16).numpy()):
        assert same(y, expected), width


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_floats_are_rounded_to_the_nearest_half_as_by_torch(kind, level):
    x = to_be_rounded(kind)
    half = torch.from_numpy(x).to(HALF_TYPES[kind])
    expected, number = half.float().numpy(), ~half.isnan().numpy()
    for width, y in results(level, f"round_to_{kind}", x):
        assert same(y, expected), width
    for width, y in results(level, f"pack_{kind}", x):
        assert np.array_equal(y[number], half.view(torch.uint16).numpy()[number]), width
        unpacked = torch.from_numpy(y[~number]).view(HALF_TYPES[kind])
        assert unpacked.isnan().all(), width
        quiet = 0x200 if kind == "f16" else 0x40
        assert (y[~number] & quiet).all(), width


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_rounding_toward_zero_never_leaves_the_finite_numbers(kind, level):
    x = to_be_rounded(kind)
    half = torch.from_numpy(x).to(HALF_TYPES[kind])
    # the number before the nearest one, where that is further from zero
    beyond = (half.float().abs() > torch.from_numpy(x).abs()).numpy()
    bits = half.view(torch.uint16).numpy() - beyond.astype(np.uint16)
    expected = torch.from_numpy(bits).view(HALF_TYPES[kind]).float().numpy()
    for width, y in results(level, f"round_toward_zero_{kind}", x):
        assert same(y, expected), width


# ---- integers


@lru_cache
def crossed(bits: int) -> tuple[list[int], list[int]]:
    """Edges of the type and some numbers between, each with each."""
    top = 2 ** (bits - 1)
    edges = [-top, 1 - top, -top // 2, top // 3, top // 2 - 1, top // 2, top - 2, top - 1]
    generator = random.Random(bits)
    between = [generator.randrange(-top, top) >> generator.randrange(bits) for _ in range(29)]
    values = [*edges, *range(-3, 4), -10, -7, 7, 10, *between]
    return [a for a in values for _ in values], values * len(values)


def cut(a: int, b: int) -> int:
    """The quotient towards zero; whatever for a division by zero."""
    return 0 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize(("name", "bits"), [(name, bits) for bits, names in PAIRS.items() for name in names])
def test_integer_functions_of_two_operands_are_exact_and_never_trap(name, bits, level):
    p, q = crossed(bits)
    if name == "shift_right_unsigned":
        q = [b % bits for b in q]
    mask = 2**bits - 1
    function = {
        "max_signed": max, "min_signed": min,
        "max_unsigned": lambda a, b: max(a & mask, b & mask), "min_unsigned": lambda a, b: min(a & mask, b & mask),
        "divide": cut, "divide_unsigned": lambda a, b: cut(a & mask, b & mask),
        "remainder": lambda a, b: a - cut(a, b) * b,
        "remainder_unsigned": lambda a, b: (a & mask) - cut(a & mask, b & mask) * (b & mask),
        "multiply_high_unsigned": lambda a, b: (a & mask) * (b & mask) >> bits,
        "multiply_high_signed": lambda a, b: a * b >> bits,
        "shift_right_unsigned": lambda a, b: (a & mask) >> b,
    }[name]  # fmt: skip
    unsigned = np.dtype(f"uint{bits}")
    expected = np.array([function(a, b) & mask for a, b in zip(p, q, strict=True)], unsigned)
    defined = np.array(q) != 0 if "divide" in name or "remainder" in name else np.full(len(q), True)
    for width, y in results(level, f"{name}_{bits}", *(np.array(x, f"int{bits}") for x in (p, q))):
        assert np.array_equal(y.view(unsigned)[defined], expected[defined]), width


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("name", ["absolute", "population_count"])
def test_integer_functions_of_one_operand_are_exact(name, bits, level):
    a = sorted(set(crossed(bits)[0]))
    mask = 2**bits - 1
    expected = [abs(x) & mask if name == "absolute" else (x & mask).bit_count() for x in a]
    for width, y in results(level, f"{name}_{bits}", np.array(a, f"int{bits}")):
        assert y.view(f"uint{bits}").tolist() == expected, width


# ---- conversions


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_floats_become_unsigned_integers_by_cutting(bits, level):
    a = np.abs(samples())
    below = np.nextafter(np.float32(2.0**bits), np.float32(0))
    a = np.concatenate([a[a < 2.0**bits], np.float32([0.5, 1, 1.5, 2.0 ** (bits - 1), below, -0.0, -0.5])])
    expected = [int(x) for x in a]
    for width, y in results(level, f"to_{bits}", a):
        assert y.view(f"uint{bits}").tolist() == expected, width


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_unsigned_integers_are_rounded_once_to_floats_and_widened_with_zeros(bits, level):
    generator = random.Random(0)
    numbers = [generator.randrange(2**bits) >> generator.randrange(bits) for _ in range(5000)]
    # halfway between two floats, and one beside
    numbers += [(2 * f + 1 << e) + d for e in range(40) for f in (2**23, 2**24 - 1, 2**23 + 1) for d in (-1, 0, 1)]
    a = np.array([x % 2**bits for x in numbers], f"uint{bits}")
    for width, y in results(level, f"float_of_{bits}", a.view(f"int{bits}")):
        assert np.array_equal(y, a.astype(np.float32)), width
    if bits < 64:
        for width, y in results(level, f"long_of_{bits}", a.view(f"int{bits}")):
            assert y.tolist() == a.tolist(), width


def test_bits_stay_as_they_are_between_types_of_equal_width(level):
    a = samples()
    for width, y in results(level, "bits_of_float", a):
        assert np.array_equal(y, a.view(np.int32)), width
    for width, y in results(level, "float_of_bits", a.view(np.int32)):
        assert np.array_equal(y.view(np.int32), a.view(np.int32)), width
