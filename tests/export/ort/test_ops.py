"""Each op of the library gives what torch's op gives: it runs the same kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastattn.export.ort import needs
from fastattn.kernels.cpu.build import find_compiler
from fastattn.methods.smyrf_routing import plan, route
from fastattn.ops.argsort import stable_argsort
from tests.export.ort.nodes import Node, library, nodes, smyrf_hash_node

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
NODES = list(nodes())


def name_of(node: Node) -> str:
    dtype = "fp16" if torch.float16 in {x.dtype for x in node.inputs.values()} else "fp32"
    options = [name for name, value in node.attributes.items() if value == 1]
    return "-".join([node.op, dtype, *options])


def assert_same(got: list[Tensor], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("node", NODES, ids=name_of)
def test_an_op_gives_what_torchs_op_gives(node: Node) -> None:
    got, wanted = node.run(library()), list(node.expected)
    if "topk_index" in node.outputs:  # keys of a list are in no order
        got[-1], wanted[-1] = (x.sort(-1).values for x in (got[-1], wanted[-1]))
    # parts of keys are folded by another exponential, and steps' tiles are others
    assert_same(got, tuple(wanted), 0.0 if node.op in ("BlockAttention", "LinearAttention", "HashArgmax") else 1e-5)


def test_every_op_with_kernels_is_among_them() -> None:
    assert {node.op for node in NODES} == needs.GPU_OPS


def sorted_blocks(hashes: Tensor, mask: Tensor, n_blocks: int, size: int, packed: int) -> Node:
    given = {"hashes": hashes, "mask": mask, "n_blocks": torch.tensor([n_blocks]), "block_size": torch.tensor([size])}
    return Node("SortedBlocks", given, {"blocks": torch.int32}, {"packed": packed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, s, dim", [(300, 300, 20), (1, 1, 20), (77, 130, 16), (259, 5, 83)])
def test_hashes_and_blocks_route_as_torch_does(dtype: torch.dtype, n: int, s: int, dim: int) -> None:
    node = smyrf_hash_node(dtype, n, s, dim)
    q, k, projections, query_mask, key_mask = node.inputs.values()
    clusters = plan(n, s, 16, None, is_self_like=False)
    wanted = route(q, k, projections, 5, key_mask, query_mask, clusters)
    hashes = node.run(library())
    sizes = (clusters.q_size, clusters.k_size)
    for hashed, mask, size, index in zip(hashes, (query_mask, key_mask), sizes, wanted, strict=True):
        (blocks,) = sorted_blocks(hashed, mask, clusters.n_blocks, size, 0).run(library())
        # sums run in another order, so now and then two rows with nearly equal hashes change places
        assert (blocks != index).float().mean() < 0.02


@pytest.mark.parametrize("at, x, mask", [(0, "k", "key_mask"), (1, "q", "query_mask")])
def test_hashes_beside_no_rows_are_those_beside_rows_that_take_no_part(at: int, x: str, mask: str) -> None:
    node = smyrf_hash_node(torch.float32, 133, 77)
    given = node.inputs[x], node.inputs[mask]
    of_none, of_no_rows = (
        replace(node, inputs={**node.inputs, x: rows, mask: takes_part}).run(library())
        for rows, takes_part in ((given[0], torch.zeros_like(given[1])), (given[0][:, :, :0], given[1][:, :0]))
    )
    assert torch.equal(of_none[at], of_no_rows[at]) and of_no_rows[1 - at].shape == (2, 4, 5, 0)
    assert not torch.equal(of_none[at], node.expected[at])


@pytest.mark.parametrize("packed", [0, 1])
def test_blocks_hold_the_rows_that_take_part_in_the_order_of_their_hashes(packed: int) -> None:
    g = torch.Generator().manual_seed(0)
    hashes = torch.randint(-9, 9, (2, 3, 4, 100), generator=g).float()  # with many equal ones
    hashes[..., 7], hashes[..., 8] = -0.0, 0.0
    mask = torch.rand(2, 100, generator=g) > 0.3
    (blocks,) = sorted_blocks(hashes, mask, 9, 16, packed).run(library())
    for at, rows in enumerate(blocks.view(2, -1, 9 * 16)):
        order = stable_argsort(hashes.view(2, -1, 100)[at].masked_fill(~mask[at], 99.0))
        for row, wanted in zip(rows, order, strict=True):
            assert torch.equal(row[row >= 0], wanted[: mask[at].sum()])
    assert torch.equal((blocks >= 0).sum((3, 4)), mask.sum(1).view(2, 1, 1).expand(2, 3, 4))
