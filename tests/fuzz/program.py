"""A random program as data: typed statements, which are written as a Triton kernel and evaluated with numpy.

Every statement has one operation, names of what it reads and names of what it defines; nothing is converted silently.
A ``for`` and a ``while`` define the values that they carry, an ``if`` what its branches hand out; each of their blocks
ends with a ``yield``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FLOATS = ("fp32", "fp16", "bf16")
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32")
INTEGERS = (*SIGNED, *UNSIGNED)
KINDS = (*FLOATS, "int1", *INTEGERS)
NUMPY = {name: np.dtype(name) for name in INTEGERS} | {"int1": np.dtype(bool)}
# Triton's names of element types where they are not the same as here
_LANGUAGE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "and": "&", "or": "|", "xor": "^",
    "shl": "<<", "shr": ">>", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
UNARY = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "abs", "floor", "ceil", "erf")
REDUCTIONS = ("sum", "max", "min", "argmax", "argmin", "xor_sum", "reduce_or")
CONTROL = ("for", "while", "if")

# combine functions of tl.reduce (any order) and of tl.associative_scan (left to right): operands, text
COMBINES = {
    "both_ends": (2, "def both_ends(a, b, c, d):\n    return tl.minimum(a, c), tl.maximum(b, d)"),
    "largest": (2, "def largest(a, i, b, j):\n    take = (a > b) | ((a == b) & (i < j))\n"
                   "    return tl.where(take, a, b), tl.where(take, i, j)"),
    "all_bits": (1, "def all_bits(a, b):\n    return a & b"),
    "any_bits": (1, "def any_bits(a, b):\n    return a | b"),
    "product": (1, "def product(a, b):\n    return a * b"),
    "summary": (2, "def summary(m, s, n, t):\n    top = tl.maximum(m, n)\n"
                   "    return top, s * tl.exp(m - top) + t * tl.exp(n - top)"),
    "last_set": (1, "def last_set(a, b):\n    return tl.where(b != 0, b, a)"),
    "affine_map": (2, "def affine_map(a, b, c, d):\n    return a * c, b * c + d"),
    "running_max": (1, "def running_max(a, b):\n    return tl.maximum(a, b)"),
    "three_sums": (3, "def three_sums(a, b, c, d, e, f):\n    return a + d, b + e, tl.maximum(c, f)"),
}  # fmt: skip


@dataclass
class Node:
    """A statement. outs, args: names. attrs: what is fixed when the kernel is written. blocks: of control flow."""

    op: str
    outs: list[str]
    args: list[str] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    blocks: list[list[Node]] = field(default_factory=list)


@dataclass
class Param:
    """An argument of the kernel. role: "input" (read by all programs), "output" (each program has its own slice, which
    it may also read) or "scalar". fill: how a buffer is filled at first, or the value of a scalar. key: with the
    program's seed it decides what a buffer is filled with."""

    name: str
    kind: str
    role: str
    size: int = 0
    fill: Any = ""
    key: int = 0


@dataclass
class Program:
    """slice: the elements of an output that belong to one program. level: the index of the machine's level to use."""

    seed: int
    params: list[Param]
    body: list[Node]
    grid: list[int]
    slice: int
    level: int

    def to_data(self) -> dict[str, Any]:
        return json.loads(json.dumps(self, default=lambda x: x.__dict__))

    @staticmethod
    def from_data(data: dict[str, Any]) -> Program:
        def node(row: dict[str, Any]) -> Node:
            return Node(
                row["op"], row["outs"], row["args"], row["attrs"], [[node(x) for x in b] for b in row["blocks"]]
            )

        params = [Param(**row) for row in data["params"]]
        return Program(
            data["seed"], params, [node(x) for x in data["body"]], data["grid"], data["slice"], data["level"]
        )


def walk(block: list[Node]) -> Iterator[Node]:
    for node in block:
        yield node
        for inner in node.blocks:
            yield from walk(inner)


def initial_values(node: Node) -> list[str]:
    """Of a loop: what the carried values are at first."""
    return node.args[3 if node.op == "for" else 1 :]


