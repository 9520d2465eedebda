"""A loop nest over a tile: the statements of one group, each line placed at the outermost loop that it depends on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from . import formulas
from .schedule import ELEMENTWISE, VIEWS, Index, Statement, loop_index, operand_indices
from .ttir import Op, Value, constant_number

if TYPE_CHECKING:
    from .emit import Emitter


class Expression(NamedTuple):
    """text: a C++ name or literal. level: the loops it depends on, 0 for none; at the nest's rank it is a vector."""

    text: str
    level: int


class Address(NamedTuple):
    """Lane l of an access is at ``base + (j + l) * stride`` or, for a gather, at ``base + offsets[l]``."""

    base: str
    stride: str | None
    offsets: str | None = None


class Affine(NamedTuple):
    """An integer or pointer as ``base + stride * j``."""

    base: Expression
    stride: str


class Nest:
    """Loops i0, i1, ... and, innermost, j by whole vectors. A line at level n stands inside the first n loops."""

    def __init__(self, emitter: Emitter, shape: tuple[int, ...]) -> None:
        self.emitter = emitter
        self.schedule = emitter.schedule
        self.shape = shape
        self.rank = len(shape)
        self.index = loop_index(shape)
        self.width = min(emitter.lanes, shape[-1])
        self._lines: list[list[str]] = [[] for _ in range(self.rank + 1)]
        self._after: list[list[str]] = [[] for _ in range(self.rank + 1)]  # behind the loop inside of this level
        self._known: dict[tuple[Value, Index], Expression] = {}

    # ---- lines

    def put(self, line: str, level: int | None = None) -> None:
        self._lines[self.rank if level is None else level].append(line)

    def _name(self, text: str, level: int) -> Expression:
        name = self.emitter.fresh("v")
        self.put(f"const auto {name} = {text};", level)
        return Expression(name, level)

    def inlined(self) -> str:
        """All lines in one row: the body of a function of the loop variables."""
        return " ".join(line for lines in self._lines for line in lines)

    def close(self) -> None:
        write = self.emitter.write
        write("{")
        for level, lines in enumerate(self._lines):
            self.emitter.depth += 1
            for line in lines:
                write(line)
            if level < self.rank:
                variable = self.index[level]
                step = self.width if level == self.rank - 1 else 1
                write(f"for (int {variable} = 0; {variable} < {self.shape[level]}; {variable} += {step}) {{")
        for level in range(self.rank, -1, -1):
            for line in self._after[level]:
                write(line)
            self.emitter.depth -= 1
            write("}")

    # ---- what an expression depends on

    def _level(self, token: str) -> int:
        return 0 if token == "0" else self.index.index(token) + 1

    def _depth(self, index: Index) -> int:
        return max((self._level(token) for token in index), default=0)

    def element(self, value: Value, index: Index) -> str:
        """The address of a stored value's element."""
        strides = [math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape))]
        terms = [f"{i} * {s}" if s != 1 else i for i, s in zip(index, strides, strict=True) if i != "0"]
        return " + ".join([self.emitter.buffer(value), *terms])

    # ---- values

    def define(self, value: Value, text: str) -> None:
        """Makes a vector known under a name."""
        self._known[value, self.index] = Expression(text, self.rank)

    def vector(self, value: Value, index: Index) -> str:
        return self._as_vector(self.value(value, index), value.element)

    def _as_vector(self, expression: Expression, element: str) -> str:
        if expression.level == self.rank:
            return expression.text
        return formulas.broadcast(expression.text, element, self.width)

    def value(self, value: Value, index: Index) -> Expression:
        if not value.shape:
            return Expression(self.emitter.scalar(value), 0)
        key = (value, index)
        if key not in self._known:
            self._known[key] = self._compute(value, index)
        return self._known[key]

    def _compute(self, value: Value, index: Index) -> Expression:
        op = value.op
        if not self.schedule.is_inline(value):
            return self._read(value, index)
        assert op is not None
        if op.name == "arith.constant":
            return Expression(formulas.literal(constant_number(op), value.element), 0)
        if op.name == "tt.make_range":
            start, token = op.number("start"), index[0]
            if token == "j":
                return self._name(f"iota<int32_t, {self.width}>() + (int32_t)(j + {start})", self.rank)
            return Expression(f"(int32_t)({token} + {start})", self._level(token))
        if op.name in VIEWS:
            return self.value(op.operands[0], operand_indices(op, index)[0])
        if op.name not in ELEMENTWISE:
            raise op.unsupported("no lowering")
        return self._elementwise(op, index)

    def _elementwise(self, op: Op, index: Index) -> Expression:
        operands = [self.value(x, at) for x, at in zip(op.operands, operand_indices(op, index), strict=True)]
        level = max(x.level for x in operands)
        is_vector = level == self.rank
        if is_vector:
            if op.name == "tt.addptr":
                raise op.unsupported("an address that is not a base plus offsets")
            texts = [self._as_vector(x, operand.element) for x, operand in zip(operands, op.operands, strict=True)]
        else:
            texts = [x.text for x in operands]
        return self._name(formulas.element(op, texts, is_vector=is_vector), level)

    def _read(self, value: Value, index: Index) -> Expression:
        place, kind = self.element(value, index), formulas.buffer_type(value.element)
        if "j" not in index:
            return self._name(f"*({place}){' != 0' if value.element == 'i1' else ''}", self._depth(index))
        if index[-1] == "j":
            return self._name(f"load<{kind}, {self.width}>({place})", self.rank)
        stride = math.prod(value.shape[index.index("j") + 1 :])
        return self._name(f"load_strided<{kind}, {self.width}>({place}, {stride})", self.rank)

    # ---- addresses

    def _varies(self, value: Value, index: Index) -> bool:
        """Whether lanes differ."""
        if not value.shape or "j" not in index:
            return False
        op = value.op
        if not self.schedule.is_inline(value) or op is None:
            return True
        if op.name == "arith.constant":
            return False
        if op.name == "tt.make_range":
            return True
        pairs = zip(op.operands, operand_indices(op, index), strict=True)
        return any(self._varies(operand, at) for operand, at in pairs)

    def _affine(self, value: Value, index: Index) -> Affine | None:
        """``value`` as a base plus a multiple of j, or None. As in Triton, address arithmetic must not overflow."""
        if not self._varies(value, index):
            return Affine(self.value(value, index), "0")
        op = value.op
        if op is None or not self.schedule.is_inline(value):
            return None
        if op.name == "tt.make_range":
            return Affine(Expression(formulas.literal(op.number("start"), "i32"), 0), "1")
        indices = operand_indices(op, index)
        if op.name in VIEWS or op.name == "arith.extsi":
            return self._affine(op.operands[0], indices[0])
        if op.name not in ("arith.addi", "tt.addptr", "arith.muli"):
            return None
        parts = [self._affine(x, at) for x, at in zip(op.operands, indices, strict=True)]
        if parts[0] is None or parts[1] is None:
            return None
        (a, a_stride), (b, b_stride) = parts[0], parts[1]
        level = max(a.level, b.level)
        if op.name == "arith.muli":
            if "0" not in (a_stride, b_stride):
                return None
            stride = _times(a_stride, b.text) if b_stride == "0" else _times(b_stride, a.text)
            return Affine(self._name(f"(int64_t){a.text} * {b.text}", level), stride)
        offset = f"(int64_t){b.text}" if op.name == "tt.addptr" else b.text
        return Affine(self._name(f"{a.text} + {offset}", level), _plus(a_stride, b_stride))

    def _address(self, pointer: Value) -> Address:
        affine = self._affine(pointer, self.index)
        if affine is not None:
            return Address(affine.base.text, affine.stride)
        base, offsets = self._gathered(pointer, self.index)
        return Address(base, None, self._name(offsets or "0", self.rank).text)

    def _gathered(self, pointer: Value, index: Index) -> tuple[str, str | None]:
        """(base, vector of 64-bit offsets) of pointers that differ by lane."""
        if not self._varies(pointer, index):
            return self.value(pointer, index).text, None
        op = pointer.op
        if op is None or not self.schedule.is_inline(pointer):
            raise AssertionError("a tensor of pointers is never stored")
        indices = operand_indices(op, index)
        if op.name in VIEWS:
            return self._gathered(op.operands[0], indices[0])
        if op.name != "tt.addptr":
            raise op.unsupported("an address that is not a base plus offsets")
        base, offsets = self._gathered(op.operands[0], indices[0])
        step = self.value(op.operands[1], indices[1])
        if step.level < self.rank:
            return f"({base} + (int64_t){step.text})", offsets
        wide = f"convert<int64_t>({step.text})"
        return base, wide if offsets is None else f"({offsets} + {wide})"

    @staticmethod
    def _lane(address: Address) -> str:
        """C++ for the address of lane ``l``."""
        if address.offsets is not None:
            return f"{address.base} + {address.offsets}[l]"
        return f"{address.base} + (int64_t)(j + l) * {address.stride}"

    # ---- statements

    def statement(self, statement: Statement) -> None:
        if statement.kind == "elementwise":
            self._elementwise_statement(statement.op)
        elif statement.kind == "tt.load":
            self._load(statement.op)
        elif statement.kind == "tt.store":
            self._store(statement.op)
        elif statement.kind == "tt.reduce":
            self._reduce(statement.op)
        else:
            raise statement.op.unsupported("no lowering")

    def put_vector(self, buffer: str, shape: tuple[int, ...], value: Value) -> None:
        """Writes ``value`` to a buffer of its shape."""
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        place = " + ".join([buffer, *(f"{i} * {s}" for i, s in zip(self.index, strides, strict=True))])
        self.put(f"store({place}, {self.vector(value, self.index)});")

    def _keep(self, value: Value, text: str) -> None:
        self.define(value, text)
        if value not in self.schedule.elided:
            self.put(f"store({self.element(value, self.index)}, {text});")

    def _elementwise_statement(self, op: Op) -> None:
        value = op.result
        if op.name in VIEWS:
            operand = op.operands[0] if op.operands else None
            if operand is None:
                number = formulas.literal(constant_number(op), value.element)
                expression = Expression(number, 0)
            else:
                expression = self.value(operand, operand_indices(op, self.index)[0])
        else:
            expression = self._elementwise(op, self.index)
        self._keep(value, self._name(self._as_vector(expression, value.element), self.rank).text)

    def _load(self, op: Op) -> None:
        value, width = op.result, self.width
        kind, address = formulas.c_type(value.element), self._address(op.operands[0])
        lane = f"[&](int l) {{ return {self._lane(address)}; }}"
        if address.stride == "1":
            plain = f"load<{kind}, {width}>({address.base} + j)"
        elif address.stride == "0":
            plain = f"broadcast<{kind}, {width}>(*({address.base}))"
        else:
            plain = f"load_lanes<{kind}, {width}>(broadcast_mask<{width}>(true), V<{kind}, {width}>{{}}, {lane})"
        if len(op.operands) > 1:
            mask = self.value(op.operands[1], self.index)
            other = self.vector(op.operands[2], self.index) if len(op.operands) > 2 else f"V<{kind}, {width}>{{}}"
            if mask.level < self.rank:
                plain = f"{mask.text} ? {plain} : {other}"
            elif address.stride == "1":
                plain = f"load_masked<{kind}, {width}>({address.base} + j, {mask.text}, {other})"
            else:
                plain = f"load_lanes<{kind}, {width}>({mask.text}, {other}, {lane})"
        self._keep(value, self._name(plain, self.rank).text)

    def _store(self, op: Op) -> None:
        value, width = op.operands[1], self.width
        kind, address = formulas.c_type(value.element), self._address(op.operands[0])
        x = self.vector(value, self.index)
        lane = f"[&](int l) {{ return {self._lane(address)}; }}"
        mask = self.value(op.operands[2], self.index) if len(op.operands) > 2 else Expression("true", 0)
        if mask.level == self.rank:
            store = "store_masked" if address.stride == "1" else "store_lanes"
            place = f"{address.base} + j, {mask.text}, {x}" if store == "store_masked" else f"{mask.text}, {x}, {lane}"
            return self.put(f"{store}<{kind}, {width}>({place});")
        everywhere = f"broadcast_mask<{width}>(true)"
        plain = f"store_lanes<{kind}, {width}>({everywhere}, {x}, {lane});"
        if address.stride == "1":
            plain = f"store({address.base} + j, {x});"
        self.put(plain if mask.text == "true" else f"if ({mask.text}) {{ {plain} }}")

    def _reduce(self, op: Op) -> None:
        operand, result, axis = op.operands[0], op.result, op.number("axis")
        identity, formula = formulas.combine(op)
        kind, width = formulas.c_type(operand.element), self.width
        x = self.vector(operand, self.index)
        combine = f"[](auto a, auto b) {{ return {formula}; }}"
        if axis != self.rank - 1:
            # along an outer loop: the result's buffer collects
            rest = self.index[:axis] + self.index[axis + 1 :]
            size = math.prod(result.shape)
            buffer = self.emitter.buffer(result)
            self.put(f"for (int e = 0; e < {size}; ++e) {buffer}[e] = {identity};", 0)
            place = self.element(result, rest)
            self.put(f"store({place}, ({combine})(load<{kind}, {width}>({place}), {x}));")
            return
        total, level = self.emitter.fresh("r"), self.rank - 1
        self.put(f"V<{kind}, {width}> {total} = broadcast<{kind}, {width}>({identity});", level)
        self.put(f"{total} = ({combine})({total}, {x});")
        reduced = f"reduce<{kind}, {width}>({total}, {combine})"
        if result.shape:
            self._after[level].append(f"*({self.element(result, self.index[:-1])}) = {reduced};")
        else:
            name = self.emitter.scalars[result] = self.emitter.fresh("s")
            self.emitter.write(f"{kind} {name};")
            self._after[level].append(f"{name} = {reduced};")


def _times(stride: str, factor: str) -> str:
    return factor if stride == "1" else f"({stride} * {factor})"


def _plus(a: str, b: str) -> str:
    if "0" in (a, b):
        return b if a == "0" else a
    return f"({a} + {b})"
