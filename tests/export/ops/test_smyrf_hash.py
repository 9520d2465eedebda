"""SMYRF's hash in ONNX Runtime, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fastattn.export import check, to_onnx
from fastattn.ops.smyrf_hash import smyrf_hash
from fastattn.reference import smyrf as definition

FLOAT = torch.float32
RunNode = Callable[..., list[Tensor]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_hashes_are_those_of_the_rows_that_take_part(run_node: RunNode, heads: int, kv_heads: int) -> None:
    q, k, projections = randn(2, heads, 31, 8), randn(2, kv_heads, 23, 8, seed=1), randn(10, 3, seed=2)
    query_mask, key_mask = torch.rand(2, 31) > 0.3, torch.rand(2, 23) > 0.3
    q.masked_fill_(~query_mask[:, None, :, None], 1e3)  # large rows that take no part must not set the radius
    k.masked_fill_(~key_mask[:, None, :, None], float("nan"))
    inputs = {"q": q, "k": k, "projections": projections, "query_mask": query_mask, "key_mask": key_mask}
    q_hash, k_hash = run_node("SmyrfHash", inputs, {"q_hash": (FLOAT, 4), "k_hash": (FLOAT, 4)})
    for b in range(2):
        for h in range(heads):
            real_q, real_k = q[b, h, query_mask[b]], k[b, h * kv_heads // heads, key_mask[b]]
            wanted_q, wanted_k = definition.hashes(real_q.double(), real_k.double(), projections.double())
            assert_close(q_hash[b, h][:, query_mask[b]].mT.double(), wanted_q, atol=1e-5, rtol=1e-5)
            assert_close(k_hash[b, h][:, key_mask[b]].mT.double(), wanted_k, atol=1e-5, rtol=1e-5)


class Hash(torch.nn.Module):
    def __init__(self, projections: Tensor) -> None:
        super().__init__()
        self.projections = torch.nn.Buffer(projections)

    def forward(self, q: Tensor, k: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        return smyrf_hash(q, k, self.projections, key_mask=key_mask)


def test_the_op_becomes_the_node(tmp_path: Path) -> None:
    """Of every mask that is not given, too."""
    inputs = {"q": randn(2, 4, 31, 8), "k": randn(2, 2, 23, 8, seed=1), "key_mask": randn(2, 23, seed=3) > 0}
    module = Hash(randn(10, 3, seed=2)).eval()
    path = to_onnx(module, inputs, tmp_path / "model.onnx", dynamic_shapes={}, portable=False)
    assert check(module, path, inputs, tolerance=1e-5).ok


def test_projections_for_each_head_are_refused_by_name(tmp_path: Path) -> None:
    inputs = {"q": randn(2, 4, 31, 8), "k": randn(2, 2, 23, 8, seed=1), "key_mask": randn(2, 23, seed=3) > 0}
    with pytest.raises(ValueError, match="can't be exported to ONNX with projections for each head"):
        to_onnx(Hash(randn(2, 4, 10, 3)).eval(), inputs, tmp_path / "model.onnx", dynamic_shapes={})
