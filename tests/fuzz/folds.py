"""Reductions, scans and products with their error bounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import values
from .program import FLOATS, NUMPY
from .values import FORMATS, FUNCTION_ERROR, Value, binary_float, binary_integer, cast, compare, extreme, unknown


def _adds_exactly(terms: np.ndarray, axis: int, kind: str) -> np.ndarray:
    """Whether every partial sum, in any order, is a number of the format: few enough digits in all."""
    digits = FORMATS[kind].digits
    found = np.zeros(np.sum(terms, axis).shape, bool)
    for shift in (0, 4, 8):
        scaled = terms * 2.0**shift
        whole = np.isfinite(scaled) & (scaled == np.rint(scaled))
        found |= whole.all(axis) & (np.abs(np.where(whole, scaled, 0.0)).sum(axis) < 2.0**digits)
    return found


def _size(terms: np.ndarray, axis: int) -> np.ndarray:
    """The sum of the finite terms' sizes, which no partial sum of theirs passes."""
    return np.abs(np.where(np.isfinite(terms), terms, 0.0)).sum(axis)


def _may_overflow(total: np.ndarray, size: np.ndarray, kind: str) -> np.ndarray:
    """Where some order of the additions may meet a partial sum, or a product, beyond the format: then it decides, also
    beside an infinity, of which it may be the opposite. A NaN stays one in any order."""
    return (size > FORMATS[kind].largest / 2) & ~np.isnan(total)


def _sum(a: Value, axis: int) -> Value:
    if a.kind not in FLOATS:
        return Value(a.kind, a.data.sum(axis, dtype=a.data.dtype), a.error.sum(axis))
    total, size = a.data.sum(axis), _size(a.data, axis)
    count = a.data.shape[axis]
    special = (~np.isfinite(a.data)).any(axis)
    error = a.error.sum(axis)
    inside = np.where(_adds_exactly(a.data, axis, a.kind) & (error == 0), 0.0, count * FORMATS[a.kind].unit * size)
    may_overflow = _may_overflow(total, size + error, a.kind)
    error = np.where(special & np.isfinite(error), 0.0, error + inside)
    return values.finish(a.kind, total, np.where(may_overflow, np.inf, error))


def _promoted(op: str, a: Value) -> Value:
    """The type in which Triton's standard library reduces."""
    if op in ("sum", "cumsum", "cumprod"):
        if a.kind in ("int8", "int16"):
            return cast(a, "int32")
        return cast(a, "uint32") if a.kind in ("uint8", "uint16") else a
    if op in ("max", "min"):
        if a.kind in ("fp16", "bf16"):
            return cast(a, "fp32")
        return cast(a, "int32") if a.kind not in FLOATS and NUMPY[a.kind].itemsize < 4 else a
    return a


def _fold(a: Value, axis: int, combine: Callable[[Value, Value], Value]) -> Value:
    parts = [a.map(lambda x, at=at: x.take(at, axis)) for at in range(a.shape[axis])]
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total


def _position(a: Value, axis: int, largest: bool) -> Value:
    """argmax or argmin: the first of equal ones; with a NaN in the row Triton's answer depends on the order."""
    x = a.data if a.kind in FLOATS else a.data.astype(object if a.kind == "int64" else np.int64)
    signed = x if largest else -x
    at = np.argmax(signed, axis)
    lost = unknown(a).any(axis)
    if a.kind in FLOATS:
        lost |= np.isnan(a.data).any(axis)
        best = np.take_along_axis(signed, np.expand_dims(at, axis), axis)
        slack = np.take_along_axis(a.error, np.expand_dims(at, axis), axis) + a.error
        others = np.arange(x.shape[axis]).reshape([-1 if d == axis else 1 for d in range(x.ndim)])
        with np.errstate(invalid="ignore"):
            close = (best - signed <= slack) & (slack > 0)
        lost |= (close & (others != np.expand_dims(at, axis))).any(axis)
    return Value("int32", at.astype(np.int32), np.where(lost, np.inf, 0.0))


