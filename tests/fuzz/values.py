"""Arithmetic on values with error bounds: float64 with a bound for floats, exact wrapping integers.

A value's ``error`` bounds, element by element, how far any right computation in the value's own type may be away; 0
says that there is one right answer, infinity that there is none (a conversion that overflows, a comparison too close to
call).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .program import FLOATS, NUMPY


@dataclass(frozen=True)
class Format:
    """digits: of the significand, the leading one included. smallest, largest: exponents of the normal numbers."""

    digits: int
    smallest: int
    largest: float

    @property
    def unit(self) -> float:
        return 2.0 ** (1 - self.digits)

    @property
    def tiny(self) -> float:
        return 2.0 ** (self.smallest - self.digits + 1)


FORMATS = {
    "fp32": Format(24, -126, (2 - 2.0**-23) * 2.0**127),
    "fp16": Format(11, -14, 65504.0),
    "bf16": Format(8, -126, (2 - 2.0**-7) * 2.0**127),
}
# of functions that are not rounded correctly; far above what they err, for accuracy is tested elsewhere
FUNCTION_ERROR = 2e-6


@dataclass
class Value:
    """data: float64 for floats, booleans, or integers of the kind's own width. error: float64, of the same shape."""

    kind: str
    data: np.ndarray
    error: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def map(self, f: Callable[[np.ndarray], np.ndarray]) -> Value:
        """``f`` only moves elements."""
        return Value(self.kind, f(self.data), f(self.error))


def exact(kind: str, data: np.ndarray | float | int | bool) -> Value:
    array = np.asarray(data, np.float64 if kind in FLOATS else NUMPY[kind])
    return Value(kind, array, np.zeros(array.shape))


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """To the nearest number of the format, ties to even; beyond the largest one lie the infinities."""
    f = FORMATS[kind]
    _, exponent = np.frexp(x)
    quantum = np.exp2(np.maximum(exponent - 1, f.smallest).astype(np.float64) - (f.digits - 1))
    near = np.where(np.isfinite(x), np.rint(x / quantum) * quantum, x)
    return np.where(np.isfinite(x) & (np.abs(near) > f.largest), np.copysign(np.inf, x), near)


def finish(kind: str, x: np.ndarray, error: np.ndarray, relative: float | None = None, *, one_answer=False) -> Value:
    """The value of format ``kind`` that was computed as ``x``, with ``error`` from its operands.

    relative: what the operation itself errs; None for one rounding, which is no error at all where ``x`` is a number of
    the format. one_answer: the operation rounds correctly, and nothing may be fused with it.
    """
    f = FORMATS[kind]
    x, error = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(error, np.float64))
    near = rounded(x, kind)
    settled = (error == 0) & ((near == x) | one_answer) if relative is None else np.zeros(x.shape, bool)
    settled = settled | (~np.isfinite(x) & ~np.isinf(error))
    bound = error + (f.unit if relative is None else relative + f.unit) * np.abs(x) + f.tiny
    surely_over = np.isfinite(x) & (np.abs(x) - bound > f.largest * (1 + f.unit))
    maybe_over = np.isfinite(x) & (np.abs(x) + bound > f.largest) & ~settled
    data = np.where(settled, near, np.where(surely_over, np.copysign(np.inf, x), x))
    bound = np.where(settled | surely_over, 0.0, np.where(maybe_over, np.inf, bound))
    return Value(kind, data, np.where(np.isnan(bound), np.inf, bound))


def unknown(a: Value) -> np.ndarray:
    return np.isinf(a.error)


def _bounded(error: np.ndarray, special: np.ndarray, never: np.ndarray) -> np.ndarray:
    """The error of an operation: infinite where nothing can be said, none where infinities or NaN decide."""
    return np.where(never, np.inf, np.where(special, 0.0, error))


def binary_float(op: str, a: Value, b: Value) -> Value:
    x, y = np.broadcast_arrays(a.data, b.data)
    ex, ey = np.broadcast_arrays(a.error, b.error)
    special = ~(np.isfinite(x) & np.isfinite(y))
    never = np.isinf(ex) | np.isinf(ey)
    blurred = ((ex > 0) & (np.abs(x) <= ex)) | ((ey > 0) & (np.abs(y) <= ey))  # might be zero
    if op == "add":
        result, error, once = x + y, ex + ey, True
    elif op == "sub":
        result, error, once = x - y, ex + ey, True
    elif op == "mul":
        result, error, once = x * y, np.abs(x) * ey + np.abs(y) * ex + ex * ey, False  # an fma may take it over
        never = never | (special & blurred)
        if a.kind == "fp32":  # within an fma a product beyond the format is not yet an infinity
            never = never | (~special & (np.abs(result) + error > FORMATS["fp32"].largest))
    else:
        result = x / y
        gap = np.abs(y) - ey
        error = (ex + np.abs(result) * ey) / np.where(gap > 0, gap, 1.0)
        never = never | (gap <= 0) | (special & blurred)  # the sign of a zero is nobody's business
        once = True
    # what was rounded may be kept with more digits in the 16-bit formats, as in a register
    return finish(a.kind, result, _bounded(error, special, never), one_answer=once and a.kind == "fp32")


