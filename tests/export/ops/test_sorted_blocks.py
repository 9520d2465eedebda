"""Sorting and cutting in ONNX Runtime, against plain Python: equal hashes keep their order."""

from __future__ import annotations

import pytest
import torch


def blocks_by_hand(hashes, mask, n_blocks, size, packed):
    """One row of hashes, in plain Python; sorted() is stable."""
    rows = sorted((i for i in range(len(hashes)) if mask[i]), key=lambda i: hashes[i])
    blocks = []
    for c in range(n_blocks):
        first, last = (
            (c * size, (c + 1) * size) if packed else (c * len(rows) // n_blocks, (c + 1) * len(rows) // n_blocks)
        )
        block = rows[first:last]
        blocks.append(block + [-1] * (size - len(block)))
    return blocks


@pytest.mark.parametrize("packed", [1, 0])
@pytest.mark.parametrize(("n", "n_blocks", "size"), [(40, 5, 8), (37, 5, 8), (3, 3, 1), (5, 1, 64), (1, 1, 1)])
def test_rows_are_cut_into_blocks_by_a_stable_sort(run_node, n, n_blocks, size, packed):
    # few different hashes: nearly everything is a tie, zeros of both signs among them
    hashes = torch.randint(-2, 3, (2, 3, 2, n), generator=torch.Generator().manual_seed(n)) * 0.7
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n + 1)) > 0.3
    mask[1] = True
    inputs = {"hashes": hashes, "mask": mask, "n_blocks": torch.tensor([n_blocks]), "block_size": torch.tensor([size])}
    (blocks,) = run_node("SortedBlocks", inputs, {"blocks": (torch.int32, 5)}, packed=packed)
    for b in range(2):
        for h in range(3):
            for r in range(2):
                wanted = blocks_by_hand(hashes[b, h, r].tolist(), mask[b].tolist(), n_blocks, size, packed)
                assert blocks[b, h, r].tolist() == wanted
