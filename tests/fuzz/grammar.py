"""The statements that a random program is made of. Each function adds one, with what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable

from .generate import MOST_ELEMENTS, TAMED, Draft
from .program import COMPARISONS, FLOATS, SIGNED, UNSIGNED, Node

COMBINED_ELEMENTS = 256  # the interpreter calls a combine function of ours once an element


def statement(draft: Draft) -> None:
    """One random statement; control flow holds some more."""
    names = [name for name, (_, feature) in STATEMENTS.items() if all(draft.has(x) for x in feature.split())]
    weights = [
        STATEMENTS[name][0] * (0.4 if name in ("for", "while", "if") and len(draft.scopes) > 1 else 1.0)
        for name in names
    ]
    total = sum(weights)
    chosen = draft.rng.choice(len(names), p=[w / total for w in weights])
    _WAYS[names[chosen]](draft)


# ---- elements


def _float_tile(draft: Draft, kind: str | None = None, limit: float = TAMED * TAMED) -> str:
    name = draft.value(kind or draft.one(draft.float_kinds()))
    return draft.tamed(name) if draft.size[name] > limit else name


def _integer_tile(draft: Draft, kinds: list[str] | None = None) -> str:
    return draft.value(draft.one(kinds or draft.integer_kinds()))


def _partner(draft: Draft, name: str) -> str:
    """A second operand: the same shape, or one that is spread over it, or over which the first is spread."""
    kind, shape = draft.kinds[name]
    if draft.chance(0.3):
        found = draft.find(
            lambda k, s: k == kind and len(s) == len(shape) and s != shape
            and all(x == y or x == 1 for x, y in zip(s, shape, strict=True))
        )  # fmt: skip
        if found is not None:
            return found
    if draft.chance(0.1):
        return draft.value(kind, ())
    return draft.value(kind, shape)


def _float_pair(draft: Draft) -> tuple[str, str, str, tuple[int, ...]]:
    a = _float_tile(draft)
    b = draft.tamed(_partner(draft, a))
    return draft.tamed(a), b, draft.kind(a), draft.shape(a)


def float_binary(draft: Draft) -> None:
    op = draft.one(["add", "sub", "mul", "mul", "div"])
    a, b, kind, shape = _float_pair(draft)
    x, y = draft.size[a], draft.size[b]
    if op == "div":
        if kind != "fp32":  # Triton divides in fp32
            a, b = draft.cast(a, "fp32"), draft.cast(b, "fp32")
        one = draft.constant("fp32", draft.shape(b))
        draft.size[one] = 1.0
        b = draft.add("abs", [b], "fp32", draft.shape(b), y)
        half = draft.add("full", [], "fp32", draft.shape(b), 0.5, shape=list(draft.shape(b)), value=0.5, kind="fp32")
        b = draft.add("add", [b, half], "fp32", draft.shape(b), y)
        draft.add("div", [a, b], "fp32", shape, 2 * x)
        return
    draft.add(op, [a, b], kind, shape, x * y if op == "mul" else x + y)


def float_extreme(draft: Draft) -> None:
    a, b, kind, shape = _float_pair(draft)
    op = draft.one(["maximum", "minimum"])
    draft.add(op, [a, b], kind, shape, max(draft.size[a], draft.size[b]), nan=draft.chance(0.5))


def fma(draft: Draft) -> None:
    a, b, kind, shape = _float_pair(draft)
    if draft.shape(b) != shape:
        b = draft.value(kind, shape)
    c = draft.tamed(draft.value(kind, shape))
    draft.add("fma", [a, draft.tamed(b), c], kind, shape, draft.size[a] * TAMED + TAMED)


def function(draft: Draft) -> None:
    plain = ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs"]
    op = draft.one(plain + (["sin", "cos", "floor", "ceil", "erf"] if draft.has("more_math") else []))
    if op == "abs":
        a = draft.value(draft.one([*draft.float_kinds(), *[k for k in draft.integer_kinds() if k in SIGNED]]))
        draft.add("abs", [a], *draft.kinds[a], draft.size[a])
        return
    a = draft.tamed(_float_tile(draft))
    shape = draft.shape(a)
    a = draft.cast(a, "fp32")
    size = {"exp": 1e13, "exp2": 1e9, "floor": draft.size[a] + 1, "ceil": draft.size[a] + 1}.get(op, 6.0)
    if op in ("exp", "exp2") and draft.chance(0.6):  # as a softmax has it
        a = draft.add("abs", [a], "fp32", shape, draft.size[a])
        a = draft.add("neg", [a], "fp32", shape, draft.size[a])
        size = 1.0
    elif op in ("log", "log2", "sqrt", "rsqrt") and draft.chance(0.8):
        a = draft.add("abs", [a], "fp32", shape, draft.size[a])
        if op != "sqrt":
            a = draft.add("add", [a, draft.constant_of("fp32", shape, 0.25)], "fp32", shape, draft.size[a])
    draft.add(op, [a], "fp32", shape, size)


def negative(draft: Draft) -> None:
    a = draft.value(draft.one([*draft.float_kinds(), *draft.integer_kinds()]))
    draft.add("neg", [a], *draft.kinds[a], draft.size[a])


def integer_binary(draft: Draft) -> None:
    a = _integer_tile(draft)
    op = draft.one(["add", "sub", "mul", "and", "or", "xor", "maximum", "minimum"])
    attrs = {"nan": False} if op in ("maximum", "minimum") else {}
    draft.add(op, [a, _partner(draft, a)], *draft.kinds[a], **attrs)


def shift(draft: Draft) -> None:
    a = _integer_tile(draft)
    kind, shape = draft.kinds[a]
    bits = {"8": 3, "6": 4, "2": 5, "4": 6}[kind[-1]]
    draft.add(draft.one(["shl", "shr"]), [a, draft.narrowed(draft.value(kind, shape), bits)], kind, shape)


def division(draft: Draft) -> None:
    """The divisor is 1, 3, ... 15 or, for signed numbers, sometimes -1, -3, ..."""
    kinds = [k for k in draft.integer_kinds() if k in SIGNED or draft.has("unsigned_divide")]
    a = _integer_tile(draft, kinds)
    kind, shape = draft.kinds[a]
    one = draft.constant_of(kind, shape, 1)
    b = draft.add("or", [draft.narrowed(draft.value(kind, shape), 4), one], kind, shape)
    if kind in SIGNED and draft.chance(0.3):
        a = draft.add("shr", [a, one], kind, shape)  # the least number by -1 has no answer
        b = draft.add("neg", [b], kind, shape)
    draft.add(draft.one(["floordiv", "mod"]), [a, b], kind, shape)


def umulhi(draft: Draft) -> None:
    a = _integer_tile(draft, [k for k in draft.integer_kinds() if k in ("int32", "uint32", "int64")])
    draft.add("umulhi", [a, draft.value(*draft.kinds[a])], *draft.kinds[a])


def comparison(draft: Draft) -> None:
    a = draft.value(draft.one([*draft.float_kinds(), *draft.integer_kinds()]))
    b = _partner(draft, a)
    draft.add(draft.one(COMPARISONS), [a, b], "int1", draft.shape(a))


def logic(draft: Draft) -> None:
    a = draft.value("int1")
    if draft.chance(0.3):
        draft.add("invert", [a], "int1", draft.shape(a))
    else:
        draft.add(draft.one(["and", "or", "xor"]), [a, draft.value("int1", draft.shape(a))], "int1", draft.shape(a))


def invert(draft: Draft) -> None:
    a = _integer_tile(draft)
    draft.add("invert", [a], *draft.kinds[a])


def choice(draft: Draft) -> None:
    a = draft.value(draft.any_kind())
    kind, shape = draft.kinds[a]
    b = draft.value(kind, shape)
    take = draft.mask(shape) if draft.chance(0.5) else draft.value("int1", shape)
    draft.add("where", [take, a, b], kind, shape, max(draft.size[a], draft.size[b]))


def conversion(draft: Draft) -> None:
    a = draft.value(draft.any_kind())
    kinds = [*draft.float_kinds(), *draft.integer_kinds(), "int1"]
    kind = draft.one([k for k in kinds if k != draft.kind(a)])
    if draft.kind(a) in FLOATS and kind in UNSIGNED:
        a = draft.add("abs", [a], *draft.kinds[a], draft.size[a])
    draft.cast(a, kind)


def bitcast(draft: Draft) -> None:
    pairs = [("fp32", "int32"), ("int32", "fp32"), ("fp32", "uint32"), ("fp16", "int16"), ("int16", "fp16"),
             ("bf16", "int16"), ("int16", "bf16"), ("int32", "uint32"), ("uint8", "int8")]  # fmt: skip
    known = {*draft.float_kinds(), *draft.integer_kinds()}
    source, kind = draft.one([pair for pair in pairs if set(pair) <= known])
    a = draft.value(source)
    draft.add("bitcast", [a], kind, draft.shape(a), 1e30, kind=kind)


# ---- shapes


def turn(draft: Draft) -> None:
    name = draft.find(lambda k, s: len(s) > 1)
    draft.turned(name or draft.new("fp32", draft.two_dims()))


def reshape(draft: Draft) -> None:
    a = draft.value(draft.any_kind())
    kind, shape = draft.kinds[a]
    left, new = math.prod(shape), []
    while left > 1 and len(new) < draft.most_rank() - 1:
        new.append(2 ** draft.below(int(math.log2(left)) + 1))
        left //= new[-1]
    new.append(left)
    draft.add("reshape", [a], kind, tuple(new), draft.size[a], shape=new)


def spread(draft: Draft) -> None:
    draft._spread(draft.any_kind(), draft.any_shape())


def join(draft: Draft) -> None:
    a = draft.value(draft.any_kind())
    kind, shape = draft.kinds[a]
    if len(shape) >= draft.most_rank() or math.prod(shape) * 2 > MOST_ELEMENTS:
        return reshape(draft)
    b = draft.value(kind, shape)
    draft.add("join", [a, b], kind, (*shape, 2), max(draft.size[a], draft.size[b]))
    return None


def split(draft: Draft) -> None:
    name = draft.find(lambda k, s: len(s) > 1 and s[-1] == 2)
    if name is None:
        kind, shape = draft.any_kind(), draft.any_shape()
        name = draft.find(lambda k, s: len(s) >= 1 and math.prod(s) > 2 and k == kind) or draft.new(
            kind, (*shape[-1:], 2)
        )
        half = (math.prod(draft.shape(name)) // 2, 2)
        if draft.shape(name) != half:
            name = draft.add("reshape", [name], kind, half, draft.size[name], shape=list(half))
    kind, shape = draft.kinds[name]
    draft.add_all("split", [name], [(kind, shape[:-1])] * 2, draft.size[name])


def gather(draft: Draft) -> None:
    a = draft.value(draft.any_kind())
    kind, shape = draft.kinds[a]
    axis = draft.below(len(shape))
    wide = draft.one([shape[axis], shape[axis], 4, 16])
    wide = wide if math.prod(shape) // shape[axis] * wide <= MOST_ELEMENTS else shape[axis]
    index_shape = (*shape[:axis], wide, *shape[axis + 1 :])
    index = draft.narrowed(draft.value("int32", index_shape), int(math.log2(shape[axis])))
    draft.add("gather", [a, index], kind, index_shape, draft.size[a], axis=axis)


# ---- folds


def reduction(draft: Draft) -> None:
    ops = ["sum", "sum", "max", "min"]
    ops += ["argmax", "argmin"] * draft.has("arg_reduce") + ["xor_sum", "reduce_or"] * draft.has("xor_sum")
    op = draft.one(ops)
    if op in ("xor_sum", "reduce_or"):
        a = _integer_tile(draft, [*draft.integer_kinds(), "int1"])
    else:
        a = draft.value(draft.one([*draft.float_kinds(), *draft.float_kinds(), *draft.integer_kinds()]))
        a = draft.tamed(a)
    kind, shape = draft.kinds[a]
    everything = op in ("sum", "max", "min", "xor_sum") and draft.chance(0.12)
    axis = None if everything else draft.below(len(shape))
    keep = draft.chance(0.3) and not everything
    rest = () if axis is None else (*shape[:axis], *((1,) if keep else ()), *shape[axis + 1 :])
    small = kind not in FLOATS and kind != "int1" and int("".join(c for c in kind if c.isdigit())) < 32
    if op == "sum" and small:
        kind = "int32" if kind in SIGNED else "uint32"
    elif op in ("max", "min"):
        kind = "fp32" if kind in FLOATS else "int32" if small else kind
    elif op.startswith("arg"):
        kind = "int32"
    count = math.prod(shape) if axis is None else shape[axis]
    result = draft.add(op, [a], kind, rest, draft.size[a] * (count if op == "sum" else 1), axis=axis, keep=keep)
    if axis is not None and draft.chance(0.6) and not op.startswith("arg") and kind == draft.kind(a):
        back(draft, a, draft.tamed(result), axis)


def back(draft: Draft, a: str, result: str, axis: int) -> None:
    """What was reduced, against the tile that it was reduced from, as in a softmax."""
    kind, shape = draft.kinds[a]
    if len(draft.shape(result)) < len(shape):
        wide = (*shape[:axis], 1, *shape[axis + 1 :])
        result = draft.add("expand_dims", [result], kind, wide, draft.size[result], axis=axis)
    op = draft.one(["add", "sub", "mul"]) if kind != "int1" else "xor"
    x, y = draft.size[a], draft.size[result]
    draft.add(op, [a, result], kind, shape, x * y if op == "mul" else x + y)


def _few(draft: Draft, kind: str) -> str:
    """A tile that is small enough for combine functions of our own."""
    name = draft.find(lambda k, s: k == kind and bool(s) and math.prod(s) <= COMBINED_ELEMENTS)
    if name is not None:
        return name
    rank = 1 + draft.below(2)
    return draft.new(kind, tuple(draft.one([2, 4, 8, 16]) for _ in range(rank)))


def combined(draft: Draft) -> None:
    which = draft.one(["both_ends", "largest", "all_bits", "any_bits", "product", "summary", "three_sums"])
    floats = which in ("summary", "three_sums") or (which in ("both_ends", "largest") and draft.chance(0.5))
    if which in ("all_bits", "any_bits") and draft.chance(0.3):
        kind = "int1"
    else:
        kind = "fp32" if floats else draft.one(draft.integer_kinds())
    a = draft.tamed(_few(draft, kind))
    shape = draft.shape(a)
    axis = draft.below(len(shape))
    rest = (*shape[:axis], *shape[axis + 1 :])
    args, results = [a], [(kind, rest)]
    if which == "largest":
        args.append(draft.positions(shape, axis))
        results.append(("int32", rest))
    elif which != "product" and which not in ("all_bits", "any_bits"):
        args.append(draft.tamed(draft.value(kind, shape)))
        results.append((kind, rest))
    if which == "three_sums":
        args.append(draft.tamed(draft.value(kind, shape)))
        results.append((kind, rest))
    draft.add_all("reduce", args, results, 1e6, combine=which, axis=axis)


def scan(draft: Draft) -> None:
    way = draft.one(["cumsum", "cumsum", "cumprod", "last_set", "affine_map", "running_max", "largest"])
    reverse = draft.chance(0.4)
    if way == "cumsum" or (way == "cumprod" and draft.chance(0.6)):
        kinds = [*draft.float_kinds(), *draft.integer_kinds()] if way == "cumsum" else draft.integer_kinds()
        a = draft.tamed(draft.value(draft.one(kinds)))
        kind, shape = draft.kinds[a]
        if kind in ("int8", "int16", "uint8", "uint16"):
            kind = "int32" if kind in SIGNED else "uint32"
        draft.add(way, [a], kind, shape, 1e4, axis=draft.below(len(shape)), reverse=reverse)
        return
    floats = way in ("cumprod", "running_max", "largest")
    a = draft.tamed(_few(draft, "fp32" if floats else draft.one(draft.integer_kinds())))
    kind, shape = draft.kinds[a]
    axis = draft.below(len(shape))
    if way == "cumprod":
        a = draft.add("cos" if draft.has("more_math") else "neg", [a], kind, shape, 1.0)
        draft.add("cumprod", [a], kind, shape, 1.0, axis=axis, reverse=reverse)
        return
    args = [a]
    if way == "affine_map":
        args.append(draft.value(kind, shape))
    elif way == "largest":
        args.append(draft.positions(shape, axis))
    results = [(draft.kind(x), shape) for x in args]
    draft.add_all("scan", args, results, TAMED, combine=way, axis=axis, reverse=reverse)


def product(draft: Draft) -> None:
    ways = [("fp32", "ieee")]
    ways += [("fp32", "tf32")] * draft.has("dot_tf32") + [("fp16", "")] * (draft.has("dot_fp16") and draft.has("fp16"))
    ways += [("bf16", "")] * (draft.has("dot_bf16") and draft.has("bf16")) + [("int8", "")] * draft.has("dot_int8")
    kind, precision = draft.one(ways)
    least = {"fp32": 8, "int8": 32}.get(kind, 16)
    sizes, depths = [1, 2, 4, 8, 16, 32], [least, least, 2 * least]
    if kind == "bf16":  # more often as large as AMX takes them: 16 x 16 x 32
        sizes, depths = [1, 4, 16, 16, 32, 32], [16, 32, 32]
    m, n, k = draft.one(sizes), draft.one(sizes), draft.one(depths)
    out = "int32" if kind == "int8" else "fp32"
    start = []
    if draft.chance(0.5):
        # an earlier tile of the result's type, such as one that a loop carries
        found = draft.find(lambda k, s: k == out and len(s) == 2 and max(s) <= 64)
        start = [found or draft.value(out, (m, n))]
        m, n = draft.shape(start[0])

    def side(rows: int, columns: int) -> str:
        if draft.chance(0.4):
            return draft.add("trans", [draft.tamed(draft.value(kind, (columns, rows)))], kind, (rows, columns), TAMED)
        return draft.tamed(draft.value(kind, (rows, columns)))

    a, b = side(m, k), side(k, n)
    start = [draft.tamed(x) for x in start]
    size = 0.0 if kind == "int8" else k * draft.size[a] * draft.size[b]
    result = draft.add("dot", [a, b, *start], out, (m, n), size, precision=precision)
    if draft.chance(0.5):  # something done to it while it is still in registers
        scale = draft.tamed(result)
        draft.add("add", [scale, draft.value(out, (m, n))], out, (m, n), TAMED * 2)


# ---- memory and random numbers


def load(draft: Draft) -> None:
    draft.load(draft.one(draft.memory_kinds()), draft.any_shape() if draft.chance(0.9) else ())


def store(draft: Draft) -> None:
    """Often with a load of the same place, in a loop that might as well have run before the store."""
    name = draft.value(draft.any_kind()) if draft.chance(0.9) else draft.value("fp32", ())
    stored = draft.store(name)
    if draft.chance(0.5):
        again = draft.reload(stored)
        kind, shape = draft.kinds[again]
        other = draft.tamed(draft.value(kind, shape))
        op = "xor" if kind == "int1" else "add"
        draft.add(op, [draft.tamed(again), other], kind, shape, 2 * TAMED)


def random_numbers(draft: Draft) -> None:
    seed = draft.scalar("seed", "int32", draft.below(1000))
    offset = draft.value("int32" if draft.chance(0.8) or not draft.has("int64") else "int64")
    shape = draft.shape(offset)
    if draft.chance(0.5) and draft.has("unsigned"):
        draft.add("randint", [seed, offset], "uint32", shape)
    else:
        drawn = draft.add("rand", [seed, offset], "fp32", shape, 1.0)
        if draft.chance(0.5):
            draft.store(drawn)


# ---- control flow


def _carried(draft: Draft) -> list[str]:
    """Values to carry: tiles and scalars, some of equal type, so that they may change places."""
    first = draft.value(draft.any_kind()) if draft.chance(0.8) else draft.value("int32", ())
    found = [first]
    if draft.chance(0.6):
        found.append(draft.value(*draft.kinds[first]))
    if draft.chance(0.4):
        found.append(draft.value(draft.one(["fp32", "int32"]), () if draft.chance(0.5) else None))
    found = [draft.tamed(x) for x in found]
    return [x for at, x in enumerate(found) if draft.aliases.are_distinct(found[: at + 1])]


def _body(draft: Draft, first: str | None = None) -> Node:
    """Some statements, and a yield of values of the carried ones' types: new, each other, or from outside. Some are
    ready long before the end, so that the old ones are read after them."""
    results: dict[str, str] = {}
    for early in (0.4, 1.0):
        for _ in range(1 + draft.below(2)):
            statement(draft)
        for name in draft.carried:
            if name not in results and draft.chance(early):
                results[name] = _next(draft, name, name == first)
        if results and draft.chance(0.5):
            draft.store(draft.one([*draft.carried, *draft.unread()]))
    draft.used.update(results.values())
    return Node("yield", [], [results[name] for name in draft.carried])


def _next(draft: Draft, name: str, counts: bool) -> str:
    """The value that a carried one takes."""
    kind, shape = draft.kinds[name]
    if counts:
        return draft.add("add", [name, draft.constant_of("int32", (), 1 + draft.below(2))], "int32", ())
    others = [x for x in draft.carried if x != name and draft.kinds[x] == (kind, shape)]
    if others and draft.chance(0.35):  # they change places
        return draft.one(others)
    if shape and kind in ("fp32", "int32", "int64") and draft.chance(0.3):
        return draft.tamed(_mixed(draft, name))
    value = draft.value(kind, shape)
    if draft.chance(0.4):  # a sum that grows, as most loops have it
        op = "xor" if kind == "int1" else "add"
        value = draft.add(op, [name, value], kind, shape, draft.size[name] + draft.size[value])
    return draft.tamed(value)


def _mixed(draft: Draft, name: str) -> str:
    """A tile of which each element comes of several of the old one, so that it can't be made in the old one's place."""
    kind, shape = draft.kinds[name]
    if len(shape) == 2 and shape[0] == shape[1] and draft.has("permute"):
        other = draft.turned(name)
    else:
        axis = draft.below(len(shape))
        least = (*shape[:axis], 1, *shape[axis + 1 :])
        other = draft.add(draft.one(["max", "min"]), [name], kind, least, draft.size[name], axis=axis, keep=True)
    return draft.add(draft.one(["add", "sub"]), [name, other], kind, shape, 2 * draft.size[name])


def _loop(draft: Draft, op: str) -> None:
    initial = _carried(draft)
    most = 3
    if op == "for":
        lo = draft.constant_of("int32", (), draft.below(2)) if draft.chance(0.8) else draft.scalar("n", "int32", 1)
        hi = draft.one([
            lambda: draft.scalar("n", "int32", draft.below(most + 1)), lambda: draft.constant_of("int32", (), most),
            lambda: draft.narrowed(draft.value("int32", ()), 2),
        ])()  # fmt: skip
        step = draft.constant_of("int32", (), draft.one([1, 1, 2]))
        args, index = [lo, hi, step, *initial], draft.fresh("i")
    else:
        initial.insert(0, draft.constant_of("int32", (), draft.below(2)))
        args, index = [draft.scalar("n", "int32", draft.below(most + 1)), *initial], ""
    draft.used.update(args)
    outer, draft.block = draft.block, []
    draft.scopes.append([])
    loop = Node(op, [], args, {"index": index} if index else {})
    outs = loop.outs = [draft.declare(draft.fresh("c"), *draft.kinds[x], max(TAMED, draft.size[x])) for x in initial]
    if index:
        draft.declare(index, "int32", ())
    draft.indices.append(index or outs[0])
    draft.aliases.enter(loop)
    around, draft.carried = draft.carried, outs
    body = _body(draft, outs[0] if op == "while" else None)
    draft.carried = around
    draft.indices.pop()
    draft.block.append(body)
    loop.blocks, draft.block = [draft.block], outer
    draft.scopes.pop()
    draft.scopes[-1].extend(outs)
    draft.block.append(loop)
    draft.aliases.leave(loop)


def for_loop(draft: Draft) -> None:
    if len(draft.scopes) < 4:
        _loop(draft, "for")


def while_loop(draft: Draft) -> None:
    if len(draft.scopes) < 4:
        _loop(draft, "while")


def branch(draft: Draft) -> None:
    if len(draft.scopes) >= 4:
        return
    a = draft.value("int32", ()) if draft.chance(0.5) else draft.scalar_value()
    condition = draft.add(draft.one(COMPARISONS), [a, draft.scalar("n", "int32", draft.below(3))], "int1", ())
    first = draft.value(draft.any_kind())
    types = [draft.kinds[first]] + ([draft.kinds[draft.value(draft.any_kind())]] if draft.chance(0.4) else [])
    outer, blocks, sizes = draft.block, [], [0.0] * len(types)
    for way in range(2):
        draft.block = []
        draft.scopes.append([])
        if way == 0 or draft.chance(0.6):
            for _ in range(1 + draft.below(3)):
                statement(draft)
            results = [draft.value(*x) for x in types]
        else:  # no else: what was there before
            draft.scopes.pop()
            draft.block = outer
            results = [draft.value(*x) for x in types]
            draft.block = []
            draft.scopes.append([])
        draft.used.update(results)
        sizes = [max(size, draft.size[x]) for size, x in zip(sizes, results, strict=True)]
        blocks.append([*draft.block, Node("yield", [], results)])
        draft.scopes.pop()
    draft.block = outer
    outs = [draft.declare(draft.fresh("r"), *x, size) for x, size in zip(types, sizes, strict=True)]
    draft.block.append(Node("if", outs, [condition], {}, blocks))
    draft.aliases.leave(draft.block[-1])


# statement: how often, and the features that it needs
STATEMENTS: dict[str, tuple[float, str]] = {
    "float_binary": (4.0, ""), "float_extreme": (1.5, ""), "fma": (0.7, ""), "function": (2.0, ""),
    "negative": (0.4, ""), "integer_binary": (2.0, ""), "shift": (0.7, ""), "division": (0.7, ""),
    "umulhi": (0.4, "umulhi"), "comparison": (1.2, ""), "logic": (0.6, ""), "invert": (0.3, ""), "choice": (1.2, ""),
    "conversion": (1.5, ""), "bitcast": (0.4, "bitcast"), "turn": (1.0, "permute"), "reshape": (0.8, "reshape"),
    "spread": (0.7, ""), "join": (0.6, "join"), "split": (0.6, "split reshape"), "gather": (0.8, "gather"),
    "reduction": (2.5, ""), "combined": (0.8, "combine"), "scan": (0.8, "scan"), "product": (1.6, "dot"),
    "load": (1.2, ""), "store": (1.3, ""), "random_numbers": (0.3, "rand"), "for": (1.3, ""), "while": (0.5, "while"),
    "if": (0.9, ""),
}  # fmt: skip
_WAYS: dict[str, Callable[[Draft], None]] = {
    "float_binary": float_binary, "float_extreme": float_extreme, "fma": fma, "function": function,
    "negative": negative, "integer_binary": integer_binary, "shift": shift, "division": division, "umulhi": umulhi,
    "comparison": comparison, "logic": logic, "invert": invert, "choice": choice, "conversion": conversion,
    "bitcast": bitcast, "turn": turn, "reshape": reshape, "spread": spread, "join": join, "split": split,
    "gather": gather, "reduction": reduction, "combined": combined, "scan": scan, "product": product, "load": load,
    "store": store, "random_numbers": random_numbers, "for": for_loop, "while": while_loop, "if": branch,
}  # fmt: skip
