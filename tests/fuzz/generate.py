"""Draws a random program from its seed: statements that reuse earlier values, loops, branches, stores and reloads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .program import COMPARISONS, FLOATS, INTEGERS, SIGNED, Aliases, Node, Param, Program, walk

Shape = tuple[int, ...]
INPUT_SIZE = 4096
MEMORY_KINDS = ("fp32", "fp16", "bf16", "int1", "int8", "int16", "int32", "int64", "uint8")  # torch's, as arguments
MOST_ELEMENTS = 1024
TAMED = 30.0  # floats are kept about this small, so that products and powers of them stay finite

# what can be left out, while an engine lacks it
FEATURES = (
    "fp16", "bf16", "small_integers", "int64", "unsigned", "bool_memory", "rank3", "rank4", "reshape", "permute",
    "join", "split", "gather", "dot", "dot_tf32", "dot_fp16", "dot_bf16", "dot_int8", "arg_reduce", "xor_sum",
    "combine", "scan", "while", "more_math", "umulhi", "unsigned_divide", "rand", "bitcast", "special",
)  # fmt: skip

# the interpreter has no say in programs with bf16, and NaN in many places hides other errors
_SHARE = {"bf16": 0.35, "special": 0.25}


class Draft:
    """The program so far: its statements, and the type and rough size of every name that can be read here."""

    def __init__(self, seed: int, features: Iterable[str]) -> None:
        self.rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
        # each program does without some of them, so that the others meet more often
        self.features = frozenset(x for x in features if self.chance(_SHARE.get(x, 0.75)))
        self.seed = seed
        self.params: dict[str, Param] = {}
        self.kinds: dict[str, tuple[str, Shape]] = {}
        self.size: dict[str, float] = {}  # of floats: about how large its elements may be
        self.block: list[Node] = []
        self.scopes: list[list[str]] = [[]]
        self.indices: list[str] = []  # of the loops around this place
        self.carried: list[str] = []  # by the innermost loop
        self.slice = 64
        self.used: set[str] = set()
        self.aliases = Aliases()
        self.numbers = 0

    # ---- chance

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def one(self, items: Any) -> Any:
        items = list(items)
        return items[int(self.rng.integers(len(items)))]

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def has(self, feature: str) -> bool:
        return feature in self.features

    # ---- names

    def fresh(self, stem: str = "v") -> str:
        self.numbers += 1
        return f"{stem}{self.numbers}"

    def add(self, op: str, args: list[str], kind: str, shape: Shape, size: float = 0.0, /, **attrs: Any) -> str:
        """Appends a statement with one result of this kind and shape, and gives its name."""
        return self.add_all(op, args, [(kind, shape)], size, **attrs)[0]

    def add_all(
        self, op: str, args: list[str], results: list[tuple[str, Shape]], size: float = 0.0, /, **attrs: Any
    ) -> list[str]:
        outs = [self.declare(self.fresh(), kind, shape, size) for kind, shape in results]
        self.block.append(Node(op, outs, list(args), attrs))
        self.aliases.leave(self.block[-1])
        self.used.update(args)
        return outs

    def declare(self, name: str, kind: str, shape: Shape, size: float = 0.0) -> str:
        self.kinds[name], self.size[name] = (kind, tuple(shape)), size
        self.scopes[-1].append(name)
        return name

    def visible(self) -> list[str]:
        return [name for scope in self.scopes for name in scope]

    def find(self, test: Callable[[str, Shape], bool]) -> str | None:
        """A visible value of a fitting type; late ones, those that a loop carries, and those that nothing has read yet
        a little more often."""
        found = [name for name in self.visible() if test(*self.kinds[name])]
        if not found:
            return None
        for some, p in ((self.carried, 0.35), (self.unread(), 0.4)):
            preferred = [name for name in some if name in found]
            if preferred and self.chance(p):
                return self.one(preferred)
        at = max(self.below(len(found)), self.below(len(found)))
        return found[at]

    def unread(self) -> list[str]:
        return [name for name in self.scopes[-1] if name not in self.used]

    def kind(self, name: str) -> str:
        return self.kinds[name][0]

    def shape(self, name: str) -> Shape:
        return self.kinds[name][1]

    # ---- arguments of the kernel

    def scalar(self, stem: str, kind: str, fill: Any) -> str:
        """An argument; those of one stem and value are the same."""
        name = next((p.name for p in self.params.values() if p.role == "scalar" and p.fill == fill and p.kind == kind
                     and p.name.startswith(stem)), None)  # fmt: skip
        if name is None:
            name = f"{stem}{len(self.params)}"
            self.params[name] = Param(name, kind, "scalar", 0, fill)
            self.kinds[name], self.size[name] = (kind, ()), abs(float(fill))
        return name

    def input(self, kind: str) -> str:
        same = [p.name for p in self.params.values() if p.role == "input" and p.kind == kind]
        if same and (len(same) == 2 or self.chance(0.7)):
            return self.one(same)
        fill = self.one(["whole", "normal", "normal"]) if kind in FLOATS else self.one(["small", "full"])
        if kind in FLOATS and self.has("special"):
            fill += "-special"
        name = f"x{len(self.params)}"
        self.params[name] = Param(name, kind, "input", INPUT_SIZE, fill, len(self.params))
        return name

    def output(self, kind: str) -> str:
        same = [p.name for p in self.params.values() if p.role == "output" and p.kind == kind]
        if same and (len(same) == 2 or self.chance(0.8)):
            return self.one(same)
        name = f"y{len(self.params)}"
        fill = self.one(["whole", "normal"]) if kind in FLOATS else "full"
        self.params[name] = Param(name, kind, "output", 0, fill, len(self.params))
        return name

    # ---- kinds and shapes

    def memory_kinds(self) -> list[str]:
        kinds = ["fp32", "fp32", "fp32", "int32", "int32"]
        kinds += ["fp16"] * self.has("fp16") + ["bf16"] * self.has("bf16") + ["int64"] * self.has("int64")
        kinds += ["int8", "int16"] * self.has("small_integers") + ["int1"] * self.has("bool_memory")
        return kinds + ["uint8"] * (self.has("unsigned") and self.has("small_integers"))

    def float_kinds(self) -> list[str]:
        return ["fp32", "fp32", *(k for k in ("fp16", "bf16") if self.has(k))]

    def integer_kinds(self) -> list[str]:
        kinds = ["int32", *(["int64"] if self.has("int64") else [])]
        kinds += ["int8", "int16"] if self.has("small_integers") else []
        if self.has("unsigned"):
            kinds += ["uint32", *(["uint8", "uint16"] if self.has("small_integers") else [])]
        return kinds

    def any_kind(self) -> str:
        return self.one([*self.float_kinds(), *self.float_kinds(), *self.integer_kinds(), "int1"])

    def choose_dims(self) -> None:
        """The few sizes that the program's tiles have, so that its values often fit together."""
        pool = [1, 2, 4, 8, 16, 16, 32, 64, 128]
        self.dims = [self.one(pool) for _ in range(2 + self.below(2))]
        self.base = self.base_shape()

    def base_shape(self) -> Shape:
        ranks = [1, 2, 2, 2, *([3] if self.has("rank3") else []), *([4] if self.has("rank4") else [])]
        rank = self.one(ranks)
        shape = [self.one(self.dims) for _ in range(rank)]
        while math.prod(shape) > MOST_ELEMENTS:
            at = int(np.argmax(shape))
            shape[at] //= 2
        return tuple(shape)

    def any_shape(self) -> Shape:
        return self.base if self.chance(0.6) else self.base_shape()

    def most_rank(self) -> int:
        return 4 if self.has("rank4") else 3 if self.has("rank3") else 2

    # ---- values to read

    def value(self, kind: str, shape: Shape | None = None) -> str:
        """A value of a type: an earlier one, or a new one; a scalar where the shape is ()."""
        name = self.find(lambda k, s: k == kind and (bool(s) if shape is None else s == shape))
        if name is not None and self.chance(0.85):
            return name
        return self.new(kind, self.any_shape() if shape is None else shape)

    def new(self, kind: str, shape: Shape) -> str:
        """Loaded, converted, spread out from a smaller value, turned round, or constant."""
        ways = [self._converted, self._spread, self._rearranged, self._loaded, self._loaded]
        for _ in range(3):
            name = self.one(ways)(kind, shape)
            if name is not None:
                return name
        return self.constant(kind, shape)

    def constant(self, kind: str, shape: Shape) -> str:
        if kind == "fp32" and self.chance(0.3):
            fill = self.one([0.5, -1.25, 2.0, 0.1])
            number = self.scalar("f", "fp32", float(np.float32(fill)))
            number = self.add("copy", [number], "fp32", (), abs(fill))
            return number if not shape else self.add("broadcast", [number], "fp32", shape, abs(fill), shape=list(shape))
        if kind == "int1":
            value: Any = self.chance(0.5)
        elif kind in FLOATS:
            value = self.one([0.0, 1.0, -1.0, 0.5, 3.0, -2.25, 0.125])
        else:
            value = self.below(8) if kind not in SIGNED or self.chance(0.5) else -self.below(8)
        return self.add("full", [], kind, shape, abs(float(value)), shape=list(shape), value=value, kind=kind)

    def constant_of(self, kind: str, shape: Shape, value: float | int) -> str:
        return self.add("full", [], kind, shape, abs(float(value)), shape=list(shape), value=value, kind=kind)

    def positions(self, shape: Shape, axis: int) -> str:
        """Along one axis 0, 1, 2 ..., the same everywhere else."""
        wide = tuple(size if at == axis else 1 for at, size in enumerate(shape))
        attrs = {"offset": 0, "shape": list(wide), "strides": [1] * len(shape), "starts": [0] * len(shape)}
        name = self.add("affine", [], "int32", wide, **attrs)
        return name if wide == shape else self.add("broadcast", [name], "int32", shape, shape=list(shape))

    def two_dims(self) -> Shape:
        return self.one([8, 16]), self.one([2, 4, 16])

    def _converted(self, kind: str, shape: Shape) -> str | None:
        name = self.find(lambda k, s: s == shape and k != kind)
        return None if name is None else self.cast(name, kind)

    def cast(self, name: str, kind: str) -> str:
        if self.kind(name) == kind:
            return name
        size = self.size[name]
        if self.kind(name) not in FLOATS and kind in FLOATS:
            size = 1.0
            if self.kind(name) != "int1":
                few = self.chance(0.7)
                name, size = (self.narrowed(name, 6), 64.0) if few else (name, 1e10)
        return self.add("cast", [name], kind, self.shape(name), size, kind=kind)

    def narrowed(self, name: str, bits: int) -> str:
        """The lowest bits of integers: between 0 and 2^bits - 1."""
        kind, shape = self.kinds[name]
        mask = self.add("full", [], kind, shape, shape=list(shape), value=2**bits - 1, kind=kind)
        return self.add("and", [name, mask], kind, shape)

    def _spread(self, kind: str, shape: Shape) -> str | None:
        if not shape:
            return None

        def fits(k: str, s: Shape) -> bool:
            if k != kind or s == shape:
                return False
            if len(s) == len(shape):
                return all(x in (1, y) for x, y in zip(s, shape, strict=True))
            return not s or (len(s) == len(shape) - 1 and any(self._drop(shape, at) == s for at in range(len(shape))))

        name = self.find(fits)
        if name is None:
            return None
        small = self.shape(name)
        if small and len(small) < len(shape):
            axis = self.one([at for at in range(len(shape)) if self._drop(shape, at) == small])
            wide = (*small[:axis], 1, *small[axis:])
            name = self.add("expand_dims", [name], kind, wide, self.size[name], axis=axis)
            if wide == shape:
                return name
        return self.add("broadcast", [name], kind, shape, self.size[name], shape=list(shape))

    @staticmethod
    def _drop(shape: Shape, axis: int) -> Shape:
        return shape[:axis] + shape[axis + 1 :]

    def _rearranged(self, kind: str, shape: Shape) -> str | None:
        if not shape:
            return None
        if self.has("permute") and len(shape) > 1 and self.chance(0.5):
            name = self.find(lambda k, s: k == kind and sorted(s) == sorted(shape) and s != shape)
            if name is not None:
                return self.turned(name, shape)
        if not self.has("reshape"):
            return None
        name = self.find(lambda k, s: k == kind and bool(s) and math.prod(s) == math.prod(shape) and s != shape)
        return name and self.add("reshape", [name], kind, shape, self.size[name], shape=list(shape))

    def turned(self, name: str, shape: Shape | None = None) -> str:
        """Axes in another order; into ``shape`` where one is given, which has the same sizes."""
        kind, old = self.kinds[name]
        if len(old) == 2:
            return self.add("trans", [name], kind, old[::-1], self.size[name])
        order = [int(x) for x in self.rng.permutation(len(old))]
        if shape is not None:
            order, left = [], list(range(len(old)))
            for size in shape:
                order.append(next(at for at in left if old[at] == size))
                left.remove(order[-1])
        return self.add("permute", [name], kind, tuple(old[at] for at in order), self.size[name], order=order)

    # ---- memory

    def scalar_value(self) -> str:
        """A small int32 that is known before any input is read: an argument or the number of a program."""
        if self.indices and self.chance(0.4):
            return self.one(self.indices)
        if self.chance(0.4):
            return self.add("program_id", [], "int32", (), axis=self.below(3))
        return self.scalar("n", "int32", self.below(8))

    def _loaded(self, kind: str, shape: Shape) -> str | None:
        if kind not in self.memory_kinds():
            return None
        return self.load(kind, shape)

    def load(self, kind: str, shape: Shape) -> str:
        outputs = [p for p in self.params.values() if p.role == "output" and p.kind == kind]
        own = bool(outputs) and self.chance(0.4)
        buffer = self.one(outputs).name if own else self.input(kind)
        args = self.places(shape, injective=False, own=own)
        attrs = {"buffer": buffer, "base": len(args) > 1, "mask": False, "other": False}
        if shape and self.chance(0.5):
            mask = self.mask(shape)
            args.append(mask)
            attrs["mask"] = True
            if self.chance(0.4):
                args.append(self.value(kind, shape))
                attrs["other"] = True
            elif self.chance(0.8) and kind != "int1":
                attrs["literal"] = float(self.below(5)) if kind in FLOATS else self.below(5)
            else:  # open lanes are chosen away at once
                name = self.add("load", args, kind, shape, 4.0, **attrs)
                return self.add("where", [mask, name, self.value(kind, shape)], kind, shape, TAMED)
        return self.add("load", args, kind, shape, 8.0, **attrs)

    def places(self, shape: Shape, *, injective: bool, own: bool) -> list[str]:
        """One or two offsets, which are added to a pointer one after the other."""
        if len(shape) == 2 and self.chance(0.25):
            return self._rows(shape, injective, own)
        return [self.offsets(shape, injective=injective, own=own), *(["own"] if own else [])]

    def _rows(self, shape: Shape, injective: bool, own: bool) -> list[str]:
        """Rows in any order, each of neighbours, as block attention gathers them."""
        rows, columns = shape
        if injective:
            numbers = self.add("affine", [], "int32", (rows,), offset=0, shape=[rows], strides=[1], starts=[0])
            which = self.add("xor", [numbers, self.constant_of("int32", (rows,), self.below(rows))], "int32", (rows,))
            most = rows
        else:
            bits = min(4, int(math.log2(INPUT_SIZE // 2 // columns)))
            which, most = self.narrowed(self.value("int32", (rows,)), bits), 2**bits
        wide = self.add("expand_dims", [which], "int32", (rows, 1), axis=1)
        step = columns + self.one([0, 0, 3])
        first = self.add("mul", [wide, self.constant_of("int32", (), step)], "int32", (rows, 1))
        offset = self.below(8)
        attrs = {"offset": offset, "shape": [1, columns], "strides": [1, 1], "starts": [0, 0]}
        second = self.add("affine", [], "int32", (1, columns), **attrs)
        if own:
            self.slice = max(self.slice, most * step + offset + 1)
            first = self.add("add", [first, "own"], "int32", (rows, 1))
        if self.chance(0.5):
            return [first, second]
        return [self.add("add", [first, second], "int32", shape)]

    def offsets(self, shape: Shape, *, injective: bool, own: bool) -> str:
        """Offsets into an input, or into the program's own slice of an output, which is made large enough."""
        if not shape:
            return self.add("full", [], "int32", (), shape=[], value=self.below(64), kind="int32")
        if not injective and self.chance(0.25):
            index = self.find(lambda k, s: k in ("int32", "int64") and s == shape)
            if index is not None:
                return self.narrowed(index, 6 if own else 10)
        gap = self.one([1, 1, 1, 1, 2, 3]) if math.prod(shape) <= 256 else 1
        order = list(range(len(shape))) if self.chance(0.65) else [int(x) for x in self.rng.permutation(len(shape))]
        strides, step = [0] * len(shape), gap
        for axis in reversed(order):
            strides[axis] = step
            step *= shape[axis]
            if self.chance(0.1):
                step += 3
        if not injective and self.chance(0.2):
            strides[self.below(len(shape))] = self.one([0, 1, 2])
        starts = [0] * len(shape)
        offset = self.one([0, 0, 0, 1, 5, 16])
        for axis, size in enumerate(shape):
            if self.chance(0.1):
                starts[axis] = self.one([1, 2, size])
            if self.chance(0.12):  # backwards
                offset += (2 * starts[axis] + size - 1) * strides[axis]
                strides[axis] = -strides[axis]
        ends = [(start + size - 1) * stride for start, size, stride in zip(starts, shape, strides, strict=True)]
        last = offset + sum(max(x, y * z) for x, y, z in zip(ends, starts, strides, strict=True))
        if last >= INPUT_SIZE - 256:  # too far apart
            return self.offsets(shape, injective=injective, own=own)
        args = []
        if self.chance(0.35):
            scalar, most = self.scalar_value(), 15
            if self.chance(0.5):
                factor = self.one([2, 8, 16])
                by = self.add("full", [], "int32", (), shape=[], value=factor, kind="int32")
                scalar, most = self.add("mul", [scalar, by], "int32", ()), most * factor
            args, last = [scalar], last + most
        if own:
            self.slice = max(self.slice, last + 1)
        return self.add(
            "affine", args, "int32", shape, offset=offset, shape=list(shape), strides=strides, starts=starts
        )

    def mask(self, shape: Shape) -> str:
        found = self.find(lambda k, s: k == "int1" and s == shape)
        if found is not None and self.chance(0.5):
            return found
        axes = [axis for axis in range(len(shape)) if self.chance(0.6)] or [len(shape) - 1]
        bounds = [self.scalar("n", "int32", self.below(shape[axis] + 2)) for axis in axes]
        wide = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
        name = self.add("bounds", bounds, "int1", wide, shape=list(shape), axes=axes)
        return name if wide == shape else self.add("broadcast", [name], "int1", shape, shape=list(shape))

    def store(self, name: str) -> Node:
        kind, shape = self.kinds[name]
        if kind not in self.memory_kinds():
            kind = "int64" if kind == "uint32" and self.has("int64") else "int32"
            name = self.cast(name, kind)
        places = self.places(shape, injective=True, own=True)
        mask = [self.mask(shape)] if shape and self.chance(0.3) else []
        attrs = {"buffer": self.output(kind), "base": len(places) > 1, "mask": bool(mask)}
        self.add_all("store", [*places, name, *mask], [], **attrs)
        return self.block[-1]

    def reload(self, stored: Node) -> str:
        """What was just stored, or what lies about there, in a tile of the same shape."""
        at = stored.attrs
        places, name = stored.args[: 1 + at["base"]], stored.args[1 + at["base"]]
        kind, shape = self.kinds[name]
        if self.chance(0.5) and shape:
            places = self.places(shape, injective=False, own=True)
        attrs = {"buffer": at["buffer"], "base": len(places) > 1, "mask": False, "other": False}
        return self.add("load", places, kind, shape, TAMED * TAMED, **attrs)

    # ---- sizes of floats

    def tamed(self, name: str) -> str:
        """Floats brought back to about TAMED: scaled down, clamped, or a sine."""
        kind, shape = self.kinds[name]
        if kind not in FLOATS or self.size[name] <= TAMED:
            return name
        if self.size[name] < 1e6 and self.chance(0.4):
            factor = 2.0 ** -math.ceil(math.log2(self.size[name] / TAMED))
            scale = self.add("full", [], kind, shape, factor, shape=list(shape), value=factor, kind=kind)
            return self.add("mul", [name, scale], kind, shape, TAMED)
        if self.chance(0.3) and kind == "fp32" and self.has("more_math") and self.size[name] < 1e3:
            return self.add("sin", [name], kind, shape, 1.0)
        for op, limit in (("minimum", TAMED), ("maximum", -TAMED)):
            bound = self.add("full", [], kind, shape, TAMED, shape=list(shape), value=limit, kind=kind)
            name = self.add(op, [name, bound], kind, shape, TAMED, nan=self.chance(0.3))
        return name


def generate(seed: int, features: Iterable[str] = FEATURES, levels: int = 1) -> Program:
    """The program of a seed. levels: how many the machine can run; the seed chooses one."""
    from .grammar import statement

    draft = Draft(seed, features)
    draft.choose_dims()
    grid = draft.one([[1], [2], [3], [2, 2], [1, 3], [2, 1, 2], [1, 2, 3]])
    draft.params["slice"] = Param("slice", "int32", "scalar", 0, 0)
    number = draft.add("program_id", [], "int32", (), axis=0)
    for axis in range(1, len(grid)):
        # x + grid[0] * (y + grid[1] * z)
        factor = math.prod(grid[:axis])
        count = draft.add("full", [], "int32", (), shape=[], value=factor, kind="int32")
        part = draft.add("program_id", [], "int32", (), axis=axis)
        part = draft.add("mul", [part, count], "int32", ())
        number = draft.add("add", [number, part], "int32", ())
    draft.kinds["slice"], draft.kinds["own"] = ("int32", ()), ("int32", ())
    draft.block.append(Node("mul", ["own"], [number, "slice"]))
    for _ in range(4 + draft.below(14)):
        statement(draft)
    _finish(draft)
    draft.slice = -(-draft.slice // 16) * 16
    draft.params["slice"].fill = draft.slice
    level = draft.below(levels)
    return Program(seed, list(draft.params.values()), draft.block, grid, draft.slice, level)


def _finish(draft: Draft) -> None:
    """Stores most of what nothing has read, so that it isn't dead."""
    for name in draft.unread()[:10]:
        if draft.chance(0.85):
            draft.store(name)
    if not any(p.role == "output" for p in draft.params.values()):
        draft.store(draft.value("fp32"))


def coverage(program: Program, kinds: dict[str, tuple[str, Shape]]) -> set[str]:
    """What a program exercises: operations, with the element type that matters for them."""
    found = set()
    for node in walk(program.body):
        names = node.args if node.args else node.outs
        kind = kinds.get(names[0], ("", ()))[0] if names else ""
        if node.op in ("cast", "bitcast") and node.outs[0] in kinds:
            found.add(f"{node.op} {kind} to {node.attrs['kind']}")
        elif node.op in ("load", "store"):
            memory = next(p.kind for p in program.params if p.name == node.attrs["buffer"])
            found.add(f"{node.op} {memory}")
            found.add(f"{node.op} {'masked' if node.attrs['mask'] else 'whole'}")
        elif node.op in ("reduce", "scan"):
            found.add(f"{node.op} {node.attrs['combine']}")
        elif node.op == "dot":
            found.add(f"dot {kind} {node.attrs['precision']}".strip())
        elif node.op in ("for", "while", "if", "rand", "randint", "program_id"):
            found.add(node.op)
        elif node.op in COMPARISONS:
            found.add(f"compare {kind}")
        elif node.op == "where":
            found.add(f"where {kinds.get(node.outs[0], ('', ()))[0]}")
        elif kind in (*FLOATS, *INTEGERS, "int1"):
            found.add(f"{node.op} {kind}")
        else:
            found.add(node.op)
        rank = max((len(kinds[x][1]) for x in node.outs if x in kinds), default=0)
        found.add(f"rank {rank}")
    return found
