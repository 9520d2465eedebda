"""A loop nest over a tile: the statements of one group, each line placed at the outermost loop that it depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from . import addresses, folds, formulas
from .formulas import ELEMENTWISE
from .schedule import VIEWS, Index, Statement, loop_index, operand_indices, root
from .ttir import Op, Value, constant_number

if TYPE_CHECKING:
    from .emit import Emitter


class Expression(NamedTuple):
    """text: a C++ name or literal. level: the loops it depends on, 0 for none; at the nest's rank it is a vector."""

    text: str
    level: int


class Nest:
    """Loops i0, i1, ... and, innermost, j by whole vectors. A line at level n stands inside the first n loops.

    statements: what will be written; a value that none of them reads need not be kept at hand.
    width: lanes of a vector; None takes as many as fit.
    """

    def __init__(
        self,
        emitter: Emitter,
        shape: tuple[int, ...],
        statements: Sequence[Statement] = (),
        width: int | None = None,
    ) -> None:
        self.emitter = emitter
        self.schedule = emitter.schedule
        self.shape = shape
        self.rank = len(shape)
        self.index = loop_index(shape)
        self.width = width or min(emitter.lanes, shape[-1])
        self.read_here = {value for statement in statements for value in statement.reads}
        self._lines: list[list[str]] = [[] for _ in range(self.rank + 1)]
        self._after: list[list[str]] = [[] for _ in range(self.rank + 1)]  # behind the loop inside of this level
        self._known: dict[tuple[Value, Index], Expression] = {}
        self._turned: set[int] = set()

    # ---- lines

    def put(self, line: str, level: int | None = None) -> None:
        self._lines[self.rank if level is None else level].append(line)

    def put_after(self, line: str, level: int) -> None:
        self._after[level].append(line)

    def turn(self, axis: int) -> None:
        """Lets the loop of ``axis`` run backwards."""
        self._turned.add(axis)

    def name_vector(self, text: str, kind: str) -> str:
        name = self.emitter.fresh("v")
        self.put(f"const {kind} {name} = {text};")
        return name

    def name_scalar(self, text: str, kind: str, level: int) -> Expression:
        name = self.emitter.fresh("v")
        self.put(f"{kind} const {name} = {text};", level)
        return Expression(name, level)

    def _name(self, text: str, element: str, level: int) -> Expression:
        if level == self.rank:
            return Expression(self.name_vector(text, formulas.vector_type(element, self.width)), level)
        return self.name_scalar(text, formulas.register_type(element), level)

    @staticmethod
    def expression(text: str, level: int) -> Expression:
        return Expression(text, level)

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
                variable, size = self.index[level], self.shape[level]
                step = self.width if level == self.rank - 1 else 1
                loop = f"int {variable} = 0; {variable} < {size}; {variable} += {step}"
                if level in self._turned:
                    loop = f"int {variable} = {size - step}; {variable} >= 0; {variable} -= {step}"
                write(f"for ({loop}) {{")
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
        return " + ".join([self.emitter.buffer(root(value)), *terms])

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
        if not self.schedule.is_inline(value):
            return self._read(value, index)
        assert value.op is not None
        return self._formula(value.op, value, index)

    def _formula(self, op: Op, value: Value, index: Index) -> Expression:
        """The element of a value that is not read from a buffer of its own."""
        if op.name == "arith.constant":
            return Expression(formulas.literal(constant_number(op), value.element), 0)
        if op.name == "tt.make_range":
            start, token = op.number("start"), index[0]
            if token == "j":
                text = f"iota<int32_t, {self.width}>() + (int32_t)(j + {start})"
                return self._name(text, "i32", self.rank)
            return Expression(f"(int32_t)({token} + {start})", self._level(token))
        if op.name == "tt.split":
            return self._half(op, op.results.index(value), index)
        if op.name == "tt.gather":
            return self._gather(op, index)
        indices = [at or () for at in operand_indices(op, index)]
        if op.name in VIEWS:
            return self.value(op.operands[0], indices[0])
        if op.name not in ELEMENTWISE:
            raise op.unsupported("no lowering")
        operands = [self.value(x, at) for x, at in zip(op.operands, indices, strict=True)]
        level = max(x.level for x in operands)
        is_vector = level == self.rank
        if is_vector and formulas.is_pointer(value.element):
            raise op.unsupported("an address that is not a base plus offsets")
        texts = [x.text for x in operands]
        if is_vector:
            texts = [self._as_vector(x, operand.element) for x, operand in zip(operands, op.operands, strict=True)]
        return self._name(formulas.element(op, texts, is_vector=is_vector), value.element, level)

    def _read(self, value: Value, index: Index) -> Expression:
        return self._read_place(self.element(value, index), value, index, 1)

    def _half(self, op: Op, which: int, index: Index) -> Expression:
        """An element of one of the two halves along the last dimension."""
        place = self.element(op.operands[0], (*index, str(which)))
        return self._read_place(place, op.results[which], index, 2)

    def _read_place(self, place: str, value: Value, index: Index, step: int) -> Expression:
        """step: how far apart in memory the elements of ``value`` are along its last dimension."""
        element, kind = value.element, formulas.buffer_type(value.element)
        if "j" not in index:
            return self._name(f"read({place}){' != 0' if element == 'i1' else ''}", element, self._depth(index))
        stride = step * math.prod(value.shape[index.index("j") + 1 :])
        if stride == 1:
            return self._name(f"load<{kind}, {self.width}>({place})", element, self.rank)
        return self._name(f"load_strided<{kind}, {self.width}>({place}, {stride})", element, self.rank)

    def _gather(self, op: Op, index: Index) -> Expression:
        source, axis = op.operands[0], op.number("axis")
        kind = formulas.buffer_type(source.element)
        chosen = self.value(op.operands[1], index)
        stride = math.prod(source.shape[axis + 1 :])
        rest = tuple("0" if at == axis else i for at, i in enumerate(index))
        place, varies = self.element(source, rest), index.index("j") if "j" in index else None
        if varies is None and chosen.level < self.rank:
            level = max(chosen.level, self._depth(rest))
            text = f"read({place} + {chosen.text} * {stride}){' != 0' if source.element == 'i1' else ''}"
            return self._name(text, source.element, level)
        lanes = self._as_vector(chosen, op.operands[1].element)
        # the place names lane 0: further lanes are further along, unless that is the axis gathered along
        step = 0 if varies in (None, axis) else math.prod(source.shape[varies + 1 :])
        text = f"gather<{kind}, {self.width}>({place}, {lanes}, {stride}, {step})"
        return self._name(text, source.element, self.rank)

    # ---- statements

    def statement(self, statement: Statement) -> None:
        op = statement.op
        if statement.kind == "elementwise":
            self._elementwise(op)
        elif statement.kind == "tt.load":
            addresses.load(self, op)
        elif statement.kind == "tt.store":
            addresses.store(self, op)
        elif statement.kind == "tt.reduce":
            folds.reduce(self, op)
        elif statement.kind == "tt.scan":
            folds.scan(self, op)
        elif statement.kind == "tt.join":
            self._join(op)
        else:
            raise op.unsupported("no lowering")

    def put_vector(self, buffer: str, shape: tuple[int, ...], value: Value) -> None:
        """Writes ``value`` to a buffer of its shape."""
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        place = " + ".join([buffer, *(f"{i} * {s}" for i, s in zip(self.index, strides, strict=True))])
        self.put(f"store({place}, {self.vector(value, self.index)});")

    def keep(self, value: Value, text: str) -> None:
        """Takes a stored value's vector: writes it to its buffer where that is wanted."""
        self.define(value, text)
        if value not in self.schedule.elided:
            self.put(f"store({self.element(value, self.index)}, {text});")

    def _elementwise(self, op: Op) -> None:
        if op.name == "arith.truncf" and op.result not in self.read_here:
            # writing to the buffer rounds
            return self.keep(op.result, self.vector(op.operands[0], self.index))
        for value in op.results:  # a split has two, of which one may be stored and one read where it is
            if value in self.schedule.stored:
                self.keep(value, self._as_vector(self._formula(op, value, self.index), value.element))

    def _join(self, op: Op) -> None:
        """The operands become the two elements of a new last dimension."""
        result = op.result
        for which, operand in enumerate(op.operands):
            place = self.element(result, (*self.index, str(which)))
            self.put(f"store_strided({place}, {self.vector(operand, self.index)}, 2);")
