"""Loads and stores of a loop nest: whole vectors where lanes are neighbours in memory, lane by lane where not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from . import formulas
from .schedule import VIEWS, Index, operand_indices
from .ttir import Op, Value, constant_number

if TYPE_CHECKING:
    from .nest import Expression, Nest


class Address(NamedTuple):
    """Lane l of an access is at ``base + (j + l) * stride`` or, for a gather, at ``base + offsets[l]``."""

    base: str
    stride: str | None
    offsets: str | None = None

    def lane(self) -> str:
        """C++ for the address of lane ``l``."""
        if self.offsets is not None:
            return f"{self.base} + {self.offsets}[l]"
        return f"{self.base} + (int64_t)(j + l) * {self.stride}"


class Affine(NamedTuple):
    """An integer or pointer as ``base + stride * j``."""

    base: Expression
    stride: str


def load(nest: Nest, op: Op) -> None:
    value, width = op.result, nest.width
    kind, address = formulas.buffer_type(value.element), _address(nest, op.operands[0])
    # 16-bit numbers that nothing here computes with are moved as they are
    moved = value.element in formulas.HALVES and value not in nest.read_here and _leaves_zero(op)
    if moved:
        address = address._replace(base=f"((uint16_t*){address.base})")
        kind = "uint16_t"
    vector = f"V<uint16_t, {width}>" if moved else formulas.vector_type(value.element, width)
    lane = f"[&](int l) {{ return {address.lane()}; }}"
    if address.stride == "1":
        plain = f"load<{kind}, {width}>({address.base} + j)"
    elif address.stride == "0":
        lane_kind = kind if moved else formulas.lane_type(value.element)
        plain = f"broadcast<{lane_kind}, {width}>(read({address.base}))"
    else:
        plain = f"load_lanes<{kind}, {width}>(broadcast_mask<{width}>(true), {vector}{{}}, {lane})"
    if len(op.operands) > 1:
        has_other = len(op.operands) > 2 and not moved
        other = nest.vector(op.operands[2], nest.index) if has_other else f"{vector}{{}}"
        mask = nest.value(op.operands[1], nest.index)
        if mask.level < nest.rank:
            plain = f"{mask.text} ? {plain} : {other}"
        elif address.stride == "1":
            plain = f"load_masked<{kind}, {width}>({address.base} + j, {mask.text}, {other})"
        else:
            plain = f"load_lanes<{kind}, {width}>({mask.text}, {other}, {lane})"
    name = nest.name_vector(plain, vector)
    if moved:
        nest.put(f"store((uint16_t*)({nest.element(value, nest.index)}), {name});")
    else:
        nest.keep(value, name)


def _leaves_zero(op: Op) -> bool:
    """Whether lanes that the mask leaves out become 0."""
    if len(op.operands) < 3:
        return True
    source = op.operands[2]
    while source.op is not None and source.op.name in ("tt.splat", "tt.broadcast"):
        source = source.op.operands[0]
    if source.op is None or source.op.name != "arith.constant":
        return False
    number = constant_number(source.op)
    return number == 0 and math.copysign(1, number) == 1


def store(nest: Nest, op: Op) -> None:
    value, width = op.operands[1], nest.width
    kind, address = formulas.buffer_type(value.element), _address(nest, op.operands[0])
    x = nest.vector(value, nest.index)
    lane = f"[&](int l) {{ return {address.lane()}; }}"
    mask = nest.value(op.operands[2], nest.index) if len(op.operands) > 2 else None
    if mask is not None and mask.level == nest.rank:
        if address.stride == "1":
            return nest.put(f"store_masked<{kind}, {width}>({address.base} + j, {mask.text}, {x});")
        return nest.put(f"store_lanes<{kind}, {width}>({mask.text}, {x}, {lane});")
    plain = f"store_lanes<{kind}, {width}>(broadcast_mask<{width}>(true), {x}, {lane});"
    if address.stride == "1":
        plain = f"store({address.base} + j, {x});"
    nest.put(plain if mask is None else f"if ({mask.text}) {{ {plain} }}")


# ---- where lanes are


def _address(nest: Nest, pointer: Value) -> Address:
    affine = _affine(nest, pointer, nest.index)
    if affine is not None:
        return Address(affine.base.text, affine.stride)
    base, offsets = _gathered(nest, pointer, nest.index)
    return Address(base, None, nest.name_vector(offsets or "0", f"V<int64_t, {nest.width}>"))


def _varies(nest: Nest, value: Value, index: Index | None) -> bool:
    """Whether lanes differ."""
    if not value.shape or (index is not None and "j" not in index):
        return False
    op = value.op
    if index is None or not nest.schedule.is_inline(value) or op is None:
        return True
    if op.name == "arith.constant":
        return False
    if op.name == "tt.make_range":
        return True
    pairs = zip(op.operands, operand_indices(op, index), strict=True)
    return any(_varies(nest, operand, at) for operand, at in pairs)


def _affine(nest: Nest, value: Value, index: Index) -> Affine | None:
    """``value`` as a base plus a multiple of j, or None. As in Triton, address arithmetic must not overflow."""
    if not _varies(nest, value, index):
        return Affine(nest.value(value, index), "0")
    op = value.op
    if op is None or not nest.schedule.is_inline(value) or value.element in ("i8", "i16"):
        return None
    if op.name == "tt.make_range":
        return Affine(nest.expression(formulas.literal(op.number("start"), "i32"), 0), "1")
    indices = [at or () for at in operand_indices(op, index)]
    if op.name in VIEWS or op.name == "arith.extsi":
        return _affine(nest, op.operands[0], indices[0])
    if op.name == "tt.bitcast":
        inner = _affine(nest, op.operands[0], indices[0])
        kind = formulas.register_type(value.element)
        return inner and Affine(nest.expression(f"(({kind}){inner.base.text})", inner.base.level), inner.stride)
    if op.name not in ("arith.addi", "tt.addptr", "arith.muli"):
        return None
    parts = [_affine(nest, x, at) for x, at in zip(op.operands, indices, strict=True)]
    if parts[0] is None or parts[1] is None:
        return None
    (a, a_stride), (b, b_stride) = parts[0], parts[1]
    level = max(a.level, b.level)
    if op.name == "arith.muli":
        if "0" not in (a_stride, b_stride):
            return None
        stride = _times(a_stride, b.text) if b_stride == "0" else _times(b_stride, a.text)
        return Affine(nest.name_scalar(f"(int64_t){a.text} * {b.text}", "int64_t", level), stride)
    if op.name == "tt.addptr":
        kind = formulas.register_type(value.element)
        return Affine(nest.name_scalar(f"{a.text} + (int64_t){b.text}", kind, level), _plus(a_stride, b_stride))
    return Affine(nest.name_scalar(f"(int64_t){a.text} + {b.text}", "int64_t", level), _plus(a_stride, b_stride))


def _gathered(nest: Nest, pointer: Value, index: Index) -> tuple[str, str | None]:
    """(base, vector of 64-bit offsets) of pointers that differ by lane."""
    if not _varies(nest, pointer, index):
        return nest.value(pointer, index).text, None
    op = pointer.op
    if op is None or not nest.schedule.is_inline(pointer):
        raise AssertionError("a tensor of pointers is never stored")
    indices = [at or () for at in operand_indices(op, index)]
    if op.name in VIEWS:
        return _gathered(nest, op.operands[0], indices[0])
    if op.name == "tt.bitcast":
        base, offsets = _gathered(nest, op.operands[0], indices[0])
        return f"(({formulas.register_type(pointer.element)}){base})", offsets
    if op.name != "tt.addptr":
        raise op.unsupported("an address that is not a base plus offsets")
    base, offsets = _gathered(nest, op.operands[0], indices[0])
    step = nest.value(op.operands[1], indices[1])
    if step.level < nest.rank:
        return f"({base} + (int64_t){step.text})", offsets
    wide = f"convert<int64_t>({step.text})"
    return base, wide if offsets is None else f"({offsets} + {wide})"


def _times(stride: str, factor: str) -> str:
    return factor if stride == "1" else f"({stride} * {factor})"


def _plus(a: str, b: str) -> str:
    if "0" in (a, b):
        return b if a == "0" else a
    return f"({a} + {b})"