def reduce(op: str, a: Value, axis: int | None, keep: bool) -> Value:
    """tl.sum, tl.max and so on."""
    rank = len(a.shape)
    if axis is None:
        a, at = a.map(lambda x: x.reshape(-1)), 0
    else:
        at = axis
    a = _promoted(op, a)
    if op == "sum":
        result = _sum(a, at)
    elif op in ("max", "min"):
        result = _fold(a, at, lambda x, y: extreme(op + "imum", x, y, False))
    elif op in ("argmax", "argmin"):
        result = _position(a, at, op == "argmax")
    else:
        f = np.bitwise_xor if op == "xor_sum" else np.bitwise_or
        result = Value(a.kind, f.reduce(a.data, at), a.error.sum(at))
    if keep:
        result = result.map(lambda x: x.reshape((1,) * rank) if axis is None else np.expand_dims(x, at))
    return result


# ---- scans


def _running(args: list[Value], axis: int, reverse: bool, combine: Callable[..., list[Value]]) -> list[Value]:
    """From left to right, or from right to left: what came before is the first operand."""
    order = range(args[0].shape[axis])
    places = list(reversed(order)) if reverse else list(order)
    rows = [[a.map(lambda x, at=at: x.take(at, axis)) for a in args] for at in places]
    found = [rows[0]]
    for row in rows[1:]:
        found.append(combine(*found[-1], *row))
    found = found[::-1] if reverse else found
    return [
        Value(
            part.kind, np.stack([row[at].data for row in found], axis), np.stack([row[at].error for row in found], axis)
        )
        for at, part in enumerate(found[0])
    ]


def cumulative(op: str, a: Value, axis: int, reverse: bool) -> Value:
    """tl.cumsum and tl.cumprod; any order of the additions is right."""
    a = _promoted(op, a)
    if a.kind not in FLOATS:
        combine = "add" if op == "cumsum" else "mul"
        return _running([a], axis, reverse, lambda x, y: [binary_integer(combine, x, y)])[0]
    if op == "cumprod":
        result = _running([a], axis, reverse, lambda x, y: [binary_float("mul", x, y)])[0]
        return Value(a.kind, result.data, result.error * 2)
    sign = -1 if reverse else 1
    parts = []
    for at in range(a.shape[axis]):
        upto = (slice(None),) * axis + (slice(0, at + 1) if sign > 0 else slice(at, None),)
        parts.append(_sum(a.map(lambda x, upto=upto: x[upto]), axis))
    return Value(a.kind, np.stack([p.data for p in parts], axis), np.stack([p.error for p in parts], axis))


# ---- own combine functions


def _larger(a: Value, i: Value, b: Value, j: Value) -> list[Value]:
    lost = unknown(a) | unknown(b) | unknown(i) | unknown(j)
    take = (a.data > b.data) | ((a.data == b.data) & (i.data < j.data))
    close = unknown(compare("lt", a, b)) | unknown(compare("eq", a, b))
    if a.kind in FLOATS:
        lost = lost | close | np.isnan(a.data) | np.isnan(b.data)
    error = np.where(lost, np.inf, np.where(take, a.error, b.error))
    index = Value(i.kind, np.where(take, i.data, j.data), np.where(lost, np.inf, 0.0))
    return [Value(a.kind, np.where(take, a.data, b.data), error), index]


def _both_ends(args: list[Value], axis: int) -> list[Value]:
    low = _fold(args[0], axis, lambda x, y: extreme("minimum", x, y, False))
    return [low, _fold(args[1], axis, lambda x, y: extreme("maximum", x, y, False))]


def _largest(args: list[Value], axis: int) -> list[Value]:
    return [x.map(lambda d: d.take(-1, axis)) for x in _running(args, axis, False, _larger)]


def _integer(op: str) -> Callable[[list[Value], int], list[Value]]:
    return lambda args, axis: [_fold(args[0], axis, lambda x, y: binary_integer(op, x, y))]


