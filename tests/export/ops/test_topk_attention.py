"""The body of TopkAttention in ONNX Runtime, against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.topk_attention import topk_attention
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def arguments(
    n: int = 50, s: int = 41, heads: int = 4, kv_heads: int = 2, c: int = 7, top_k: int = 9, dtype: Any = torch.float32
) -> list[Tensor]:
    """q, k, v, clusters, topk_index, mass and rest. Queries of no cluster hold NaN, one list has no key, one has one; a
    key stands in many lists."""
    g = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(shape, generator=g).to(dtype)
        for shape in ((2, heads, n, 8), (2, kv_heads, s, 8), (2, kv_heads, s, 5))
    )
    clusters = torch.randint(-1, c, (2, heads, n), generator=g, dtype=torch.int32)
    clusters[0, 0] = c // 2  # all queries of a head in one cluster
    q = q.masked_fill(clusters.unsqueeze(-1) < 0, float("nan"))
    index = torch.rand(2, heads, c, s, generator=g).argsort(-1)[..., :top_k].int()
    index[:, :, -1] = -1
    index[:, :, 0, 1:] = -1
    return [q, k, v, clusters, index, torch.rand(2, heads, c, generator=g), torch.randn(2, heads, c, 5, generator=g)]


def attend(run_node: RunNode, tensors: list[Tensor], is_causal: bool = False) -> list[Tensor]:
    names = ("q", "k", "v", "clusters", "topk_index", "mass", "rest")
    outputs = {"out": (tensors[0].dtype, 4), "lse": (torch.float32, 3)}
    named = dict(zip(names, tensors, strict=True))
    return run_node("TopkAttention", named, outputs, is_causal=int(is_causal), scale=0.3)


SHAPES = {
    "odd": {},
    "one query": {"n": 1},
    "one key, one cluster": {"s": 1, "c": 1, "top_k": 1},
    "equal heads": {"heads": 3, "kv_heads": 3},
    "one key head": {"kv_heads": 1},
    "full tiles": {"n": 128},
    "more clusters than queries": {"n": 20, "c": 60},
    "long lists": {"n": 300, "s": 100, "top_k": 100},
}


@DTYPES
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_its_definition(run_node: RunNode, name: str, is_causal: bool, dtype: Any) -> None:
    tensors = arguments(**SHAPES[name], dtype=dtype)
    out, lse = attend(run_node, tensors, is_causal)
    plain, exact = (
        topk_attention(*(x.to(t) for x in tensors[:3]), *tensors[3:], is_causal=is_causal, scale=0.3)
        for t in (dtype, torch.float64)
    )
    assert_as_accurate(out, plain[0], exact[0], "out")
    empty = exact[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert_as_accurate(*(x.masked_fill(empty, 0.0) for x in (lse, plain[1], exact[1])), "lse")
    assert not out[tensors[3] < 0].any(), "queries of no cluster are 0"


def test_a_query_that_meets_no_key_has_what_its_cluster_adds(run_node: RunNode) -> None:
    tensors = arguments()
    out, lse = attend(run_node, tensors)
    clusters, rest = tensors[3], tensors[6]
    alone = clusters == 6
    assert alone.any() and (lse[alone] == -torch.inf).all()
    assert torch.equal(out[alone], rest[:, :, 6:].expand(-1, -1, clusters.shape[2], -1)[alone])


def test_a_key_that_stands_twice_in_a_list_counts_twice(run_node: RunNode) -> None:
    tensors = arguments(top_k=2)
    tensors[4][:, :, 1] = 7
    twice = attend(run_node, tensors)[1]
    tensors[4][:, :, 1, 1] = -1
    once = attend(run_node, tensors)[1]
    changed = tensors[3] == 1
    torch.testing.assert_close(twice[changed], once[changed] + torch.tensor(2.0).log())
