"""From a scheduled function to the text of a C++ file with one entry point that runs a range of programs."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path

from . import formulas
from .nest import Nest
from .schedule import Group, Schedule, Statement, loop_index
from .ttir import Block, Function, Op, Value, constant_number, parse

ENTRY = "fastattn_run"
# what generated code stands on, in this order
_HEADERS = [Path(__file__).with_name(name) for name in ("vectors.h", "functions.h", "products.h")]


def generate(ttir: str, lanes: int) -> str:
    """C++ for a kernel's TTIR. lanes: how many 32-bit lanes the machine's vectors have (16, 8 or 4).

    The file exports ``void fastattn_run(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end)``, which
    runs the programs begin .. end - 1 (program x + grid[0] * (y + grid[1] * z)). Each argument stands in one 64-bit
    slot: an address, an integer, or a float's bits.

    Raises:
        Unsupported: the kernel uses what the engine does not cover.
    """
    return "".join(header.read_text() for header in _HEADERS) + Emitter(parse(ttir), lanes).text()


class Emitter:
    """Walks the blocks; loops over tiles are written by :class:`Nest`."""

    def __init__(self, function: Function, lanes: int) -> None:
        self.function = function
        self.lanes = lanes
        self.schedule = Schedule(function.body)
        self.lines: list[str] = []
        self.depth = 1
        self.scalars: dict[Value, str] = {}
        self.buffers: dict[Value, str] = {}
        self._declared: list[str] = []
        self._numbers = count()

    # ---- names and lines

    def write(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def fresh(self, stem: str) -> str:
        return f"{stem}{next(self._numbers)}"

    def declare(self, element: str, size: int) -> str:
        name = self.fresh("b")
        self._declared.append(f"  alignas(64) {formulas.buffer_type(element)} {name}[{size}];")
        return name

    def buffer(self, value: Value) -> str:
        """The name of a stored value's buffer, which is row-major."""
        if value not in self.buffers:
            if value in self.schedule.shared:
                self.buffers[value] = self.buffer(self.schedule.shared[value])
            else:
                self.buffers[value] = self.declare(value.element, math.prod(value.shape))
        return self.buffers[value]

    def scalar(self, value: Value) -> str:
        """The C++ name or literal of a value of rank 0."""
        if value in self.scalars:
            return self.scalars[value]
        if value.op is not None and value.op.name == "arith.constant":
            return formulas.literal(constant_number(value.op), value.element)
        raise AssertionError(f"{value.op.name if value.op else 'argument'} was not computed")

    # ---- the file

    def text(self) -> str:
        unpack = []
        for at, arg in enumerate(self.function.args):
            name = self.scalars[arg] = f"arg{at}"
            kind = formulas.c_type(arg.element)
            unpack.append(f"  {kind} {name}; memcpy(&{name}, args + {at}, sizeof {name});")
        self.block(self.function.body)
        body = "\n".join(self.lines)
        buffers = "\n".join(self._declared)
        return f"""
namespace {{
__attribute__((noinline)) void program(const int64_t* args, const int32_t* grid, int32_t pid_x, int32_t pid_y,
                                       int32_t pid_z) {{
{chr(10).join(unpack)}
{buffers}
{body}
}}
}}  // namespace

extern "C" __attribute__((visibility("default")))
void {ENTRY}(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end) {{
  for (int64_t p = begin; p < end; ++p)
    program(args, grid, (int32_t)(p % grid[0]), (int32_t)(p / grid[0] % grid[1]),
            (int32_t)(p / ((int64_t)grid[0] * grid[1])));
}}
"""

    # ---- blocks

    def block(self, block: Block) -> None:
        for op in block.ops:
            if op.name == "scf.for":
                self.schedule.share_buffers(op, block)
        for group in self.schedule.groups[block]:
            self._group(group)

    def _group(self, group: Group) -> None:
        first = group.statements[0]
        if group.space is None:
            self._scalar_statement(first)
        elif first.kind == "tt.dot":
            self._dot(group)
        elif first.kind == "transpose":
            self._transpose(first.op)
        else:
            nest = Nest(self, group.space)
            for statement in group.statements:
                nest.statement(statement)
            nest.close()

    def _scalar_statement(self, statement: Statement) -> None:
        op = statement.op
        if op.name == "scf.for":
            return self._for(op)
        if op.name == "scf.if":
            return self._if(op)
        operands = [self.scalar(x) for x in op.operands]
        if op.name == "tt.store":
            guard = f"if ({operands[2]}) " if len(operands) > 2 else ""
            return self.write(f"{guard}*{operands[0]} = {operands[1]};")
        if op.name == "tt.get_program_id":
            text = f"pid_{op.text[0]}"
        elif op.name == "tt.get_num_programs":
            text = f"grid[{'xyz'.index(op.text[0])}]"
        elif op.name == "tt.load":
            other = operands[2] if len(operands) > 2 else "0"
            text = f"*{operands[0]}" if len(operands) == 1 else f"{operands[1]} ? *{operands[0]} : {other}"
        else:
            text = formulas.element(op, operands, is_vector=False)
        name = self.scalars[op.result] = self.fresh("s")
        self.write(f"{formulas.c_type(op.result.element)} const {name} = {text};")

    # ---- control flow

    def _for(self, op: Op) -> None:
        body = op.regions[0]
        index, carried = body.args[0], body.args[1:]
        for value, initial, result in zip(carried, op.operands[3:], op.results, strict=True):
            self._start(value, initial)
            self._alias(result, value)
        name = self.scalars[index] = self.fresh("n")
        low, high, step = (self.scalar(x) for x in op.operands[:3])
        kind = formulas.c_type(index.element)
        self.write(f"for ({kind} {name} = {low}; {name} < {high}; {name} += {step}) {{")
        self.depth += 1
        self.block(body)
        self._assign(carried, body.terminator.operands if carried else [])
        self.depth -= 1
        self.write("}")

    def _if(self, op: Op) -> None:
        for result in op.results:
            if result.shape:
                self.buffer(result)
            else:
                self.scalars[result] = self.fresh("s")
                self.write(f"{formulas.c_type(result.element)} {self.scalars[result]};")
        for at, region in enumerate(op.regions):
            self.write(f"if ({self.scalar(op.operands[0])}) {{" if at == 0 else "} else {")
            self.depth += 1
            self.block(region)
            self._assign(op.results, region.terminator.operands if op.results else [])
            self.depth -= 1
        self.write("}")

    def _alias(self, result: Value, value: Value) -> None:
        if value.shape:
            self.buffers[result] = self.buffer(value)
        else:
            self.scalars[result] = self.scalars[value]

    def _start(self, value: Value, initial: Value) -> None:
        """Gives a loop-carried value its place and its first content."""
        if not value.shape:
            text = self.scalar(initial)
            self.scalars[value] = self.fresh("c")
            return self.write(f"{formulas.c_type(value.element)} {self.scalars[value]} = {text};")
        if self.schedule.shared.get(initial) is not value:
            self._fill(self.buffer(value), initial)

    def _fill(self, target: str, value: Value) -> None:
        nest = Nest(self, value.shape)
        nest.put_vector(target, value.shape, value)
        nest.close()

    def _assign(self, targets: list[Value], values: list[Value]) -> None:
        """All targets at once: what is read and also overwritten goes through a copy."""
        late: list[str] = []
        for target, value in zip(targets, values, strict=True):
            if not target.shape:
                name = self.fresh("t")
                self.write(f"const auto {name} = {self.scalar(value)};")
                late.append(f"{self.scalars[target]} = {name};")
                continue
            place = self.buffer(target)
            if value not in self.schedule.stored and not self._is_kept_apart(value):
                copy = self.declare(value.element, math.prod(value.shape))
                self._fill(copy, value)
                late.append(f"memcpy({place}, {copy}, sizeof {place});")
            elif self.buffer(value) != place:
                late.append(f"memcpy({place}, {self.buffer(value)}, sizeof {place});")
        for line in late:
            self.write(line)

    def _is_kept_apart(self, value: Value) -> bool:
        """A value with a buffer that no assignment of this round overwrites: the result of inner control flow."""
        return value.op is not None and value.op.name in ("scf.for", "scf.if")

    # ---- products

    def _transpose(self, op: Op) -> None:
        source, target = op.operands[0], op.result
        if len(source.shape) != 2 or source.element != "f32":
            raise op.unsupported(f"a transposed right operand of type {source.element}, rank {len(source.shape)}")
        rows, columns = source.shape
        width = min(self.lanes, rows, columns)
        self.write(f"transpose<{rows}, {columns}, {width}>({self.buffer(source)}, {self.buffer(target)});")

    def _dot(self, group: Group) -> None:
        op = group.statements[0].op
        a, b, c = op.operands
        if any(x.element != "f32" for x in (a, b, c)) or len(op.result.shape) != 2:
            raise op.unsupported(f"operands {a.element} x {b.element} + {c.element} of rank {len(op.result.shape)}")
        (m, n), k = op.result.shape, a.shape[1]
        a_row, a_column = k, 1
        if self.schedule.is_inline(a):  # a transposition: read down the columns
            assert a.op is not None
            a, a_row, a_column = a.op.operands[0], 1, m
        here = loop_index(op.result.shape)
        start = Nest(self, op.result.shape)
        initial = start.vector(c, here)
        finish = Nest(self, op.result.shape)
        finish.define(op.result, "x")
        if op.result not in self.schedule.elided:
            finish.put(f"store({finish.element(op.result, here)}, x);")
        for statement in group.statements[1:]:
            finish.statement(statement)
        width = finish.width
        vector = f"V<float, {width}>"
        inline = "__attribute__((always_inline))"
        self.write(f"product<float, {m}, {n}, {k}, {width}, {a_row}, {a_column}>({self.buffer(a)}, {self.buffer(b)},")
        self.write(f"  [&](int i0, int j) {inline} -> {vector} {{ {start.inlined()} return {initial}; }},")
        self.write(f"  [&](int i0, int j, {vector} x) {inline} {{ {finish.inlined()} }});")
