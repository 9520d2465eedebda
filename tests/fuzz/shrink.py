"""Makes a failing program smaller for as long as it still fails."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

from .evaluate import Ambiguous, Evaluator, Invalid
from .program import FLOATS, Node, Program, walk

Step = Callable[[], Program]
Kinds = dict[str, tuple[str, tuple[int, ...]]]
AT_ONCE = 6  # candidates that are built together


def shrink(program: Program, failing: Callable[[list[Program]], list[bool]], seconds: float = 300.0) -> Program:
    """The smallest program found. failing: which of some programs still fail; asked for several at a time."""
    end = time.monotonic() + seconds
    progress = True
    while progress:
        progress = False
        for way in (_without_statements, _without_control, _constants, _simpler_arguments, _smaller_sizes, _unused):
            at = 0
            steps = list(way(program))
            while at < len(steps) and time.monotonic() < end:
                tried, at = at, min(at + AT_ONCE, len(steps))
                candidates = [(number, steps[number]()) for number in range(tried, at)]
                candidates = [(number, x) for number, x in candidates if _has_meaning(x)]
                verdicts = failing([x for _, x in candidates]) if candidates else []
                better = next((x for x, fails in zip(candidates, verdicts, strict=True) if fails), None)
                if better is not None:
                    at, program = better  # the steps before it were tried already
                    progress, steps = True, list(way(program))
    return program


def _has_meaning(program: Program) -> bool:
    try:
        Evaluator(program).run()
    except (Invalid, Ambiguous):
        return False
    return True


def _kinds(program: Program) -> Kinds:
    run = Evaluator(program)
    run.run()
    return run.kinds


def _blocks(program: Program) -> Iterator[list[Node]]:
    yield program.body
    for node in walk(program.body):
        yield from node.blocks


def _read(program: Program) -> set[str]:
    return {name for node in walk(program.body) for name in node.args}


def swept(program: Program) -> Program:
    """Without what nothing reads."""
    while True:
        read, found = _read(program), False
        for block in _blocks(program):
            kept = [
                x for x in block
                if x.op in ("yield", "store") or any(name in read for name in x.outs) or (x.blocks and _stores(x))
            ]  # fmt: skip
            found |= len(kept) < len(block)
            block[:] = kept
        if not found:
            return program


def _stores(node: Node) -> bool:
    return any(x.op == "store" for block in node.blocks for x in walk(block))


def _changed(program: Program, change: Callable[[list[list[Node]]], None]) -> Step:
    """A copy after ``change``, which works on its blocks, without what nothing reads any more."""

    def step() -> Program:
        other = copy.deepcopy(program)
        change(list(_blocks(other)))
        return swept(other)

    return step


def _edited(program: Program, edit: Callable[[Program], None]) -> Step:
    def step() -> Program:
        other = copy.deepcopy(program)
        edit(other)
        return other

    return step


def _chunks(count: int) -> Iterator[range]:
    """All, halves, quarters, ... single ones."""
    width = count
    while width >= 1:
        yield from (range(start, min(start + width, count)) for start in range(0, count, width))
        width //= 2


def _without_statements(program: Program) -> Iterator[Step]:
    """Without some of the stores, and so without what only they read."""
    stores = [(b, at) for b, block in enumerate(_blocks(program)) for at, x in enumerate(block) if x.op == "store"]
    for chunk in _chunks(len(stores)):
        gone = {stores[number] for number in chunk}

        def drop(blocks: list[list[Node]], gone: set[tuple[int, int]] = gone) -> None:
            for b, block in enumerate(blocks):
                block[:] = [x for at, x in enumerate(block) if (b, at) not in gone]

        if len(gone) < len(stores):
            yield _changed(program, drop)


def _rename(blocks: list[list[Node]], names: dict[str, str]) -> None:
    for block in blocks:
        for node in block:
            node.args = [names.get(x, x) for x in node.args]


def _without_control(program: Program) -> Iterator[Step]:
    """A loop's body once or not at all, one side of a branch, a value carried in vain."""
    places = [(b, at) for b, block in enumerate(_blocks(program)) for at, x in enumerate(block) if x.blocks]
    for b, at in places:
        for way in range(2):

            def unroll(blocks: list[list[Node]], b: int = b, at: int = at, way: int = way) -> None:
                node = blocks[b][at]
                if node.op == "if":
                    inner, before = node.blocks[way], {}
                    after = dict(zip(node.outs, inner[-1].args, strict=True))
                else:
                    initial = node.args[3 if node.op == "for" else 1 :]
                    inner = node.blocks[0] if way else []
                    before = dict(zip(node.outs, initial, strict=True))
                    if node.op == "for":
                        before[node.attrs["index"]] = node.args[0]
                    last = [before.get(x, x) for x in node.blocks[0][-1].args] if way else initial
                    after = dict(zip(node.outs, last, strict=True))
                nested = [inner, *(block for x in walk(inner) for block in x.blocks)]
                _rename(nested, before)
                _rename([block for block in blocks if block not in nested and block is not blocks[b]], after)
                blocks[b][at : at + 1] = inner[:-1]
                for x in blocks[b][at + len(inner[:-1]) :]:
                    x.args = [after.get(name, name) for name in x.args]

            yield _changed(program, unroll)
    for b, at in places:
        node = next(block for i, block in enumerate(_blocks(program)) if i == b)[at]
        for which in range(1 if node.op == "while" else 0, len(node.outs)):

            def uncarry(blocks: list[list[Node]], b: int = b, at: int = at, which: int = which) -> None:
                node = blocks[b][at]
                name = node.outs.pop(which)
                if node.op != "if":
                    first = node.args.pop(which + (3 if node.op == "for" else 1))
                else:
                    first = node.blocks[0][-1].args[which]
                for block in node.blocks:
                    block[-1].args.pop(which)
                _rename(blocks, {name: first})

            yield _changed(program, uncarry)