def fma(a: Value, b: Value, c: Value) -> Value:
    x, y, z = np.broadcast_arrays(a.data, b.data, c.data)
    ex, ey, ez = np.broadcast_arrays(a.error, b.error, c.error)
    special = ~(np.isfinite(x) & np.isfinite(y) & np.isfinite(z))
    blurred = ((ex > 0) & (np.abs(x) <= ex)) | ((ey > 0) & (np.abs(y) <= ey))
    never = np.isinf(ex) | np.isinf(ey) | np.isinf(ez) | (special & blurred)
    product, result = x * y, x * y + z
    error = np.abs(x) * ey + np.abs(y) * ex + ex * ey
    # fused or not: by itself the product is an infinity, which nothing brings back, and with its opposite it is NaN
    over = np.isfinite(product) & (np.abs(product) + error > FORMATS[a.kind].largest)
    never = never | (over & (np.sign(product) != np.sign(z)) & ~np.isnan(result))
    unit = FORMATS[a.kind].unit
    inside = np.where((ex == 0) & (ey == 0) & (rounded(product, a.kind) == product), 0.0, unit * np.abs(product))
    return finish(a.kind, result, _bounded(error + ez + inside, special, never))


def extreme(op: str, a: Value, b: Value, keep_nan: bool) -> Value:
    """maximum or minimum; of a number and a NaN the number, or the NaN."""
    if a.kind not in FLOATS:
        f = np.maximum if op == "maximum" else np.minimum
        return Value(a.kind, f(a.data, b.data), a.error + b.error)
    f = {("maximum", False): np.fmax, ("maximum", True): np.maximum, ("minimum", False): np.fmin,
         ("minimum", True): np.minimum}[op, keep_nan]  # fmt: skip
    x, y = np.broadcast_arrays(a.data, b.data)
    ex, ey = np.broadcast_arrays(a.error, b.error)
    error = np.maximum(ex, ey)
    clear = (x - ex > y + ey) | (y - ey > x + ex)  # the loser's error does not matter
    winner = np.where((x > y) == (op == "maximum"), ex, ey)
    error = np.where(clear, winner, error)
    known = ~(np.isinf(ex) | np.isinf(ey))
    for this, other in ((x, ey), (y, ex)):
        error = np.where(np.isnan(this) & known, 0.0 if keep_nan else other, error)
    return Value(a.kind, f(x, y), error)


def compare(op: str, a: Value, b: Value) -> Value:
    result = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
              "ne": np.not_equal}[op](a.data, b.data)  # fmt: skip
    with np.errstate(invalid="ignore"):
        error = a.error + b.error
        close = (error > 0) & ~(np.abs(a.data.astype(np.float64) - b.data) > error)
    close &= ~(np.isnan(a.data.astype(np.float64)) | np.isnan(b.data.astype(np.float64)))
    return Value("int1", result, np.where(close | np.isinf(error), np.inf, 0.0))


def binary_integer(op: str, a: Value, b: Value) -> Value:
    x, y = np.broadcast_arrays(a.data, b.data)
    error = a.error + b.error
    bits = x.dtype.itemsize * 8
    if op in ("shl", "shr"):
        error = error + np.where((y < 0) | (y >= bits), np.inf, 0.0)
        amount = np.where((y < 0) | (y >= bits), 0, y)
        result = np.left_shift(x, amount) if op == "shl" else np.right_shift(x, amount)
    elif op in ("floordiv", "mod"):
        lost = (y == 0) | ((y.astype(np.int64) == -1) & (x == np.iinfo(x.dtype).min)) if x.dtype.kind == "i" else y == 0
        error = error + np.where(lost, np.inf, 0.0)
        divisor = np.where(lost, np.ones_like(y), y)
        rest = np.fmod(x, divisor)
        result = rest if op == "mod" else (x - rest) // divisor
    else:
        result = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
                  "xor": np.bitwise_xor}[op](x, y)  # fmt: skip
    return Value(a.kind, result.astype(x.dtype), error + np.zeros(result.shape))


def umulhi(a: Value, b: Value) -> Value:
    bits = a.data.dtype.itemsize * 8
    mask = 2**bits - 1
    x, y = np.broadcast_arrays(a.data, b.data)
    high = [((int(p) & mask) * (int(q) & mask)) >> bits for p, q in zip(x.ravel(), y.ravel(), strict=True)]
    data = np.array(high, np.dtype(f"uint{bits}")).view(x.dtype).reshape(x.shape)
    return Value(a.kind, data, a.error + b.error + np.zeros(data.shape))