class Aliases:
    """Which names stand for one value in the eyes of Triton's front end.

    It finds out what a loop carries by a trial of its body, where a carried value stands for what it is at first; one
    that ends as what it was at first is taken for unchanged. So of two carried values that are one value at first, one
    can be lost: ``a, b = new, a`` leaves b as it was (seen in Triton 3.9). No program may have such a loop.
    """

    def __init__(self) -> None:
        self._roots: dict[str, str] = {}

    def root(self, name: str) -> str:
        return self._roots.get(name, name)

    def are_distinct(self, names: list[str]) -> bool:
        return len({self.root(name) for name in names}) == len(names)

    def enter(self, node: Node) -> None:
        """Before a loop's body."""
        for name, initial in zip(node.outs, initial_values(node), strict=True):
            self._roots[name] = self.root(initial)

    def leave(self, node: Node) -> None:
        """After a statement, of a loop or a branch its blocks."""
        if node.op == "copy":
            self._roots[node.outs[0]] = self.root(node.args[0])
        elif node.op == "if":
            for name, first, second in zip(node.outs, node.blocks[0][-1].args, node.blocks[1][-1].args, strict=True):
                if self.root(first) == self.root(second):
                    self._roots[name] = self.root(first)
        elif node.op in ("for", "while"):
            ends = [self.root(name) for name in node.blocks[0][-1].args]
            for name, initial, end in zip(node.outs, initial_values(node), ends, strict=True):
                self._roots[name] = self.root(initial) if end == self.root(initial) else name

    def all_distinct(self, block: list[Node]) -> bool:
        """Whether every loop starts from values that are not one."""
        for node in block:
            if node.op in ("for", "while"):
                if not self.are_distinct(initial_values(node)):
                    return False
                self.enter(node)
            if not all(self.all_distinct(inner) for inner in node.blocks):
                return False
            self.leave(node)
        return True


def language(kind: str) -> str:
    return "tl." + _LANGUAGE.get(kind, kind)


def source(program: Program) -> str:
    """The Triton kernel, named ``kernel``, with the imports and combine functions that it needs."""
    used = dict.fromkeys(node.attrs["combine"] for node in walk(program.body) if "combine" in node.attrs)
    helpers = "".join(f"@triton.jit\n{COMBINES[name][1]}\n\n\n" for name in used)
    names = ", ".join(param.name for param in program.params)
    body = "\n".join(_lines(program.body, 1)) or "    pass"
    return f"import triton\nimport triton.language as tl\n\n\n{helpers}@triton.jit\ndef kernel({names}):\n{body}\n"


def _lines(block: list[Node], depth: int, targets: list[str] | None = None) -> Iterator[str]:
    pad = "    " * depth
    for node in block:
        if node.op == "yield":
            if targets:
                yield f"{pad}{', '.join(targets)} = {', '.join(node.args)}"
        elif node.op == "for":
            lo, hi, step, *initial = node.args
            for name, first in zip(node.outs, initial, strict=True):
                yield f"{pad}{name} = {first}"
            yield f"{pad}for {node.attrs['index']}_ in range({lo}, {hi}, {step}):"
            yield f"{pad}    {node.attrs['index']} = {node.attrs['index']}_"
            yield from _lines(node.blocks[0], depth + 1, node.outs)
        elif node.op == "while":
            bound, *initial = node.args
            for name, first in zip(node.outs, initial, strict=True):
                yield f"{pad}{name} = {first}"
            yield f"{pad}while {node.outs[0]} < {bound}:"
            yield from _lines(node.blocks[0], depth + 1, node.outs)
        elif node.op == "if":
            first, second = node.blocks
            alone = len(second) == 1  # nothing but what it hands out: the values before the branch
            for name, value in zip(node.outs, second[-1].args if alone else [], strict=alone):
                yield f"{pad}{name} = {value}"
            yield f"{pad}if {node.args[0]}:"
            yield from _branch(first, depth + 1, node.outs)
            if not alone:
                yield f"{pad}else:"
                yield from _branch(second, depth + 1, node.outs)
        else:
            yield f"{pad}{', '.join(node.outs)}{' = ' if node.outs else ''}{expression(node)}"


def _branch(block: list[Node], depth: int, targets: list[str]) -> Iterator[str]:
    lines = list(_lines(block, depth, targets))
    yield from lines or ["    " * depth + "pass"]


def _numbers(values: Any) -> str:
    return "[" + ", ".join(str(x) for x in values) + "]"


def literal(value: Any) -> str:
    return f'float("{value}")' if isinstance(value, float) and not np.isfinite(value) else repr(value)


