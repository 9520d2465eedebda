"""Each op of the library gives what torch's op gives: it runs the same kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn.export.ort import needs
from fastattn.kernels.cpu.build import find_compiler
from fastattn.methods.smyrf_routing import plan, route
from fastattn.ops.argsort import stable_argsort
from tests.export.ort.nodes import DIM, Node, library, nodes

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
NODES = list(nodes())


def name_of(node: Node) -> str:
    dtype = "fp16" if torch.float16 in node.outputs.values() else "fp32"
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
    assert {node.op for node in NODES} | {"SmyrfHash", "SortedBlocks"} == needs.OPS


def smyrf_hash(dtype: torch.dtype, n: int, s: int, dim: int = DIM) -> Node:
    g = torch.Generator().manual_seed(n)
    given = {
        "q": torch.randn(2, 4, n, dim, generator=g).to(dtype),
        "k": torch.randn(2, 2, s, dim, generator=g).to(dtype),
    }
    given["projections"] = torch.randn(dim + 2, 5, generator=g)
    given |= {"query_mask": torch.rand(2, n, generator=g) > 0.2, "key_mask": torch.rand(2, s, generator=g) > 0.2}
    return Node("SmyrfHash", given, {"q_hash": torch.float32, "k_hash": torch.float32}, {})


def sorted_blocks(hashes: Tensor, mask: Tensor, n_blocks: int, size: int, packed: int) -> Node:
    given = {"hashes": hashes, "mask": mask, "n_blocks": torch.tensor([n_blocks]), "block_size": torch.tensor([size])}
    return Node("SortedBlocks", given, {"blocks": torch.int32}, {"packed": packed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, s, dim", [(300, 300, 20), (1, 1, 20), (77, 130, 16), (259, 5, 83)])
def test_hashes_and_blocks_route_as_torch_does(dtype: torch.dtype, n: int, s: int, dim: int) -> None:
    node = smyrf_hash(dtype, n, s, dim)
    q, k, projections, query_mask, key_mask = node.inputs.values()
    clusters = plan(n, s, 16, None, is_self_like=False)
    wanted = route(q, k, projections, 5, key_mask, query_mask, clusters)
    hashes = node.run(library())
    sizes = (clusters.q_size, clusters.k_size)
    for hashed, mask, size, index in zip(hashes, (query_mask, key_mask), sizes, wanted, strict=True):
        (blocks,) = sorted_blocks(hashed, mask, clusters.n_blocks, size, 0).run(library())
        # sums run in another order, so now and then two rows with nearly equal hashes change places
        assert (blocks != index).float().mean() < 0.02


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
