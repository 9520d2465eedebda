"""The body of HashBits in ONNX Runtime, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.hash_bits import hash_bits

RunNode = Callable[..., list[Tensor]]


def codes(run_node: RunNode, x: Tensor, planes: Tensor) -> Tensor:
    (found,) = run_node("HashBits", {"x": x, "planes": planes}, {"codes": (torch.int64, 3)})
    return found


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """Their sums are exact in any order, and often stand on a threshold."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("n_bits", [1, 31, 32, 33, 53, 54, 63])
def test_codes_are_bit_for_bit_those_of_the_definition(run_node: RunNode, n_bits: int, dtype: Any) -> None:
    x, planes = whole_numbers(2, 3, 37, 5).to(dtype), whole_numbers(n_bits, 6, seed=1)
    assert (x.float() @ planes[:, :-1].mT == planes[:, -1]).any(), "a threshold itself is not above it"
    assert torch.equal(codes(run_node, x, planes), hash_bits(x, planes))


def test_sums_of_fp16_rows_are_in_fp32(run_node: RunNode) -> None:
    x, planes = torch.full((1, 1, 1, 64), 60000.0, dtype=torch.float16), torch.full((1, 65), 1.0)
    planes[0, -1] = 64 * 60000.0 - 32768  # far above what fp16 holds
    assert codes(run_node, x, planes).item() == hash_bits(x, planes).item() == 1


def test_nan_lies_above_no_threshold_and_all_bits_fit(run_node: RunNode) -> None:
    x = torch.tensor([float("nan"), 1.0]).view(1, 1, 2, 1)
    planes = torch.tensor([[1.0, 0.0]]).expand(63, 2)
    assert codes(run_node, x, planes).flatten().tolist() == [0, 2**63 - 1]
