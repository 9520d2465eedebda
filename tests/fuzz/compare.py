"""Compares what ran with what must come out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .program import FLOATS, Program, walk
from .values import Value

# What Triton's interpreter computes in another way than Triton's compiled kernels; the evaluation is the judge there.
EXEMPTIONS = {
    "bf16": "keeps bf16 as uint16 and computes with these integers, and its conversions to bf16 don't round",
    "scalar mask": "keeps a comparison in the type that was compared, and so splats of one are no masks",
    "special": "reduces by nanmax and nanargmax, which raise where a row has only NaN",
}


@dataclass
class Difference:
    """The first element that is wrong, and how many are."""

    buffer: str
    at: int
    got: object
    expected: object
    error: float
    count: int

    def __str__(self) -> str:
        return (
            f"{self.buffer}[{self.at}] is {self.got!r}, expected {self.expected!r} within {self.error:.3g}"
            f" ({self.count} elements differ)"
        )


def difference(got: dict[str, np.ndarray], expected: dict[str, Value]) -> Difference | None:
    """The first difference beyond the bounds. Inputs are compared too: nothing may write to them."""
    for name, value in expected.items():
        x, want = got[name], value.data
        if value.kind in FLOATS:
            with np.errstate(invalid="ignore"):
                right = (x == want) | (np.isnan(x) & np.isnan(want)) | (np.abs(x - want) <= value.error)
        else:
            right = x == want
        right |= np.isinf(value.error)
        if not right.all():
            at = int(np.argmin(right))
            return Difference(name, at, x[at].item(), want[at].item(), float(value.error[at]), int((~right).sum()))
    return None


def exemption(program: Program, kinds: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """The row of :data:`EXEMPTIONS` for which the interpreter isn't asked, or ""."""
    moves = {
        "load",
        "store",
        "yield",
        "copy",
        "reshape",
        "permute",
        "trans",
        "broadcast",
        "expand_dims",
        "join",
        "split",
    }
    for node in walk(program.body):
        named = {kinds[name][0] for name in (*node.args, *node.outs) if name in kinds}
        if node.op == "broadcast" and kinds.get(node.args[0]) == ("int1", ()):
            return "scalar mask"
        if "bf16" in named and node.op not in moves and not (node.op == "cast" and node.attrs["kind"] == "fp32"):
            return "bf16"
    folds = any(node.op in ("max", "min", "argmax", "argmin") for node in walk(program.body))
    return "special" if folds and any("special" in str(p.fill) for p in program.params) else ""
