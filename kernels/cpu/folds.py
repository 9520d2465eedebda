"""Reductions and scans of a loop nest, with any region that combines two elements of one or several operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import formulas
from .formulas import ELEMENTWISE
from .ttir import Op, Value, constant_number

if TYPE_CHECKING:
    from .nest import Nest


def combine(nest: Nest, op: Op) -> str:
    """The name of a function ``f(a0, a1, ..., b0, b1, ...)`` on vectors of any width, which replaces a by the result.

    The arguments' order is the elements': a stands before b.
    """
    region, count = op.regions[0], len(op.operands)
    names: dict[Value, str] = {value: f"{'ab'[at // count]}{at % count}" for at, value in enumerate(region.args)}
    lines: list[str] = []

    def operand(value: Value) -> str:
        if value in names:
            return names[value]
        if value.op is not None and value.op.name == "arith.constant":
            text = formulas.literal(constant_number(value.op), value.element)
        else:
            text = nest.emitter.scalar(value)
        return formulas.broadcast(text, value.element, "W")

    for inner in region.ops[:-1]:
        if inner.name == "arith.constant":
            continue
        if inner.name not in ELEMENTWISE or inner.regions:
            raise inner.unsupported("inside of a reduction or scan")
        names[inner.result] = f"x{len(names)}"
        text = formulas.element(inner, [operand(x) for x in inner.operands], is_vector=True)
        lines.append(f"const {formulas.vector_type(inner.result.element, 'W')} {names[inner.result]} = {text};")
    results = [operand(value) for value in region.terminator.operands]
    for at, (value, text) in enumerate(zip(region.terminator.operands, results, strict=True)):
        lines.append(f"const {formulas.vector_type(value.element, 'W')} y{at} = {text};")
    lines += [f"a{at} = y{at};" for at in range(count)]
    params = [f"auto& a{at}" for at in range(count)] + [f"auto b{at}" for at in range(count)]
    name = nest.emitter.fresh("combine")
    width = "constexpr int W = lanes<std::remove_reference_t<decltype(a0)>>();"
    nest.put(f"const auto {name} = [&]({', '.join(params)}) __attribute__((always_inline)) {{", 0)
    nest.put(f"  {width} {' '.join(lines)}", 0)
    nest.put("};", 0)
    return name


def reduce(nest: Nest, op: Op) -> None:
    axis, rank, width = op.number("axis"), nest.rank, nest.width
    function = combine(nest, op)
    elements = [nest.vector(operand, nest.index) for operand in op.operands]
    vectors = [formulas.vector_type(operand.element, width) for operand in op.operands]
    if axis != rank - 1:
        # along an outer loop: the results' buffers collect
        rest = nest.index[:axis] + nest.index[axis + 1 :]
        _collect(nest, op, function, elements, vectors, rest, rest, f"{nest.index[axis]} == 0")
        return
    totals = [nest.emitter.fresh("r") for _ in elements]
    for total, vector in zip(totals, vectors, strict=True):
        nest.put(f"{vector} {total};", rank - 1)
    first = " ".join(f"{total} = {x};" for total, x in zip(totals, elements, strict=True))
    nest.put(f"if (j == 0) {{ {first} }} else {function}({', '.join([*totals, *elements])});")
    nest.put_after(f"fold_lanes({', '.join([function, *totals])});", rank - 1)
    for total, result in zip(totals, op.results, strict=True):
        if result.shape:
            nest.put_after(f"write({nest.element(result, nest.index[:-1])}, {total}[0]);", rank - 1)
            continue
        name = nest.emitter.scalars[result] = nest.emitter.fresh("s")
        nest.emitter.write(f"{formulas.register_type(result.element)} {name};")
        nest.put_after(f"{name} = {total}[0];", rank - 1)


def scan(nest: Nest, op: Op) -> None:
    """Each element is combined with the result before it, read back from the results' own buffers.

    Along the last dimension a nest must have a width of 1; a reversed scan needs :meth:`Nest.turn` of its axis.
    """
    axis = op.number("axis")
    function = combine(nest, op)
    elements = [nest.vector(operand, nest.index) for operand in op.operands]
    vectors = [formulas.vector_type(operand.element, nest.width) for operand in op.operands]
    variable, step = nest.index[axis], -1 if is_reversed(op) else 1
    before = tuple(f"({i} - {step})" if at == axis else i for at, i in enumerate(nest.index))
    first = f"{variable} == {nest.shape[axis] - 1 if step < 0 else 0}"
    _collect(nest, op, function, elements, vectors, before, nest.index, first)


def is_reversed(op: Op) -> bool:
    return "reverse = true" in op.text


def _collect(
    nest: Nest, op: Op, function: str, elements: list[str], vectors: list[str],
    before: tuple[str, ...], here: tuple[str, ...], first: str,
) -> None:  # fmt: skip
    """Combines each element with what stands in the results' buffers at ``before`` and writes to ``here``."""
    totals = [nest.emitter.fresh("r") for _ in elements]
    for total, vector in zip(totals, vectors, strict=True):
        nest.put(f"{vector} {total};")
    old = " ".join(
        f"{total} = load<{formulas.buffer_type(result.element)}, {nest.width}>({nest.element(result, before)});"
        for total, result in zip(totals, op.results, strict=True)
    )
    start = " ".join(f"{total} = {x};" for total, x in zip(totals, elements, strict=True))
    update = f"{old} {function}({', '.join([*totals, *elements])});"
    nest.put(f"if ({first}) {{ {start} }} else {{ {update} }}")
    for total, result in zip(totals, op.results, strict=True):
        nest.put(f"store({nest.element(result, here)}, {total});")