def _constants(program: Program) -> Iterator[Step]:
    """The results of some statements as constants."""
    kinds = _kinds(program)
    places = [
        (b, at)
        for b, block in enumerate(_blocks(program))
        for at, node in enumerate(block)
        if node.op not in ("full", "store", "yield", "affine", "bounds")
        and node.outs
        and node.outs != ["own"]
        and all(name in kinds for name in node.outs)
    ][::-1]
    for chunk in _chunks(len(places)):

        def fix(blocks: list[list[Node]], chunk: range = chunk) -> None:
            gone = {places[number] for number in chunk}
            for b, block in enumerate(blocks):
                new = []
                for at, node in enumerate(block):
                    new += [_constant(name, *kinds[name]) for name in node.outs] if (b, at) in gone else [node]
                block[:] = new

        yield _changed(program, fix)


def _constant(name: str, kind: str, shape: tuple[int, ...]) -> Node:
    value = True if kind == "int1" else 1.0 if kind in FLOATS else 1
    return Node("full", [name], [], {"shape": list(shape), "value": value, "kind": kind})


def _simpler_arguments(program: Program) -> Iterator[Step]:
    """A result replaced by an operand of its type; plain addresses; no mask; nothing carried on from a loop."""
    kinds = _kinds(program)
    for b, block in enumerate(list(_blocks(program))):
        for at, node in enumerate(block):
            if len(node.outs) == 1 and node.op not in ("for", "while", "if"):
                for arg in dict.fromkeys(node.args):
                    if kinds.get(arg) == kinds.get(node.outs[0]) and arg in kinds and node.op != "copy":

                        def skip(blocks: list[list[Node]], b: int = b, at: int = at, arg: str = arg) -> None:
                            name = blocks[b].pop(at).outs[0]
                            _rename(blocks, {name: arg})

                        yield _changed(program, skip)
            for simpler in _simpler(node):

                def replace(blocks: list[list[Node]], b: int = b, at: int = at, simpler: Node = simpler) -> None:
                    blocks[b][at] = copy.deepcopy(simpler)

                yield _changed(program, replace)


def _simpler(node: Node) -> Iterator[Node]:
    def other(args: list[str], **attrs: object) -> Node:
        return Node(node.op, node.outs, args, node.attrs | attrs, node.blocks)

    if node.op == "affine":
        if node.args:
            yield other([])
        if node.attrs["offset"] or any(node.attrs["starts"]):
            yield other(node.args, offset=0, starts=[0] * len(node.attrs["starts"]))
        strides, step = [0] * len(node.attrs["shape"]), 1
        for axis in reversed(range(len(strides))):
            strides[axis] = step
            step *= node.attrs["shape"][axis]
        if strides != node.attrs["strides"]:
            yield other([], offset=0, starts=[0] * len(strides), strides=strides)
    elif node.op == "store" and node.attrs["mask"]:
        yield other(node.args[:-1], mask=False)
    elif node.op == "load" and node.attrs["mask"]:
        if node.attrs["other"]:
            yield other(node.args[:-1], other=False, literal=0)
        plain = Node(
            node.op, node.outs, node.args[: 1 + node.attrs["base"]], node.attrs | {"mask": False, "other": False}
        )
        plain.attrs.pop("literal", None)
        yield plain
    elif node.op == "load" and node.attrs["base"]:
        yield other(node.args[:1], base=False)


def _smaller_sizes(program: Program) -> Iterator[Step]:
    """Fewer programs, smaller arguments, every tile's size halved where it occurs."""

    def with_grid(other: Program) -> None:
        other.grid = [1]

    if program.grid != [1]:
        yield _edited(program, with_grid)
    for at, param in enumerate(program.params):
        fills: set[int] | set[str] = set()
        if param.role == "scalar" and param.name != "slice" and isinstance(param.fill, int) and param.fill > 0:
            fills = {0, 1, param.fill - 1} - {param.fill}
        elif param.role == "input" and param.fill in ("normal", "full"):
            fills = {"whole" if param.kind in FLOATS else "small"}
        for fill in fills:

            def refill(other: Program, at: int = at, fill: object = fill) -> None:
                other.params[at].fill = fill

            yield _edited(program, refill)
    sizes = {size for node in walk(program.body) for size in node.attrs.get("shape", [])} - {1}
    for size in sorted(sizes, reverse=True):
        for smaller in dict.fromkeys((1, size // 2)):

            def everywhere(other: Program, size: int = size, smaller: int = smaller) -> None:
                for node in walk(other.body):
                    if "shape" in node.attrs:
                        node.attrs["shape"] = [smaller if x == size else x for x in node.attrs["shape"]]

            yield _edited(program, everywhere)
    for number, node in enumerate(walk(program.body)):
        for axis, size in enumerate(node.attrs.get("shape", [])):
            if size > 1:

                def once(other: Program, number: int = number, axis: int = axis) -> None:
                    list(walk(other.body))[number].attrs["shape"][axis] //= 2

                yield _edited(program, once)

    def with_level(other: Program) -> None:
        other.level = 0

    if program.level:
        yield _edited(program, with_level)


def _unused(program: Program) -> Iterator[Step]:
    """Without the arguments that nothing uses."""
    named = _read(program) | {x.attrs["buffer"] for x in walk(program.body) if "buffer" in x.attrs}
    params = [param for param in program.params if param.name in named]

    def drop(other: Program) -> None:
        other.params = copy.deepcopy(params)

    if len(params) < len(program.params):
        yield _edited(program, drop)
