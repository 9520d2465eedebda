"""The bodies of CentroidAttention and TopkKeys in ONNX Runtime, against the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.centroid_attention import centroid_attention, topk_keys
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
OUTPUTS = {"out": (torch.float32, 4), "lse": (torch.float32, 3), "topk_index": (torch.int32, 4)}
ALL = torch.ones(1, 1, dtype=torch.bool)


def inputs(dtype: Any = torch.float32, heads: int = 4, kv_heads: int = 2, s: int = 41) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 7, 8), (2, kv_heads, s, 8), (2, kv_heads, s, 5))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def attend(run_node: RunNode, q: Tensor, k: Tensor, v: Tensor, mask: Tensor = ALL, top_k: int = 3) -> list[Tensor]:
    tensors = {"q": q, "k": k, "v": v, "key_mask": mask}
    results = run_node("CentroidAttention", tensors, OUTPUTS, top_k=top_k, scale=0.3)
    if top_k:
        del tensors["v"]
        (alone,) = run_node("TopkKeys", tensors, {"topk_index": OUTPUTS["topk_index"]}, top_k=top_k, scale=0.3)
        assert torch.equal(alone, results[2])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
def test_is_its_definition(run_node: RunNode, heads: int, kv_heads: int, masked: bool, dtype: Any) -> None:
    q, k, v = inputs(dtype, heads, kv_heads)
    mask = None
    if masked:
        mask = torch.arange(41).expand(2, -1) % 3 != 0
        k, v = (x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (k, v))
    out, lse, index = attend(run_node, q, k, v, ALL if mask is None else mask, top_k=9)
    plain, exact = (
        centroid_attention(*(x.to(wide) for x in (q, k, v)), key_mask=mask, scale=0.3)
        for wide in (torch.float32, torch.float64)
    )
    for name, each in (("out", 0), ("lse", 1)):
        assert_as_accurate((out, lse)[each], plain[each], exact[each], name)
    expected = topk_keys(q, k, 9, key_mask=mask, scale=0.3)
    assert torch.equal(index.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("top_k", [0, 1, 41, 42, 100])
def test_lists_are_as_long_as_there_are_keys(run_node: RunNode, top_k: int) -> None:
    *_, index = attend(run_node, *inputs(), top_k=top_k)
    assert index.shape == (2, 4, 7, min(top_k, 41))
    if top_k >= 41:
        assert torch.equal(index.sort(-1).values, torch.arange(41, dtype=torch.int32).expand_as(index))


def test_of_equal_logits_the_first_key_is_taken(run_node: RunNode) -> None:
    q, k, v = inputs()
    k[:, :, 5:] = k[:, :, 4:5]  # all but the first four are one key
    k[:, :, :4] = 0.0
    mask = torch.arange(41).expand(2, -1) != 6
    *_, index = attend(run_node, q, k, v, mask, top_k=5)
    above = (q @ k[:, :, 4].repeat_interleave(2, 1).unsqueeze(-1)).squeeze(-1) > 0
    assert above.any() and not above.all()
    assert torch.equal(index[above], torch.tensor([4, 5, 7, 8, 9], dtype=torch.int32).expand_as(index[above]))
    assert torch.equal(index[~above], torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32).expand_as(index[~above]))


def test_an_example_with_fewer_keys_than_the_list_has_none_in_the_rest(run_node: RunNode) -> None:
    q, k, v = inputs()
    mask = torch.zeros(2, 41, dtype=torch.bool)
    mask[0, [3, 30]] = True  # the other example has no key at all
    out, lse, index = attend(run_node, q, k, v, mask, top_k=4)
    assert torch.equal(index[0, :, :, :2].sort(-1).values, torch.tensor([3, 30], dtype=torch.int32).expand(4, 7, 2))
    assert (index[0, :, :, 2:] == -1).all() and (index[1] == -1).all()
    assert not out[1].any() and (lse[1] == -torch.inf).all()
