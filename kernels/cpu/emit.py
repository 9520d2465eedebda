"""From a scheduled function to the text of a C++ file with one entry point that runs a range of programs."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import count
from pathlib import Path

from ..errors import Unsupported
from . import formulas
from .folds import is_reversed
from .nest import Nest
from .schedule import Group, Schedule, Statement, loop_index, product_operand, root
from .ttir import Block, Function, Op, Value, constant_number, parse

ENTRY = "fastattn_run"
# element types of the operands and of the accumulator
_PRODUCTS = [{"f32"}, {"f16", "f32"}, {"bf16", "f32"}, {"i8", "i32"}]
# what a program's tiles may take of a thread's stack, which has 8 MiB as a rule
MOST_STACK_BYTES = 2 * 2**20
# what generated code stands on, in this order
_HEADERS = ("vectors.h", "halves.h", "memory.h", "functions.h", "products.h")


def generate(ttir: str, lanes: int) -> str:
    """C++ for a kernel's TTIR. lanes: how many 32-bit lanes the machine's vectors have (16, 8 or 4).

    The file exports ``void fastattn_run(const int64_t* args, const int32_t* grid, int64_t begin, int64_t end)``, which
    runs the programs begin .. end - 1 (program x + grid[0] * (y + grid[1] * z)). Each argument stands in one 64-bit
    slot: an address, an integer, or a float's bits.

    Raises:
        Unsupported: the kernel uses what the engine does not cover.
    """
    return prelude() + Emitter(parse(ttir), lanes).text()


@lru_cache
def prelude() -> str:
    """What every text that :func:`generate` gives begins with."""
    return "".join(Path(__file__).with_name(name).read_text() for name in _HEADERS)


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
        self._stack_bytes = 0
        self._fits_amx: dict[str, None] = {}  # whether any of these products does
        self._numbers = count()

    # ---- names and lines

    def write(self, line: str) -> None:
        self.lines.append("  " * self.depth + line)

    def fresh(self, stem: str) -> str:
        return f"{stem}{next(self._numbers)}"

    def declare(self, element: str, size: int) -> str:
        name = self.fresh("b")
        self._stack_bytes += size * formulas.buffer_bytes(element)
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
            kind = formulas.register_type(arg.element)
            unpack.append(f"  {kind} {name}; memcpy(&{name}, args + {at}, sizeof {name});")
        self.block(self.function.body)
        if self._stack_bytes > MOST_STACK_BYTES:
            kib = self._stack_bytes // 1024
            most = MOST_STACK_BYTES // 1024
            raise Unsupported(f"the tiles of {self.function.name} take {kib} KiB, more than {most}: use smaller blocks")
        body = "\n".join(self.lines)
        buffers = "\n".join(self._declared)
        session = f"  const AmxSession<{' || '.join(self._fits_amx)}> session{{}};\n" if self._fits_amx else ""
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
{session}  for (int64_t p = begin; p < end; ++p)
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
        elif first.kind == "tt.scan":
            self._scan(first)
        else:
            nest = Nest(self, group.space, group.statements)
            for statement in group.statements:
                nest.statement(statement)
            nest.close()

    def _scan(self, statement: Statement) -> None:
        op, axis = statement.op, statement.op.number("axis")
        shape = op.operands[0].shape
        nest = Nest(self, shape, [statement], width=1 if axis == len(shape) - 1 else None)
        if is_reversed(op):
            nest.turn(axis)
        nest.statement(statement)
        nest.close()

    def _scalar_statement(self, statement: Statement) -> None:
        op = statement.op
        if op.name == "scf.for":
            return self._for(op)
        if op.name == "scf.if":
            return self._if(op)
        if op.name == "scf.while":
            return self._while(op)
        if op.name == "tt.unsplat":
            place = self.buffer(root(op.operands[0]))
            return self._define(op.result, f"read({place}){' != 0' if op.result.element == 'i1' else ''}")
        operands = [self.scalar(x) for x in op.operands]
        if op.name == "tt.store":
            guard = f"if ({operands[2]}) " if len(operands) > 2 else ""
            return self.write(f"{guard}write({operands[0]}, {operands[1]});")
        if op.name == "tt.get_program_id":
            text = f"pid_{op.text[0]}"
        elif op.name == "tt.get_num_programs":
            text = f"grid[{'xyz'.index(op.text[0])}]"
        elif op.name == "tt.load":
            other = operands[2] if len(operands) > 2 else "0"
            text = f"read({operands[0]})"
            text = text if len(operands) == 1 else f"{operands[1]} ? {text} : {other}"
        else:
            text = formulas.element(op, operands, is_vector=False)
        self._define(op.result, text)

    def _define(self, value: Value, text: str) -> None:
        name = self.scalars[value] = self.fresh("s")
        self.write(f"{formulas.register_type(value.element)} const {name} = {text};")

    # ---- control flow

    def _for(self, op: Op) -> None:
        body = op.regions[0]
        index, carried = body.args[0], body.args[1:]
        for value, initial, result in zip(carried, op.operands[3:], op.results, strict=True):
            self._start(value, initial)
            self._alias(result, value)
        name = self.scalars[index] = self.fresh("n")
        low, high, step = (self.scalar(x) for x in op.operands[:3])
        # counted in 64 bits: the step beyond the last index may not fit into the index's own type
        wide = self.fresh("n")
        self.write(f"for (int64_t {wide} = {low}; {wide} < {high}; {wide} += {step}) {{")
        self.depth += 1
        self.write(f"const auto {name} = ({formulas.register_type(index.element)}){wide};")
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
                self.write(f"{formulas.register_type(result.element)} {self.scalars[result]};")
        for at, region in enumerate(op.regions):
            self.write(f"if ({self.scalar(op.operands[0])}) {{" if at == 0 else "} else {")
            self.depth += 1
            self.block(region)
            self._assign(op.results, region.terminator.operands if op.results else [])
            self.depth -= 1
        self.write("}")

    def _while(self, op: Op) -> None:
        before, body = op.regions
        for value, initial in zip(before.args, op.operands, strict=True):
            self._start(value, initial)
        # the condition's operands are what the body starts from and, in the end, the results
        for value, result in zip(body.args, op.results, strict=True):
            if not value.shape:
                self.scalars[value] = self.fresh("c")
                self.write(f"{formulas.register_type(value.element)} {self.scalars[value]};")
            self._alias(result, value)
        self.write("for (;;) {")
        self.depth += 1
        self.block(before)
        condition, *given = before.terminator.operands
        self._assign(body.args, given)
        self.write(f"if (!{self.scalar(condition)}) break;")
        self.block(body)
        self._assign(before.args, body.terminator.operands if before.args else [])
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
            return self.write(f"{formulas.register_type(value.element)} {self.scalars[value]} = {text};")
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
        return value.op is not None and value.op.name in ("scf.for", "scf.if", "scf.while")

    # ---- products

    def _dot(self, group: Group) -> None:
        op = group.statements[0].op
        (a, a_transposed), (b, b_transposed) = (product_operand(x) for x in op.operands[:2])
        c, shape = op.operands[2], op.result.shape
        if {a.element, b.element, c.element, op.result.element} not in _PRODUCTS or a.element != b.element:
            raise op.unsupported(f"operands {a.element} x {b.element} + {c.element}")
        here = loop_index(shape)
        start = Nest(self, shape)
        initial = start.vector(c, here)
        finish = Nest(self, shape, group.statements)
        finish.define(op.result, "x")
        finish.keep(op.result, "x")
        for statement in group.statements[1:]:
            finish.statement(statement)
        (*batch, m, n), k = shape, op.operands[0].shape[-1]
        self._stack_bytes += 4 * ((m + n) * k + 32 * n)  # what a product may turn or pack, and its sums in AMX
        kind, vector = formulas.buffer_type(a.element), formulas.vector_type(c.element, finish.width)
        for axis, size in enumerate(batch):
            self.write(f"for (int i{axis} = 0; i{axis} < {size}; ++i{axis})")
        place = " + ".join(f"i{axis} * {math.prod(batch[axis + 1 :])}" for axis in range(len(batch)))
        left, right = (
            self.buffer(root(x)) + (f" + ({place}) * {size * k}" if batch else "") for x, size in ((a, m), (b, n))
        )
        sides = ", ".join(f"{kind}, {'true' if flag else 'false'}" for flag in (a_transposed, b_transposed))
        inline, row = "__attribute__((always_inline))", here[-2]
        self._fits_amx[f"fits_amx<{kind}, {m}, {n}, {k}, {finish.width}>()"] = None
        self.write(f"product<{formulas.lane_type(c.element)}, {m}, {n}, {k}, {finish.width}, {sides}>({left}, {right},")
        self.write(f"  [&](int {row}, int j) {inline} -> {vector} {{ {start.inlined()} return {initial}; }},")
        self.write(f"  [&](int {row}, int j, {vector} x) {inline} {{ {finish.inlined()} }});")
