"""Evaluates a program with numpy: what every element of every output must be, and how far off it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import values
from .folds import REDUCE, SCAN, cumulative, dot, reduce
from .program import COMPARISONS, FLOATS, INFIX, NUMPY, REDUCTIONS, UNARY, Aliases, Node, Param, Program, walk
from .values import Value, binary_float, binary_integer, compare, exact, unknown

MOST_TRIPS = 64


class Invalid(Exception):
    """The program has no meaning: an address outside of its buffer, two lanes that store to one place."""


class Ambiguous(Exception):
    """A branch, a trip count or an address depends on a value that is not known exactly."""


def inputs(program: Program) -> dict[str, Value]:
    """The contents of every buffer before the run, of outputs too, as a function of the program's seed."""
    found = {}
    for param in program.params:
        if param.role == "scalar":
            continue
        rng = np.random.Generator(np.random.Philox(key=[program.seed, 1 + param.key]))
        size = param.size if param.role == "input" else program.slice * math.prod(program.grid)
        found[param.name] = exact(param.kind, _filled(rng, param, size))
    return found


def _filled(rng: np.random.Generator, param: Param, size: int) -> np.ndarray:
    kind, fill = param.kind, str(param.fill)
    if kind == "int1":
        return rng.random(size) < 0.5
    if kind not in FLOATS:
        info = np.iinfo(NUMPY[kind])
        if fill == "small":
            return rng.integers(max(-9, info.min), 10, size).astype(NUMPY[kind])
        return rng.integers(info.min, info.max, size, NUMPY[kind], endpoint=True)
    x = rng.integers(-8, 9, size).astype(np.float64) if fill.startswith("whole") else rng.normal(0.0, 1.5, size)
    if fill.endswith("special"):
        odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, 65504.0, -3e38, 2.5, 1e-7])
        x = np.where(rng.random(size) < 0.04, rng.choice(odd, size), x)
    return values.rounded(x, kind)


