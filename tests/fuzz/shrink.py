"""Makes a failing program smaller for as long as it still fails."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

from .evaluate import Ambiguous, Evaluator, Invalid
from .program import FLOATS, Node, Program, walk

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
            while time.monotonic() < end:
                candidates = []
                for candidate in _from(way(program), at):
                    candidates.append(candidate)
                    if len(candidates) == AT_ONCE:
                        break
                if not candidates:
                    break
                meaningful = [x for x in candidates if _has_meaning(x)]
                verdicts = failing(meaningful) if meaningful else []
                better = next((x for x, fails in zip(meaningful, verdicts, strict=True) if fails), None)
                if better is None:
                    at += len(candidates)
                else:
                    # what stood before it was tried already
                    at += candidates.index(better)
                    program, progress = better, True
    return program


def _from(items: Iterator[Program], start: int) -> Iterator[Program]:
    for at, item in enumerate(items):
        if at >= start:
            yield item


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


def _swept(program: Program) -> Program:
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


def _changed(program: Program, change: Callable[[list[list[Node]]], bool]) -> Program | None:
    """A copy after ``change``, which works on its blocks and says whether there was anything to do."""
    other = copy.deepcopy(program)
    return _swept(other) if change(list(_blocks(other))) else None


def _without_statements(program: Program) -> Iterator[Program]:
    """Without half of the stores, a quarter, ... one; then without one whole loop or branch."""
    stores = [(b, at) for b, block in enumerate(_blocks(program)) for at, x in enumerate(block) if x.op == "store"]
    width = len(stores)
    while width >= 1:
        for start in range(0, len(stores), width):
            gone = set(stores[start : start + width])

            def drop(blocks: list[list[Node]], gone: set[tuple[int, int]] = gone) -> bool:
                for b, block in enumerate(blocks):
                    block[:] = [x for at, x in enumerate(block) if (b, at) not in gone]
                return True

            if len(gone) < len(stores) and (found := _changed(program, drop)):
                yield found
        width //= 2


def _rename(blocks: list[list[Node]], names: dict[str, str]) -> None:
    for block in blocks:
        for node in block:
            node.args = [names.get(x, x) for x in node.args]


def _without_control(program: Program) -> Iterator[Program]:
    """A loop's body once or not at all, one side of a branch, a value carried in vain."""
    places = [(b, at) for b, block in enumerate(_blocks(program)) for at, x in enumerate(block) if x.blocks]
    for b, at in places:
        for way in range(2):

            def unroll(blocks: list[list[Node]], b: int = b, at: int = at, way: int = way) -> bool:
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
                return True

            if found := _changed(program, unroll):
                yield found
    for b, at in places:
        node = next(block for i, block in enumerate(_blocks(program)) if i == b)[at]
        for which in range(1 if node.op == "while" else 0, len(node.outs)):

            def uncarry(blocks: list[list[Node]], b: int = b, at: int = at, which: int = which) -> bool:
                node = blocks[b][at]
                name = node.outs.pop(which)
                if node.op != "if":
                    first = node.args.pop(which + (3 if node.op == "for" else 1))
                else:
                    first = node.blocks[0][-1].args[which]
                for block in node.blocks:
                    block[-1].args.pop(which)
                _rename(blocks, {name: first})
                return True

            if found := _changed(program, uncarry):
                yield found


def _constants(program: Program) -> Iterator[Program]:
    """A statement's results as constants."""
    kinds = _kinds(program)
    for b, block in enumerate(list(_blocks(program))):
        for at in reversed(range(len(block))):
            node = block[at]
            if node.op in ("full", "store", "yield", "affine", "bounds") or not node.outs:
                continue
            if any(name not in kinds for name in node.outs) or node.outs == ["own"]:
                continue

            def fix(blocks: list[list[Node]], b: int = b, at: int = at) -> bool:
                new = []
                for name in blocks[b][at].outs:
                    kind, shape = kinds[name]
                    value = True if kind == "int1" else 1.0 if kind in FLOATS else 1
                    new.append(Node("full", [name], [], {"shape": list(shape), "value": value, "kind": kind}))
                blocks[b][at : at + 1] = new
                return True

            if found := _changed(program, fix):
                yield found


def _simpler_arguments(program: Program) -> Iterator[Program]:
    """A result replaced by an operand of its type; plain addresses; no mask; nothing carried on from a loop."""
    kinds = _kinds(program)
    for b, block in enumerate(list(_blocks(program))):
        for at, node in enumerate(block):
            if len(node.outs) == 1 and node.op not in ("for", "while", "if"):
                for arg in dict.fromkeys(node.args):
                    if kinds.get(arg) == kinds.get(node.outs[0]) and arg in kinds and node.op != "copy":

                        def skip(blocks: list[list[Node]], b: int = b, at: int = at, arg: str = arg) -> bool:
                            name = blocks[b].pop(at).outs[0]
                            _rename(blocks, {name: arg})
                            return True

                        if found := _changed(program, skip):
                            yield found
            for simpler in _simpler(node):

                def replace(blocks: list[list[Node]], b: int = b, at: int = at, simpler: Node = simpler) -> bool:
                    blocks[b][at] = copy.deepcopy(simpler)
                    return True

                if found := _changed(program, replace):
                    yield found


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


def _smaller_sizes(program: Program) -> Iterator[Program]:
    """Fewer programs, smaller arguments, every tile's size halved where it occurs."""
    if program.grid != [1]:
        other = copy.deepcopy(program)
        other.grid = [1]
        yield other
    for at, param in enumerate(program.params):
        if param.role == "scalar" and param.name != "slice" and isinstance(param.fill, int) and param.fill > 0:
            for fill in {0, 1, param.fill - 1} - {param.fill}:
                other = copy.deepcopy(program)
                other.params[at].fill = fill
                yield other
        elif param.role == "input" and param.fill in ("normal", "full"):
            other = copy.deepcopy(program)
            other.params[at].fill = "whole" if param.kind in FLOATS else "small"
            yield other
    sizes = {size for node in walk(program.body) for size in node.attrs.get("shape", [])}
    for size in sorted(sizes, reverse=True):
        if size > 1:
            for smaller in dict.fromkeys((1, size // 2)):
                other = copy.deepcopy(program)
                for node in walk(other.body):
                    if "shape" in node.attrs:
                        node.attrs["shape"] = [smaller if x == size else x for x in node.attrs["shape"]]
                yield other
    for node_at, node in enumerate(walk(program.body)):
        for axis, size in enumerate(node.attrs.get("shape", [])):
            if size > 1:
                other = copy.deepcopy(program)
                list(walk(other.body))[node_at].attrs["shape"][axis] = size // 2
                yield other
    if program.level:
        other = copy.deepcopy(program)
        other.level = 0
        yield other


def _unused(program: Program) -> Iterator[Program]:
    """Without the arguments that nothing uses."""
    named = _read(program) | {x.attrs["buffer"] for x in walk(program.body) if "buffer" in x.attrs}
    params = [param for param in program.params if param.name in named]
    if len(params) < len(program.params):
        other = copy.deepcopy(program)
        other.params = params
        yield other
