"""Triton IR as data: parses the text that Triton prints into operations, values and blocks."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from ..errors import Unsupported
from .forms import unknown


@dataclass(frozen=True)
class Type:
    """A scalar (``shape == ()``) or tensor type; ``element`` is MLIR's name: "f32", "i1", "!tt.ptr<f32>"."""

    shape: tuple[int, ...]
    element: str

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def pointee(self) -> str:
        match = re.fullmatch(r"!tt\.ptr<(\w+)(?:, \d+)?>", self.element)
        if match is None:
            raise Unsupported(f"a pointer was expected, the IR has {self.element}")
        return match[1]


@dataclass(eq=False)
class Value:
    """The result of an operation, or a block's or function's argument (``op is None``)."""

    type: Type
    op: Op | None = None
    users: list[Op] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def element(self) -> str:
        return self.type.element


@dataclass(eq=False)
class Op:
    """An operation. ``text``: what stands between its name and its types, with each quoted string as ``""`` and its
    contents in ``strings``; ``place``: the kernel's file and line."""

    name: str
    operands: list[Value]
    text: str = ""
    strings: list[str] = field(default_factory=list)
    place: str = "?"
    results: list[Value] = field(default_factory=list)
    regions: list[Block] = field(default_factory=list)

    @property
    def result(self) -> Value:
        return self.results[0]

    def number(self, attribute: str) -> int:
        return self.numbers(attribute)[0]

    def numbers(self, attribute: str) -> list[int]:
        """The integers of ``attribute = 3 : i32`` or ``attribute = array<i32: 1, 0>``."""
        match = re.search(rf"\b{attribute} = (?:array<i\d+: )?(-?\d+(?:, -?\d+)*)", self.text)
        if match is None:
            raise Unsupported(f"{self.name} at {self.place}: no attribute {attribute!r} in {self.text!r}")
        return [int(x) for x in match[1].split(",")]

    def unsupported(self, why: str) -> Unsupported:
        return Unsupported(f"the CPU engine does not cover {self.name} at {self.place}: {why}")


@dataclass(eq=False)
class Block:
    args: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)

    @property
    def terminator(self) -> Op:
        return self.ops[-1]


@dataclass(eq=False)
class Function:
    name: str
    args: list[Value]
    body: Block


# how the bits of a float constant are read, and the bits that a bf16 lacks to be an fp32
_FLOAT_BITS = {"f16": (">e", ""), "bf16": (">f", "0000"), "f32": (">f", ""), "f64": (">d", "")}


def parse_type(text: str) -> Type:
    text = text.strip()
    match = re.fullmatch(r"tensor<((?:\d+x)+)(.*)>", text)
    if match is None:
        return Type((), text)
    return Type(tuple(int(x) for x in match[1][:-1].split("x")), match[2])