class Evaluator:
    """Runs all programs of a grid, one after the other. outputs: the buffers. kinds: of every name that was defined,
    the type and the shape. stored: which elements of a buffer were stored to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.outputs = inputs(program)
        self.kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.place: tuple[int, ...] = ()
        self.names: dict[str, Value] = {}
        self.stored = {name: np.zeros(value.data.size, bool) for name, value in self.outputs.items()}
        self.drawn = {name for node in walk(program.body) if node.op == "rand" for name in node.outs}

    @property
    def unknown_share(self) -> float:
        """Of what was stored, the part of which nothing can be said."""
        lost = sum(int((np.isinf(value.error) & self.stored[name]).sum()) for name, value in self.outputs.items())
        return lost / max(1, sum(int(x.sum()) for x in self.stored.values()))

    def run(self) -> dict[str, Value]:
        if not Aliases().all_distinct(self.program.body):
            raise Invalid("a loop whose carried values are one value at first")
        grid = [*self.program.grid, *(1,) * (3 - len(self.program.grid))]
        with np.errstate(all="ignore"):
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        self.place = (x, y, z, *grid)
                        self.names = {p.name: exact(p.kind, p.fill) for p in self.program.params if p.role == "scalar"}
                        self._block(self.program.body)
        return self.outputs

    def define(self, name: str, value: Value) -> None:
        if value.data.ndim and not value.data.size:
            raise Invalid(f"{name} is empty")
        if self.kinds.setdefault(name, (value.kind, value.shape)) != (value.kind, value.shape):
            raise Invalid(f"{name} changes its type")
        self.names[name] = value

    def _block(self, block: list[Node]) -> list[Value]:
        for node in block:
            try:
                args = [self.names[name] for name in node.args]
            except KeyError as error:
                raise Invalid(f"{error} is read before it is defined") from error
            if node.op == "yield":
                return args
            if node.op in ("for", "while", "if"):
                results = getattr(self, "_" + node.op)(node, args)
            else:
                try:
                    results = self._plain(node, args)
                except (ValueError, IndexError, TypeError, KeyError) as error:
                    raise Invalid(f"{node.op} of {node.outs}: {error}") from error
            for name, value in zip(node.outs, results, strict=True):
                self.define(name, value)
        return []

    # ---- control flow

    def _known(self, value: Value) -> Any:
        if value.shape or value.error.any():
            raise Ambiguous
        return value.data.item()

    def _carry(self, node: Node, current: list[Value]) -> None:
        for name, value in zip(node.outs, current, strict=True):
            self.define(name, value)

    def _for(self, node: Node, args: list[Value]) -> list[Value]:
        lo, hi, step = (self._known(x) for x in args[:3])
        if step < 1 or (hi - lo) / step > MOST_TRIPS:
            raise Invalid("a loop that doesn't end soon")
        self._carry(node, args[3:])
        for index in range(lo, hi, step):
            self.define(node.attrs["index"], exact("int32", index))
            self._carry(node, self._block(node.blocks[0]))
        return [self.names[name] for name in node.outs]

    def _while(self, node: Node, args: list[Value]) -> list[Value]:
        bound = self._known(args[0])
        self._carry(node, args[1:])
        for _ in range(MOST_TRIPS):
            if not self._known(self.names[node.outs[0]]) < bound:
                return [self.names[name] for name in node.outs]
            self._carry(node, self._block(node.blocks[0]))
        raise Invalid("a loop that doesn't end soon")

    def _if(self, node: Node, args: list[Value]) -> list[Value]:
        return self._block(node.blocks[0 if self._known(args[0]) else 1])

    # ---- memory

    def _addresses(self, node: Node, args: list[Value], mask: np.ndarray) -> tuple[Value, np.ndarray]:
        buffer = self.outputs[node.attrs["buffer"]]
        offset = args[0].data.astype(np.int64)
        blurred = unknown(args[0])
        if node.attrs["base"]:
            offset = offset + args[1].data.astype(np.int64)
            blurred = blurred | unknown(args[1])
        offset, blurred = np.broadcast_to(offset, mask.shape), np.broadcast_to(blurred, mask.shape)
        if (blurred & mask).any():
            raise Ambiguous
        if ((offset < 0) | (offset >= buffer.data.size))[mask].any():
            raise Invalid(f"an address outside of {node.attrs['buffer']}")
        return buffer, np.where(mask, offset, 0)

    def _spread(self, node: Node, args: list[Value]) -> tuple[int, ...]:
        return np.broadcast_shapes(*(x.shape for x in args[: 1 + node.attrs["base"]]))

    def _mask(self, node: Node, value: Value | None, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(lanes that may take part, lanes of which it isn't known whether they do)"""
        if value is None:
            return np.ones(shape, bool), np.zeros(shape, bool)
        doubt = np.broadcast_to(unknown(value), shape)
        return np.broadcast_to(value.data, shape) | doubt, doubt

    def _load(self, node: Node, args: list[Value]) -> Value:
        at = node.attrs
        rest = args[1 + at["base"] :]
        mask, doubt = self._mask(node, rest[0] if at["mask"] else None, self._spread(node, args))
        buffer, places = self._addresses(node, args, mask)
        other = rest[1] if at["other"] else exact(buffer.kind, at.get("literal", 0))
        if "literal" in at and buffer.kind in FLOATS:
            other = exact(buffer.kind, values.rounded(other.data, buffer.kind))
        lost = doubt if at["other"] or "literal" in at else doubt | ~mask  # Triton leaves masked lanes open
        error = np.where(mask, buffer.error[places], other.error)
        return Value(buffer.kind, np.where(mask, buffer.data[places], other.data), np.where(lost, np.inf, error))

    def _store(self, node: Node, args: list[Value]) -> None:
        rest = args[1 + node.attrs["base"] :]
        mask, doubt = self._mask(node, rest[1] if node.attrs["mask"] else None, self._spread(node, args))
        buffer, places = self._addresses(node, args, mask)
        if rest[0].kind != buffer.kind:
            raise Invalid("a store converts")
        x, y, z, *grid = self.place
        own = x + grid[0] * (y + grid[1] * z)
        where = places[mask]
        if where.size != np.unique(where).size or ((where // self.program.slice) != own).any():
            raise Invalid("two lanes or two programs store to one place")
        data, error = np.broadcast_to(rest[0].data, mask.shape), np.broadcast_to(rest[0].error, mask.shape)
        if node.args[1 + node.attrs["base"]] in self.drawn:  # tl.rand stored as it is: bit for bit
            data, error = values.rounded(data, buffer.kind), np.where(np.isinf(error), np.inf, 0.0)
        self.stored[node.attrs["buffer"]][where] = True
        buffer.data[where] = data[mask]
        buffer.error[where] = np.where(doubt, np.inf, error)[mask]

    # ---- everything else

    def _plain(self, node: Node, args: list[Value]) -> list[Value]:
        op, at = node.op, node.attrs
        if op == "store":
            self._store(node, args)
            return []
        if op == "load":
            return [self._load(node, args)]
        if op == "split":
            return [args[0].map(lambda x: x[..., 0]), args[0].map(lambda x: x[..., 1])]
        if op == "reduce":
            return REDUCE[at["combine"]](args, at["axis"])
        if op == "scan":
            return SCAN[at["combine"]](args, at["axis"], at["reverse"])
        return [self._one(op, at, args)]

    def _one(self, op: str, at: dict[str, Any], args: list[Value]) -> Value:
        if op in COMPARISONS:
            self._same(args)
            return compare(op, args[0], args[1])
        if op in INFIX:
            self._same(args)
            f = binary_float if args[0].kind in FLOATS else binary_integer
            return f(op, args[0], args[1])
        if op in UNARY or op == "neg":
            return values.unary(op, args[0])
        if op in REDUCTIONS:
            return reduce(op, args[0], at["axis"], at["keep"])
        if op in ("cumsum", "cumprod"):
            return cumulative(op, args[0], at["axis"], at["reverse"])
        if op in ("maximum", "minimum"):
            self._same(args)
            return values.extreme(op, args[0], args[1], at["nan"])
        return _OPERATIONS[op](self, at, *args)

    def _same(self, args: list[Value]) -> None:
        a, b = args
        if a.kind != b.kind or (a.shape and b.shape and len(a.shape) != len(b.shape)):
            raise Invalid(f"operands {a.kind}{a.shape} and {b.kind}{b.shape}")

    def _program_id(self, at: dict[str, Any]) -> Value:
        return exact("int32", self.place[at["axis"]])

    def _num_programs(self, at: dict[str, Any]) -> Value:
        return exact("int32", self.place[3 + at["axis"]])

    def _where(self, at: dict[str, Any], take: Value, a: Value, b: Value) -> Value:
        self._same([a, b])
        shape = np.broadcast_shapes(take.shape, a.shape, b.shape)
        x, y = np.broadcast_to(a.data, shape), np.broadcast_to(b.data, shape)
        error = np.where(take.data, a.error, b.error)
        same = (x == y) | (np.isnan(x) & np.isnan(y)) if a.kind in FLOATS else x == y
        doubt = np.broadcast_to(unknown(take), shape)
        error = np.where(doubt, np.where(same, np.maximum(a.error, b.error), np.inf), error)
        return Value(a.kind, np.where(take.data, x, y), error)

    def _affine(self, at: dict[str, Any], *scalars: Value) -> Value:
        data = np.full((1,) * len(at["shape"]), at["offset"], np.int32)
        error = np.zeros(())
        for scalar in scalars:
            data, error = data + scalar.data, error + scalar.error
        for axis, (size, stride, start) in enumerate(zip(at["shape"], at["strides"], at["starts"], strict=True)):
            index = (np.arange(start, start + size, dtype=np.int32) * np.int32(stride)).astype(np.int32)
            data = data + index.reshape([-1 if axis == dim else 1 for dim in range(len(at["shape"]))])
        return Value("int32", data.astype(np.int32), np.broadcast_to(error, data.shape))

    def _bounds(self, at: dict[str, Any], *bounds: Value) -> Value:
        data, error = np.ones((1,) * len(at["shape"]), bool), np.zeros(())
        for axis, bound in zip(at["axes"], bounds, strict=True):
            index = np.arange(at["shape"][axis]).reshape([-1 if axis == d else 1 for d in range(len(at["shape"]))])
            data, error = data & (index < bound.data), error + bound.error
        return Value("int1", data, np.broadcast_to(error, data.shape))

    def _full(self, at: dict[str, Any]) -> Value:
        value = np.float64(at["value"]) if at["kind"] in FLOATS else at["value"]
        value = values.rounded(np.asarray(value), at["kind"]) if at["kind"] in FLOATS else value
        return exact(at["kind"], np.full(at["shape"], value))

    def _broadcast(self, at: dict[str, Any], a: Value) -> Value:
        if a.shape and len(a.shape) != len(at["shape"]):
            raise Invalid("a broadcast changes the rank")
        return a.map(lambda x: np.broadcast_to(x, at["shape"]))

    def _gather(self, at: dict[str, Any], a: Value, index: Value) -> Value:
        axis = at["axis"]
        lost = unknown(index)
        places = np.where(lost, 0, index.data.astype(np.int64))
        if ((places < 0) | (places >= a.shape[axis])).any():
            raise Invalid("a gather outside of its source")
        data, error = (np.take_along_axis(x, places, axis) for x in (a.data, a.error))
        return Value(a.kind, data, np.where(lost, np.inf, error))

    def _randint(self, at: dict[str, Any], seed: Value, offset: Value) -> Value:
        key = int(seed.data) & (2**64 - 1)
        wide = offset.data.astype(np.int64).view(np.uint64)
        high = wide >> np.uint64(32) if offset.kind == "int64" else np.zeros_like(wide)
        c = [wide & np.uint64(0xFFFFFFFF), high, np.zeros_like(wide), np.zeros_like(wide)]
        k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
        low = np.uint64(0xFFFFFFFF)
        for _ in range(10):
            a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
            c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low]
            k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
        return Value("uint32", c[0].astype(np.uint32), offset.error + seed.error)

    def _rand(self, at: dict[str, Any], seed: Value, offset: Value) -> Value:
        drawn = self._randint(at, seed, offset)
        x = drawn.data.view(np.int32)
        x = np.where(x < 0, ~x, x).astype(np.float32).astype(np.float64)
        scale = float(np.float32(4.6566127342e-10))
        return values.finish("fp32", x * scale, drawn.error)


_OPERATIONS: dict[str, Callable[..., Value]] = {
    "program_id": Evaluator._program_id,
    "num_programs": Evaluator._num_programs,
    "copy": lambda run, at, a: a,
    "full": Evaluator._full,
    "affine": Evaluator._affine,
    "bounds": Evaluator._bounds,
    "where": Evaluator._where,
    "invert": lambda run, at, a: Value(a.kind, ~a.data, a.error),
    "cast": lambda run, at, a: values.cast(a, at["kind"]),
    "bitcast": lambda run, at, a: values.bitcast(a, at["kind"]),
    "fma": lambda run, at, a, b, c: values.fma(a, b, c),
    "umulhi": lambda run, at, a, b: values.umulhi(a, b),
    "broadcast": Evaluator._broadcast,
    "expand_dims": lambda run, at, a: a.map(lambda x: np.expand_dims(x, at["axis"])),
    "reshape": lambda run, at, a: a.map(lambda x: x.reshape(at["shape"])),
    "permute": lambda run, at, a: a.map(lambda x: x.transpose(at["order"])),
    "trans": lambda run, at, a: a.map(lambda x: x.transpose(1, 0)),
    "join": lambda run, at, a, b: Value(a.kind, np.stack([a.data, b.data], -1), np.stack([a.error, b.error], -1)),
    "gather": Evaluator._gather,
    "dot": lambda run, at, *args: dot(*args),
    "randint": Evaluator._randint,
    "rand": Evaluator._rand,
}


def evaluate(program: Program) -> dict[str, Value]:
    """The buffers after the run.

    Raises:
        Invalid: the program has no meaning. Ambiguous: it hangs on a value that is not known exactly.
    """
    return Evaluator(program).run()
