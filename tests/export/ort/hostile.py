"""Nodes as a corrupted or hostile model has them: wrong ranks and sizes, rows out of range, wild attributes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tests.export.ort.nodes import Node

_WILD = (-1, -(2**63), 2**31, 2**62)
_ROWS = (-2, -(2**31), 2**31 - 1)


def changed(node: Node) -> Iterator[tuple[str, Node]]:
    """(in words, node): each with one thing wrong. Some of these are right after all, and then they run."""
    for name, x in node.inputs.items():
        for what, other in _others(x):
            yield f"{name} {what}", replace(node, inputs={**node.inputs, name: other})
    for name, value in node.attributes.items():
        for wild in _WILD:
            if isinstance(value, float):
                other: object = float("inf") if wild > 0 else float("nan")
            else:
                other = [wild, 2] if isinstance(value, tuple) else wild
            yield f"{name}={other}", replace(node, attributes={**node.attributes, name: other})
        yield f"without {name}", replace(node, attributes={n: v for n, v in node.attributes.items() if n != name})
    # all of one kind of size at once, which fits together again
    for axis in range(1, 5):
        inputs = {name: x.narrow(axis, 0, 0) if x.ndim > axis else x for name, x in node.inputs.items()}
        yield f"nothing along axis {axis}", replace(node, inputs=inputs)
    yield "an empty batch", replace(node, inputs={n: x[:0] if x.ndim > 1 else x for n, x in node.inputs.items()})


def _others(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "with a dimension more", x.unsqueeze(0)
    if x.ndim:
        yield "with a dimension less", x[0] if len(x) else x.flatten()
    for axis in range(x.ndim):
        yield f"longer along axis {axis}", torch.cat([x, x.narrow(axis, 0, 1)], axis)
        yield f"shorter along axis {axis}", x.narrow(axis, 0, x.shape[axis] - 1)
        yield f"empty along axis {axis}", x.narrow(axis, 0, 0)
    if x.dtype in (torch.int32, torch.int64):
        for row in _ROWS:
            other = x.clone()
            other.view(-1)[-1] = row
            yield f"with {row}", other
    if x.is_floating_point():
        yield "of NaN", torch.full_like(x, float("nan"))
        yield "of infinities", torch.full_like(x, float("inf"))
