"""Buckets of Reformer's hash in ONNX Runtime, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.reference.hash_argmax import hash_argmax

RunNode = Callable[..., list[Tensor]]


def run(run_node: RunNode, x: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    return run_node(
        "HashArgmax", {"x": x, "rotations": rotations}, {"buckets": (torch.int32, 4)}, factors=list(factors)
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("factors", [(2,), (10,), (4, 6), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "for-each-head"])
def test_is_its_definition(run_node: RunNode, factors: tuple[int, ...], own: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 77, 20, generator=g).to(dtype)
    rotations = torch.randn(3 if own else 1, 20, 4, sum(factors) // 2, generator=g)
    # the largest two are nowhere so near that rounding decides, with this seed
    assert torch.equal(run(run_node, x, rotations, factors), hash_argmax(x, rotations, factors))


def test_of_equal_entries_the_first_counts(run_node: RunNode) -> None:
    """Whole numbers, so that sums are exact: ties of columns, of a column and an opposite, and of all of them."""
    x = torch.tensor([[0, 0], [1, 1], [1, -1], [-1, -1], [-1, 1], [2, 1]], dtype=torch.float32)[None, None]
    rotations = torch.tensor([[1, 0, 1, -1], [0, 1, 0, 0]], dtype=torch.float32)[None, :, None]  # x0, x1, x0, -x0
    wanted = [0, 0, 0, 3, 1, 0]
    assert run(run_node, x, rotations, (8,)).flatten().tolist() == wanted
    # as two digits, of [x0, x1, -x0, -x1] and [x0, -x0, -x0, x0]
    first, second = [0, 0, 0, 2, 1, 0], [0, 0, 0, 1, 1, 0]
    assert run(run_node, x, rotations, (4, 4)).flatten().tolist() == [
        a + 4 * b for a, b in zip(first, second, strict=True)
    ]