def split(text: str, separator: str = ",") -> list[str]:
    """Splits at separators outside all brackets; empty text gives no parts."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        if char in "<({[":
            depth += 1
        elif char in ")}]" or (char == ">" and text[at - 1] != "-"):
            depth -= 1
        elif depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def constant_number(op: Op) -> bool | int | float:
    """The value of an ``arith.constant`` of a scalar or of one number repeated."""
    text = op.text
    match = re.fullmatch(r"dense<(.*)>", text)
    text = match[1] if match else text
    if text in ("true", "false"):
        return text == "true"
    element = op.result.element
    if element in _FLOAT_BITS:
        if text.startswith("0x"):  # NaN and infinities are printed as bits
            code, missing = _FLOAT_BITS[element]
            return struct.unpack(code, bytes.fromhex(text[2:] + missing))[0]
        return float(text)
    if re.fullmatch(r"-?\d+", text) is None:
        raise op.unsupported(f"constant {text[:40]}")
    return int(text)


def parse(text: str) -> Function:
    """The one function of a module printed by Triton, which inlines every call.

    Raises:
        Unsupported: the text has a form that this parser doesn't know.
    """
    return _Parser(text).function()


class _Parser:
    def __init__(self, text: str) -> None:
        self.places = _places(text)
        self.lines = [line.strip() for line in text.splitlines()]
        self.at = 0
        self.values: dict[str, Value] = {}
        self.closing = ""  # the line that closed the last block, and its location
        self.closing_place = "?"

    def function(self) -> Function:
        starts = [at for at, line in enumerate(self.lines) if line.startswith("tt.func")]
        if len(starts) != 1:
            raise Unsupported(f"a module of one function was expected, this one has {len(starts)}")
        self.at = starts[0] + 1
        line = _without_locations(self.lines[starts[0]])
        match = re.match(r"tt\.func (?:public |private )?@(\w+)\((.*)\)(?: attributes \{.*\})? \{$", line)
        if match is None:
            raise Unsupported(f"unknown function header: {line[:80]}")
        args = []
        for part in split(match[2]):
            name, kind = re.sub(r"\s*\{.*\}$", "", part).split(": ", 1)
            args.append(self.define(name, Value(parse_type(kind))))
        return Function(match[1], args, self.block())

    def define(self, name: str, value: Value) -> Value:
        self.values[name] = value
        return value

    def block(self) -> Block:
        block = Block()
        while True:
            raw = self.lines[self.at]
            self.at += 1
            line = _without_locations(raw)
            if not line:
                continue
            if line.startswith("}"):
                self.closing, self.closing_place = line, self.place(raw)
                return block
            if match := re.match(r"\^bb\d+\((.*)\):", line):
                for part in split(match[1]):
                    name, kind = part.split(": ", 1)
                    block.args.append(self.define(name, Value(parse_type(kind))))
                continue
            block.ops.append(self.op(line, self.place(raw)))

    def place(self, line: str) -> str:
        match = re.search(r"loc\((#loc\d*)\)\s*$", line)
        return self.places.get(match[1], "?") if match else "?"

    def op(self, line: str, place: str) -> Op:
        names, rest = _result_names(line)
        match = re.match(r'"?([\w.]+)"?\s*(.*)$', rest)
        if match is None:
            raise Unsupported(f"unknown line in Triton's IR: {line[:80]}")
        name, rest = match[1], match[2]
        if name == "scf.for":
            op, types = self.loop(rest)
        elif name == "scf.if":
            op, types = self.branch(rest)
        elif name == "scf.while":
            op, types = self.while_loop(rest)
        elif name in ("tt.reduce", "tt.scan"):
            op, types = self.fold(name, rest)
        elif name.startswith("cf."):
            raise Unsupported(f"the CPU engine does not cover {name} at {place}: a return before the kernel's end")
        elif rest.endswith("{") or rest.endswith("({"):
            raise Unsupported(f"the CPU engine does not cover {name} at {place}")
        else:
            op, types = self.plain(name, rest)
        op.place = self.closing_place if op.regions else place
        if surplus := unknown(name, op.text):
            raise op.unsupported(f"the form {surplus!r}")
        for operand in op.operands:
            operand.users.append(op)
        if name == "tt.split" and len(types) == 1:  # one type is printed for both halves
            types = types * 2
        if names and len(types) != len(names):
            raise Unsupported(f"the CPU engine does not cover {name} at {place}: its result types")
        for result, kind in zip(names, types if names else [], strict=True):
            op.results.append(self.define(result, Value(kind, op)))
        return op

    def operand(self, name: str) -> Value:
        if name not in self.values:
            raise Unsupported(f"Triton's IR uses {name} before it is defined")
        return self.values[name]

    def plain(self, name: str, rest: str) -> tuple[Op, list[Type]]:
        strings = re.findall(r'"([^"]*)"', rest)
        rest = re.sub(r'"[^"]*"', '""', rest)
        parts = split(rest, " : ")
        text, types = (" : ".join(parts[:-1]), parts[-1]) if len(parts) > 1 else (rest, "")
        outside = re.sub(r"\{.*\}", "", text)
        op = Op(name, [self.operand(x) for x in re.findall(r"%[\w$.-]+(?:#\d+)?", outside)], text.strip(), strings)
        if not types:  # "arith.constant true" prints no type
            return op, [Type((), "i1")]
        if arrow := split(types, " -> ")[1:]:
            return op, [parse_type(x) for x in split(arrow[0].strip("()"))]
        if len(to := split(types, " to ")) > 1:
            return op, [parse_type(to[1])]
        listed = [parse_type(x) for x in split(types)]
        kind = listed[-1] if name == "arith.select" else listed[0]
        if name.startswith("arith.cmp"):
            kind = Type(kind.shape, "i1")
        elif name == "tt.load":
            kind = Type(kind.shape, kind.pointee)
        return op, [kind]

    def loop(self, rest: str) -> tuple[Op, list[Type]]:
        match = re.match(r"(%\S+) = (%\S+) to (%\S+) step (%\S+)\s*(.*)\{$", rest)
        if match is None:
            raise Unsupported(f"unknown form of scf.for: {rest[:80]}")
        carried = re.search(r"iter_args\((.*)\) -> \((.*)\)", match[5])
        names = [part.split(" = ") for part in split(carried[1])] if carried else []
        types = [parse_type(part) for part in split(carried[2])] if carried else []
        op = Op("scf.for", [self.operand(match[at]) for at in (2, 3, 4)] + [self.operand(x) for _, x in names])
        index = self.define(match[1], Value(op.operands[0].type))
        args = [self.define(name, Value(kind)) for (name, _), kind in zip(names, types, strict=True)]
        body = self.block()
        body.args = [index, *args]
        op.regions.append(body)
        return op, types

    def branch(self, rest: str) -> tuple[Op, list[Type]]:
        match = re.match(r"(%\S+)(?: -> \((.*)\))? \{$", rest)
        if match is None:
            raise Unsupported(f"unknown form of scf.if: {rest[:80]}")
        op = Op("scf.if", [self.operand(match[1])])
        op.regions.append(self.block())
        if "else" in self.closing:
            op.regions.append(self.block())
        return op, [parse_type(part) for part in split(match[2] or "")]

    def while_loop(self, rest: str) -> tuple[Op, list[Type]]:
        """Its regions are what is done before the condition, which ends in ``scf.condition``, and the body."""
        match = re.match(r"(?:\((.*?)\) )?: \((.*)\) -> (.*) \{$", rest)
        if match is None:
            raise Unsupported(f"unknown form of scf.while: {rest[:80]}")
        names = [part.split(" = ") for part in split(match[1] or "")]
        types = [parse_type(part) for part in split(match[2])]
        op = Op("scf.while", [self.operand(x) for _, x in names])
        args = [self.define(name, Value(kind)) for (name, _), kind in zip(names, types, strict=True)]
        before = self.block()
        before.args = args
        op.regions += [before, self.block()]
        return op, [parse_type(part) for part in split(match[3].removeprefix("(").removesuffix(")"))]

    def fold(self, name: str, rest: str) -> tuple[Op, list[Type]]:
        """A reduction or a scan, with the region that combines two elements."""
        match = re.match(r"\((.*?)\) <\{(.*?)\}> \(\{$", rest)
        if match is None:
            raise Unsupported(f"unknown form of {name}: {rest[:80]}")
        op = Op(name, [self.operand(x) for x in split(match[1])], match[2])
        op.regions.append(self.block())
        types = self.closing.rsplit(" -> ", 1)[-1].removeprefix("(").removesuffix(")")
        return op, [parse_type(part) for part in split(types)]


def _result_names(line: str) -> tuple[list[str], str]:
    """The names on the left of ``%a = ...``, ``%a, %b = ...`` or ``%a:2 = ...`` (``%a#0, %a#1``), and the rest."""
    match = re.match(r"((?:%[\w$.-]+(?::\d+)?(?:, )?)+) = (.*)$", line)
    if match is None:
        return [], line
    names: list[str] = []
    for part in match[1].split(", "):
        name, _, count = part.partition(":")
        names += [f"{name}#{at}" for at in range(int(count))] if count else [name]
    return names, match[2]


def _without_locations(line: str) -> str:
    """The line less its source locations, which stand at its end and behind each argument of a block."""
    while (at := line.find(" loc(")) >= 0:
        depth, end = 0, at + 4
        while True:
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
            if depth == 0:
                break
        line = line[:at] + line[end:]
    return line.strip()


def _places(text: str) -> dict[str, str]:
    """Location names to "file:line"; a named or inlined location stands for the first place that it holds."""
    found = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))

    def place(name: str, depth: int = 0) -> str:
        body = found.get(name, "")
        if match := re.search(r'"([^"]+)":(\d+)', body):
            return f"{match[1].rsplit('/', 1)[-1]}:{match[2]}"
        inner = [place(x, depth + 1) for x in re.findall(r"#loc\d*", body)] if depth < 8 else []
        return next((x for x in inner if x != "?"), "?")

    return {name: place(name) for name in found}
