"""What is computed where: which values get a buffer, which are recomputed in place, and which loops are one loop.

A tensor value is either *stored*, written once to a buffer at its own place in the program, or *inline*, a formula of
stored values that is evaluated wherever it is read. Statements over the same index space are then fused into groups.
Program order is what makes this right, so fusion is the careful part: a statement joins an earlier group only if every
value that it takes from the group is taken at the same index, and it may be moved before all the groups in between.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .formulas import COSTLY, ELEMENTWISE, is_pointer
from .ttir import Block, Op, Value

Index = tuple[str, ...]  # a loop variable or "0" for each dimension

# a result's element is an operand's element at another index
VIEWS = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.make_range", "arith.constant"}
# operations of their own index space: they stand where they are, and their results are stored
_FOLDS = {"tt.reduce", "tt.scan"}
_OTHER = {"tt.load", "tt.store", "tt.dot", "tt.join", "tt.split", "tt.reshape", "tt.gather", "tt.unsplat"}
_SCALARS = {"tt.get_program_id", "tt.get_num_programs"}
_CONTROL = {"scf.for", "scf.if", "scf.while"}
_SILENT = {"scf.yield", "scf.condition", "tt.return", "tt.reduce.return", "tt.scan.return"}
COVERED = {*VIEWS, *ELEMENTWISE, *_FOLDS, *_OTHER, *_SCALARS, *_CONTROL, *_SILENT}
_TAKES_POINTERS = {
    "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.bitcast", "tt.addptr", "tt.load", "tt.store"
}  # fmt: skip


def loop_index(shape: tuple[int, ...]) -> Index:
    """The loop variables of a nest over ``shape``; the last one, ``j``, is the vectorised one."""
    return tuple([f"i{axis}" for axis in range(len(shape) - 1)] + ["j"]) if shape else ()


def operand_indices(op: Op, index: Index) -> list[Index | None]:
    """The index at which each operand of an inline operation is read for its result at ``index``; None is anywhere."""
    if op.name == "tt.split":
        return [None]
    if op.name == "tt.gather":
        return [None, index]
    if op.name == "tt.splat":
        return [()]
    if op.name == "tt.expand_dims":
        axis = op.number("axis")
        return [index[:axis] + index[axis + 1 :]]
    if op.name == "tt.broadcast":
        shape = op.operands[0].shape
        return [tuple("0" if size == 1 else i for i, size in zip(index, shape, strict=True))]
    if op.name == "tt.trans":
        source = ["0"] * len(index)
        for axis, source_axis in enumerate(op.numbers("order")):
            source[source_axis] = index[axis]
        return [tuple(source)]
    return [index if operand.shape else () for operand in op.operands]


@dataclass(eq=False)
class Statement:
    """Something that happens at its own place: kind is the operation's, or "elementwise" for a stored value, or
    "scalar". reads: the stored values and scalars it takes, each with the indices (None: the whole value)."""

    kind: str
    op: Op
    space: tuple[int, ...] | None  # the index space of its loops; None where it has none
    reads: dict[Value, set[Index | None]] = field(default_factory=dict)

    @property
    def is_store(self) -> bool:
        return self.kind == "tt.store"


@dataclass(eq=False)
class Group:
    """Statements that share their loops."""

    space: tuple[int, ...] | None
    statements: list[Statement]

    @property
    def is_loop(self) -> bool:
        return self.space is not None and self.statements[0].kind != "tt.dot"

    def produces(self, value: Value) -> bool:
        return any(value in statement.op.results for statement in self.statements)


class Schedule:
    """The decisions for one function: :attr:`stored` values, :attr:`groups` of each block, and buffers to share.

    elided: stored values whose only readers stand in their own loop, so that no buffer is needed.
    shared: stored value -> the loop-carried value whose buffer it is written to directly.
    """

    def __init__(self, body: Block) -> None:
        self.stored: set[Value] = set()
        self.groups: dict[Block, list[Group]] = {}
        self.elided: set[Value] = set()
        self.shared: dict[Value, Value] = {}
        self._choose_stored(body)
        self._schedule(body)

    # ---- stored or inline

    def is_inline(self, value: Value) -> bool:
        return bool(value.shape) and value.op is not None and value not in self.stored and not is_alias(value)

    def _choose_stored(self, block: Block) -> None:
        for op in block.ops:
            _check_covered(op)
            if op.name in _CONTROL:
                for region in op.regions:
                    self._choose_stored(region)
            if op.name in _SILENT:
                continue
            for value in op.results:
                if value.shape and self._wants_buffer(op, value):
                    self.stored.add(value)

    def _wants_buffer(self, op: Op, value: Value) -> bool:
        if is_alias(value) or is_pointer(value.element):
            return False
        readers = [user for user in value.users if _reads_buffer(user, value)]
        if is_product_transposition(op):  # products read through it
            readers = [user for user in readers if user.name != "tt.dot"]
        if readers:
            return True
        if op.name == "tt.split" or op.name in VIEWS:
            return False
        if op.name not in ELEMENTWISE:
            return True
        if any(user.name in ("scf.yield", "scf.condition") for user in value.users):
            return True
        if not self._is_costly(op):
            return False
        spread = any(user.name in ("tt.expand_dims", "tt.broadcast") for user in value.users)
        return spread or len(set(value.users)) > 1

    def _is_costly(self, op: Op) -> bool:
        """Worth a buffer: an expensive operation, or floats that are computed from more than constants."""
        return op.name in COSTLY or (
            op.result.element in ("f16", "bf16", "f32")
            and any(_is_float(x) and (x.op is None or x.op.name != "arith.constant") for x in op.operands)
        )

    # ---- statements and what they read

    def leaves(self, value: Value, index: Index | None, into: dict[Value, set[Index | None]]) -> None:
        """Adds the stored values and scalars that ``value`` at ``index`` is made of."""
        if self.is_inline(value):
            op = value.op
            assert op is not None
            indices = [None] * len(op.operands) if index is None else operand_indices(op, index)
            for operand, at in zip(op.operands, indices, strict=True):
                self.leaves(operand, at if operand.shape else (), into)
        elif is_alias(value):
            into.setdefault(root(value), set()).add(None)
        else:
            into.setdefault(value, set()).add(index if value.shape else ())

    def _statement(self, op: Op) -> Statement | None:
        if op.name in _SILENT:
            return None
        reads: dict[Value, set[Index | None]] = {}
        if op.name in _CONTROL:
            self._read_all(op, reads)
            return Statement(op.name, op, None, reads)
        if op.name in ("tt.load", "tt.store"):
            space = op.operands[0].shape
            for operand in op.operands:
                self.leaves(operand, loop_index(space) if operand.shape else (), reads)
            return Statement(op.name, op, space or None, reads)
        if op.name in _FOLDS or op.name == "tt.join":
            space = op.operands[0].shape
            for operand in [*op.operands, *captured(op)]:
                self.leaves(operand, loop_index(space) if operand.shape else (), reads)
            return Statement(op.name, op, space, reads)
        if op.name == "tt.dot":
            for operand in op.operands[:2]:
                self.leaves(product_operand(operand)[0], None, reads)
            self.leaves(op.operands[2], loop_index(op.result.shape), reads)
            return Statement(op.name, op, op.result.shape, reads)
        if not op.results:
            raise op.unsupported("an operation without a result")
        value = op.result
        if not value.shape:
            if op.name == "arith.constant":
                return None
            for operand in op.operands:
                self.leaves(operand, None if operand.shape else (), reads)
            return Statement("scalar", op, None, reads)
        if not any(x in self.stored for x in op.results):
            return None
        for operand, at in zip(op.operands, operand_indices(op, loop_index(value.shape)), strict=True):
            self.leaves(operand, at, reads)
        return Statement("elementwise", op, value.shape, reads)

    def _read_all(self, op: Op, reads: dict[Value, set[Index | None]]) -> None:
        for operand in op.operands:
            self.leaves(operand, None, reads)
        for region in op.regions:
            for inner in region.ops:
                self._read_all(inner, reads)

    # ---- fusion

    def _schedule(self, block: Block) -> None:
        groups: list[Group] = []
        for op in block.ops:
            if op.name in _CONTROL:
                for region in op.regions:
                    self._schedule(region)
            statement = self._statement(op)
            if statement is not None:
                target = self._group_to_join(groups, statement)
                if target is None:
                    groups.append(Group(statement.space, [statement]))
                else:
                    target.statements.append(statement)
        self.groups[block] = groups
        self._elide(block, groups)

    def _group_to_join(self, groups: list[Group], statement: Statement) -> Group | None:
        if statement.kind not in ("elementwise", "tt.reduce", "tt.join", "tt.load", "tt.store") or not statement.space:
            return None
        for group in reversed(groups):
            if group.space == statement.space and self._may_join(group, statement):
                return group
            if not self._may_move_before(group, statement):
                return None
        return None

    def _may_join(self, group: Group, statement: Statement) -> bool:
        kinds = [x.kind for x in group.statements]
        if kinds[0] == "tt.dot":
            if statement.kind != "elementwise":
                return False
        elif not group.is_loop or "tt.scan" in kinds:
            return False
        # one loop would interleave a store with other accesses, which may overlap with it
        touches_memory = "tt.store" in kinds or "tt.load" in kinds
        if (statement.is_store and touches_memory) or (statement.kind == "tt.load" and "tt.store" in kinds):
            return False
        here = loop_index(statement.space or ())
        for value, indices in statement.reads.items():
            for member in group.statements:
                if value in member.op.results and (member.kind in ("tt.reduce", "tt.join") or indices != {here}):
                    return False
        return True

    def _may_move_before(self, group: Group, statement: Statement) -> bool:
        if statement.is_store or any(group.produces(value) for value in statement.reads):
            return False
        writes = any(x.is_store or x.kind in _CONTROL for x in group.statements)
        return not (statement.kind == "tt.load" and writes)

    def _elide(self, block: Block, groups: list[Group]) -> None:
        """Drops the buffers of values that only their own loop reads, at the same index."""
        kept: set[Value] = set()
        for operand in block.terminator.operands if block.ops else []:
            leaves: dict[Value, set[Index | None]] = {}
            self.leaves(operand, None, leaves)
            kept |= leaves.keys()
        for group in groups:
            for statement in group.statements:
                for value in statement.reads:
                    if not group.produces(value):
                        kept.add(value)
        for group in groups:
            for statement in group.statements:
                if statement.kind in ("elementwise", "tt.load", "tt.dot") and statement.space is not None:
                    self.elided |= {value for value in statement.op.results if value not in kept}

    # ---- loop-carried values

    def share_buffers(self, op: Op, block: Block) -> None:
        """For an ``scf.for`` of ``block``: lets a yielded value be written straight to the buffer of the carried value
        it replaces, where nothing reads the old one afterwards; and an initial value that only the loop reads, and that
        is made anew whenever the loop is entered, likewise."""
        body = op.regions[0]
        groups = self.groups[body]
        yielded = body.terminator.operands if body.terminator.name == "scf.yield" else []
        for carried, new, initial in zip(body.args[1:], yielded, op.operands[3:], strict=True):
            if not carried.shape:
                continue
            if self._may_overwrite(groups, carried, new, yielded):
                self.shared[new] = carried
            alone = initial.users == [op] and op.operands.count(initial) == 1
            if alone and initial in self.stored and self._is_plain_statement(initial) and initial.op in block.ops:
                self.shared[initial] = carried

    def _is_plain_statement(self, value: Value) -> bool:
        return value.op is not None and value.op.name not in _CONTROL

    def _may_overwrite(self, groups: list[Group], carried: Value, new: Value, yielded: list[Value]) -> bool:
        if new not in self.stored or yielded.count(new) != 1 or not self._is_plain_statement(new):
            return False
        home = next((at for at, group in enumerate(groups) if group.produces(new)), None)
        if home is None:
            return False  # computed outside of the loop
        for other in yielded:
            leaves: dict[Value, set[Index | None]] = {}
            self.leaves(other, None, leaves)
            if carried in leaves:
                return False
        if any(carried in x.reads for group in groups[home + 1 :] for x in group.statements):
            return False
        seen = False
        for statement in groups[home].statements:
            writes = new in statement.op.results
            if carried in statement.reads:
                # at the same index the old element is read before the new one is written
                same = statement.reads[carried] == {loop_index(statement.space or ())}
                if seen or not same or (writes and statement.kind == "tt.reduce"):
                    return False
            seen = seen or writes
        return True


# ---- what an operation takes and gives


def is_alias(value: Value) -> bool:
    """A reshaped value: it has the buffer of what it was made of, which is row-major like all of them."""
    return value.op is not None and value.op.name == "tt.reshape"


def root(value: Value) -> Value:
    """The value whose buffer ``value`` has."""
    while is_alias(value):
        assert value.op is not None
        value = value.op.operands[0]
    return value


def is_product_transposition(op: Op) -> bool:
    """A transposition of the last two dimensions: products read such operands as they are."""
    if op.name != "tt.trans":
        return False
    order = op.numbers("order")
    return order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def product_operand(value: Value) -> tuple[Value, bool]:
    """What a product reads for its operand, and whether transposed."""
    if value.op is not None and is_product_transposition(value.op):
        return value.op.operands[0], True
    return value, False


def captured(op: Op) -> list[Value]:
    """What the combining region of a reduction or scan takes from outside."""
    inner = [] if not op.regions else op.regions[0].ops
    inside = {id(value) for region in op.regions for value in region.args} | {id(x) for y in inner for x in y.results}
    return [x for y in inner for x in y.operands if id(x) not in inside]


def _is_float(value: Value) -> bool:
    return value.element in ("f16", "bf16", "f32")


def _reads_buffer(user: Op, value: Value) -> bool:
    """Whether ``user`` reads ``value`` from memory, in an order of its own."""
    if user.name == "tt.dot":
        return value in user.operands[:2]
    if user.name == "tt.gather":
        return value is user.operands[0]
    if is_product_transposition(user):
        return any(_reads_buffer(other, user.result) for other in user.result.users)
    return user.name in ("tt.reshape", "tt.split", "tt.unsplat")


def _check_covered(op: Op) -> None:
    if op.name not in COVERED:
        raise op.unsupported("no lowering")
    if op.name not in _TAKES_POINTERS and any(x.shape and is_pointer(x.element) for x in [*op.operands, *op.results]):
        raise op.unsupported("a tile of pointers that is not a base plus offsets at its loads and stores")