def expression(node: Node) -> str:
    """The right side of an assignment, or a store."""
    op, args, at = node.op, node.args, node.attrs
    if op in INFIX:
        return f"{args[0]} {INFIX[op]} {args[1]}"
    if op in UNARY:
        return f"tl.{op}({args[0]})"
    if op in ("maximum", "minimum"):
        nan = ", propagate_nan=tl.PropagateNan.ALL" if at["nan"] else ""
        return f"tl.{op}({args[0]}, {args[1]}{nan})"
    if op in ("fma", "umulhi", "where", "join", "rand", "randint"):
        return f"tl.{op}({', '.join(args)})"
    if op in REDUCTIONS:
        keep = ", keep_dims=True" if at["keep"] else ""
        return f"tl.{op}({args[0]}, axis={at['axis']}{keep})"
    if op in ("cumsum", "cumprod"):
        return f"tl.{op}({args[0]}, axis={at['axis']}, reverse={at['reverse']})"
    return _WRITTEN[op](args, at)


def _affine(args: list[str], at: dict[str, Any]) -> str:
    """Offsets: a constant, scalars, and for each dimension a range times a stride."""
    terms = [str(at["offset"])] if at["offset"] else []
    terms += args
    rank = len(at["shape"])
    for axis, (size, stride) in enumerate(zip(at["shape"], at["strides"], strict=True)):
        start = at["starts"][axis]
        index = ", ".join(":" if dim == axis else "None" for dim in range(rank))
        text = f"tl.arange({start}, {start + size})" + (f"[{index}]" if rank > 1 else "")
        terms.append(text if stride == 1 else f"{text} * {stride}")
    return " + ".join(terms)


def _bounds(args: list[str], at: dict[str, Any]) -> str:
    rank = len(at["shape"])
    parts = []
    for axis, bound in zip(at["axes"], args, strict=True):
        index = ", ".join(":" if dim == axis else "None" for dim in range(rank))
        text = f"tl.arange(0, {at['shape'][axis]})" + (f"[{index}]" if rank > 1 else "")
        parts.append(f"({text} < {bound})")
    return " & ".join(parts)


def _pointer(args: list[str], at: dict[str, Any]) -> str:
    return f"{at['buffer']} + {args[0]} + {args[1]}" if at["base"] else f"{at['buffer']} + {args[0]}"


def _load(args: list[str], at: dict[str, Any]) -> str:
    rest = args[1 + at["base"] :]
    text = _pointer(args, at)
    if at["mask"]:
        text += f", mask={rest[0]}"
    if at["other"]:
        text += f", other={rest[1]}"
    elif "literal" in at:
        text += f", other={literal(at['literal'])}"
    return f"tl.load({text})"


def _store(args: list[str], at: dict[str, Any]) -> str:
    rest = args[1 + at["base"] :]
    return f"tl.store({_pointer(args, at)}, {rest[0]}{f', mask={rest[1]}' if at['mask'] else ''})"


def _dot(args: list[str], at: dict[str, Any]) -> str:
    precision = f', input_precision="{at["precision"]}"' if at["precision"] else ""
    return f"tl.dot({', '.join(args)}{precision})"


def _several(args: list[str]) -> str:
    return args[0] if len(args) == 1 else f"({', '.join(args)})"


_WRITTEN = {
    "program_id": lambda args, at: f"tl.program_id({at['axis']})",
    "num_programs": lambda args, at: f"tl.num_programs({at['axis']})",
    "copy": lambda args, at: args[0],
    "full": lambda args, at: f"tl.full({_numbers(at['shape'])}, {literal(at['value'])}, {language(at['kind'])})",
    "affine": _affine,
    "bounds": _bounds,
    "neg": lambda args, at: f"-{args[0]}",
    "invert": lambda args, at: f"~{args[0]}",
    "cast": lambda args, at: f"{args[0]}.to({language(at['kind'])})",
    "bitcast": lambda args, at: f"{args[0]}.to({language(at['kind'])}, bitcast=True)",
    "broadcast": lambda args, at: f"tl.broadcast_to({args[0]}, {_numbers(at['shape'])})",
    "expand_dims": lambda args, at: f"tl.expand_dims({args[0]}, {at['axis']})",
    "reshape": lambda args, at: f"tl.reshape({args[0]}, {_numbers(at['shape'])})",
    "permute": lambda args, at: f"tl.permute({args[0]}, {_numbers(at['order'])})",
    "trans": lambda args, at: f"tl.trans({args[0]})",
    "split": lambda args, at: f"tl.split({args[0]})",
    "gather": lambda args, at: f"tl.gather({args[0]}, {args[1]}, axis={at['axis']})",
    "load": _load,
    "store": _store,
    "dot": _dot,
    "reduce": lambda args, at: f"tl.reduce({_several(args)}, {at['axis']}, {at['combine']})",
    "scan": lambda args, at: (
        f"tl.associative_scan({_several(args)}, {at['axis']}, {at['combine']}, reverse={at['reverse']})"
    ),
}  # fmt: skip