_erf = np.vectorize(math.erf, otypes=[np.float64])
# value, and the largest slope between x - e and x + e
_FUNCTIONS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "exp": (np.exp, lambda x, e: np.exp(x + e)),
    "exp2": (np.exp2, lambda x, e: np.exp2(x + e)),
    "log": (np.log, lambda x, e: 1 / np.maximum(x - e, 0.0)),
    "log2": (np.log2, lambda x, e: 1.5 / np.maximum(x - e, 0.0)),
    "sqrt": (np.sqrt, lambda x, e: 0.5 / np.sqrt(np.maximum(x - e, 0.0))),
    "rsqrt": (lambda x: 1 / np.sqrt(x), lambda x, e: 0.5 * np.maximum(x - e, 0.0) ** -1.5),
    "sin": (np.sin, lambda x, e: np.ones_like(x)),
    "cos": (np.cos, lambda x, e: np.ones_like(x)),
    "erf": (_erf, lambda x, e: np.full_like(x, 1.2)),
}


def unary(op: str, a: Value) -> Value:
    if op == "neg":
        return Value(a.kind, -a.data, a.error)
    if op == "abs":
        return Value(a.kind, np.abs(a.data), a.error)
    x, e = a.data, a.error
    if op in ("floor", "ceil"):
        f = np.floor if op == "floor" else np.ceil
        spread = np.where(np.isfinite(x), np.abs(f(x + e) - f(x - e)), 0.0)
        return Value(a.kind, f(x), np.where(np.isinf(e), np.inf, spread))
    f, slope = _FUNCTIONS[op]
    y = f(x)
    error = np.where(e == 0, 0.0, slope(x, e) * e)
    # poles and zeros whose side is not known; the engine's sine is only asked for where a period is still resolved
    never = np.isinf(e) | (np.isfinite(x) & (e > 0) & (x <= e) & (op in ("log", "log2", "sqrt", "rsqrt")))
    never |= (op == "rsqrt") & (x == 0)
    never |= (op in ("sin", "cos")) & (np.abs(x) > 1e4) & np.isfinite(x)
    absolute = 4e-7 if op in ("sin", "cos", "erf", "log", "log2") else 0.0
    error = np.where(np.isfinite(y), error + absolute, 0.0)
    return finish(a.kind, y, np.where(never, np.inf, error), FUNCTION_ERROR)


def cast(a: Value, kind: str) -> Value:
    if a.kind == kind:
        return a
    if kind == "int1":
        zero = exact(a.kind, np.zeros(a.shape))
        return compare("ne", a, zero)
    if a.kind in FLOATS and kind in FLOATS:
        wider = FORMATS[kind].digits >= FORMATS[a.kind].digits and kind == "fp32"
        return Value(kind, a.data, a.error) if wider else finish(kind, a.data, a.error, one_answer=True)
    if a.kind in FLOATS:
        info = np.iinfo(NUMPY[kind])
        low, high = np.trunc(a.data - a.error), np.trunc(a.data + a.error)
        fits = np.isfinite(a.data) & (low == high) & (a.data > info.min - 1.0) & (np.abs(a.data) < 2.0**62)
        fits &= (a.data < info.max + 1.0) & ~unknown(a)
        return Value(kind, np.where(fits, a.data, 0).astype(np.int64).astype(NUMPY[kind]), np.where(fits, 0.0, np.inf))
    if kind in FLOATS:
        if kind == "fp32":
            return Value(kind, a.data.astype(np.float32).astype(np.float64), a.error)
        return finish(kind, a.data.astype(np.float64), a.error)
    return Value(kind, a.data.astype(NUMPY[kind]), a.error)


def to_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """The bytes of numbers of a format, as unsigned integers; integers and booleans as they are."""
    if kind == "fp32":
        return x.astype(np.float32).view(np.uint32)
    if kind == "fp16":
        return x.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp32":
        return bits.view(np.float32).astype(np.float64)
    if kind == "fp16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits


def bitcast(a: Value, kind: str) -> Value:
    """Between types of one size; the bits of a NaN, and the sign of a zero, are not determined."""
    bits = np.ascontiguousarray(to_bits(a.data, a.kind))
    lost = a.error != 0
    if a.kind in FLOATS:
        lost = lost | np.isnan(a.data) | (a.data == 0)
    data = from_bits(bits.view(f"u{bits.dtype.itemsize}") if kind in FLOATS else bits.view(NUMPY[kind]), kind)
    return Value(kind, data, np.where(lost, np.inf, 0.0))


def same_bits(kind: str) -> int:
    """The size of an element in bytes."""
    return {"fp32": 4, "fp16": 2, "bf16": 2}.get(kind) or NUMPY[kind].itemsize