def _summary(args: list[Value], axis: int) -> list[Value]:
    """The largest of the first, and the sum of the second times exp of the first less the largest."""
    m, s = args
    top = _fold(m, axis, lambda x, y: extreme("maximum", x, y, False))
    shifted = m.data - np.expand_dims(top.data, axis)
    terms = s.data * np.exp(shifted)
    moved = np.abs(terms) * np.expm1(np.minimum(2 * m.error.max(axis, keepdims=True), 80.0))
    count = m.shape[axis]
    error = (moved + s.error).sum(axis) + 3 * count * FUNCTION_ERROR * np.abs(terms).sum(axis)
    lost = ~(np.isfinite(m.data) & np.isfinite(s.data)).all(axis) | (unknown(m) | unknown(s)).any(axis)
    lost |= (np.abs(s.data) > 1e30).any(axis) | (np.abs(m.data) > 1e30).any(axis)
    total = values.finish(m.kind, np.where(lost, 0.0, terms.sum(axis)), np.where(lost, np.inf, error), FUNCTION_ERROR)
    return [Value(m.kind, top.data, np.where(lost, np.inf, top.error)), total]


def _three_sums(args: list[Value], axis: int) -> list[Value]:
    a, b, c = args
    return [_sum(a, axis), _sum(b, axis), _fold(c, axis, lambda x, y: extreme("maximum", x, y, False))]


def _maps(a: Value, b: Value, c: Value, d: Value) -> list[Value]:
    return [binary_integer("mul", a, c), binary_integer("add", binary_integer("mul", b, c), d)]


def _last_set(a: Value, b: Value) -> list[Value]:
    lost = unknown(a) & ((b.data == 0) | unknown(b)) | unknown(b)
    return [Value(a.kind, np.where(b.data != 0, b.data, a.data), np.where(lost, np.inf, 0.0))]


REDUCE: dict[str, Callable[[list[Value], int], list[Value]]] = {
    "both_ends": _both_ends,
    "largest": _largest,
    "all_bits": _integer("and"),
    "any_bits": _integer("or"),
    "product": _integer("mul"),
    "summary": _summary,
    "three_sums": _three_sums,
}
SCAN: dict[str, Callable[[list[Value], int, bool], list[Value]]] = {
    "last_set": lambda args, axis, reverse: _running(args, axis, reverse, _last_set),
    "affine_map": lambda args, axis, reverse: _running(args, axis, reverse, _maps),
    "running_max": lambda args, axis, reverse: _running(
        args, axis, reverse, lambda x, y: [extreme("maximum", x, y, False)]
    ),
    "largest": lambda args, axis, reverse: _running(args, axis, reverse, _larger),
}


# ---- products


def _meet(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Where a product takes a marked element of its left or of its right side."""
    return np.logical_or(np.any(rows, 1, keepdims=True), np.any(columns, 0, keepdims=True))


def dot(a: Value, b: Value, start: Value | None = None) -> Value:
    """tl.dot: accumulated in fp32, or in int32 for int8."""
    if a.kind == "int8":
        data = a.data.astype(np.int64) @ b.data.astype(np.int64)
        error = _meet(unknown(a), unknown(b))
        if start is not None:
            data, error = data + start.data, error | unknown(start)
        return Value("int32", data.astype(np.int32), np.where(error, np.inf, 0.0))
    x, y, k = a.data, b.data, a.shape[1]
    terms = x[:, :, None] * y[None, :, :]
    ex, ey = a.error, b.error
    if start is not None:
        terms = np.concatenate([terms, start.data[:, None, :]], 1)
    special = np.any(~np.isfinite(terms), 1)
    lost = _meet(np.isinf(ex), np.isinf(ey)) | (special & _meet(ex > 0, ey > 0))
    total, size = terms.sum(1), _size(terms, 1)
    ex, ey = np.where(np.isinf(ex), 0.0, ex), np.where(np.isinf(ey), 0.0, ey)
    finite_x, finite_y = np.where(np.isfinite(x), np.abs(x), 0.0), np.where(np.isfinite(y), np.abs(y), 0.0)
    error = finite_x @ ey + ex @ finite_y + ex @ ey
    if start is not None:
        lost |= np.isinf(start.error)
        error = error + np.where(np.isinf(start.error), 0.0, start.error)
    # matrix units take numbers below the normal range as zero
    flushed = k * 2.0**-126 * (1.0 + finite_x.max(initial=0.0) + finite_y.max(initial=0.0))
    settled = _adds_exactly(terms, 1, "fp32") & (error == 0)
    error = np.where(settled, 0.0, error + (k + 2) * FORMATS["fp32"].unit * size + flushed)
    lost |= _may_overflow(total, size + error, "fp32")
    return values.finish("fp32", total, np.where(lost, np.inf, np.where(special, 0.0, error)))
