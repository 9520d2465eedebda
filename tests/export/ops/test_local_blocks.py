"""The local round's blocks in ONNX Runtime, against those of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.methods.local import local_blocks

INT = (torch.int32, 5)


@pytest.mark.parametrize("window", [1, 7, 37, 64])
def test_are_those_of_torch(run_node: Callable[..., list[Tensor]], window: int) -> None:
    masks = torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(window)) < 0.6
    masks[0, 2], masks[1, 2] = True, False
    for query_mask, key_mask in (masks, (masks[0], masks[0])):
        inputs = {"heads": torch.tensor([2]), "query_mask": query_mask, "key_mask": key_mask}
        actual = run_node("LocalBlocks", inputs, {"q_index": INT, "k_index": INT}, window=window)
        wanted = local_blocks(window, torch.zeros(3, 2, 37, 1), query_mask, key_mask)
        assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


def test_no_window_is_one_place_of_nobody(run_node: Callable[..., list[Tensor]]) -> None:
    mask = torch.ones(3, 37, dtype=torch.bool)
    inputs = {"heads": torch.tensor([2]), "query_mask": mask, "key_mask": mask}
    for index in run_node("LocalBlocks", inputs, {"q_index": INT, "k_index": INT}, window=0):
        assert torch.equal(index, torch.full((3, 2, 1, 1, 1), -1, dtype=torch.int32))
