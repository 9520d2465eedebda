"""centroid_attention, kernel and definition alike, against the definition in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.centroid_attention import centroid_attention, topk_keys
from fastattn.reference import centroid_attention as reference
from tests.accuracy import assert_as_accurate
from tests.ops.cases import IMPLS, Three, each, leaves, needs_compiler

NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(batch: int, heads: int, kv_heads: int, n: int, s: int, dim: int, value_dim: int) -> Three:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(batch, heads, n, dim, generator=g), torch.randn(batch, kv_heads, s, dim, generator=g)
    return q, k, torch.randn(batch, kv_heads, s, value_dim, generator=g)


def mask(batch: int, s: int) -> Tensor:
    keep = torch.rand(batch, s, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[-1, 3:] = False
    keep[-1, :3] = True
    return keep


def solve(attention: Any, x: Three, **options: Any) -> tuple[Tensor, ...]:
    x = leaves(*x)
    out, lse = attention(*x, **options)[:2]
    g = torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(y.shape, generator=g).to(y.dtype) for y in (out, lse))
    loss = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, x)


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "N7-S60": ((1, 2, 2, 7, 60, 16, 16), {}),
    "N150-S5000 several parts": ((1, 1, 1, 150, 5000, 16, 16), {}),
    "B2-H4-Hkv2-N37-S90-D40-Dv24 masked, dropout": (
        (2, 4, 2, 37, 90, 40, 24), {"key_mask": mask(2, 90), "dropout_p": 0.3, "scale": 0.5}
    ),
    "N1-S1-D1-Dv3": ((1, 1, 1, 1, 1, 1, 3), {}),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES.keys())
def test_is_as_accurate_as_plain_pytorch(shape: tuple[Any, ...], options: dict[str, Any], impl: str) -> None:
    x = inputs(*shape)
    actual = solve(centroid_attention, x, **options, impl=impl)
    plain = solve(reference.centroid_attention, x, **options)
    exact = solve(reference.centroid_attention, each(Tensor.double, x), **options)
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        assert_as_accurate(a, p, e, name)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype) -> None:
    shape, options = CASES["B2-H4-Hkv2-N37-S90-D40-Dv24 masked, dropout"]
    x = each(lambda y: y.to(dtype), inputs(*shape))  # type: ignore[call-arg]
    actual = solve(centroid_attention, x, **options, impl="triton")
    exact = solve(reference.centroid_attention, each(Tensor.double, x), **options)
    for name, a, e in zip(NAMES, actual, exact, strict=True):
        largest = max(1.0, float(e.abs().max()))
        assert float((a.double() - e).abs().max()) <= 4 * torch.finfo(dtype).eps * largest, name


def test_the_backward_written_out_is_the_gradient_of_the_definition() -> None:
    shape, options = CASES["B2-H4-Hkv2-N37-S90-D40-Dv24 masked, dropout"]
    x = each(Tensor.double, inputs(*shape))  # type: ignore[call-arg]
    out, lse, *wanted = solve(reference.centroid_attention, x, **options)
    g = torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(y.shape, generator=g).double() for y in (out, lse))
    actual = reference.centroid_attention_backward(dout, dlse, *x, out, lse, **options)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("top_k", [1, 5, 32, 200])
@pytest.mark.parametrize("s", [60, 5000])
def test_the_keys_of_the_largest_logits_are_found(s: int, top_k: int, impl: str) -> None:
    q, k, v = inputs(1, 2, 1, 7, s, 16, 16)
    index = centroid_attention(q, k, v, top_k=top_k, impl=impl)[2]
    alone = topk_keys(q, k, top_k, impl=impl)
    wanted = (q @ k.mT).topk(min(top_k, s)).indices.sort(-1).values.int()
    assert torch.equal(index.sort(-1).values, wanted) and torch.equal(alone.sort(-1).values, wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_keys_are_in_no_list_and_have_no_effect(impl: str) -> None:
    q, k, v = inputs(2, 2, 2, 7, 60, 16, 16)
    keep = mask(2, 60)
    results = []
    for filler in (0.0, 1e9, math.nan):
        filled = (torch.where(keep[:, None, :, None], x, filler) for x in (k, v))
        x = leaves(q, *filled)
        out, lse, index = centroid_attention(*x, key_mask=keep, top_k=8, impl=impl)
        results.append((out, lse, index, *torch.autograd.grad((out.sum(-1) + lse).sum(), x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    index = results[0][2]
    assert torch.equal((index[1] >= 0).sum(-1), torch.full((2, 7), 3)) and index[1].max() < 3
    assert keep[0][index[0].long()].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_keys_all_is_zero(impl: str) -> None:
    x = leaves(*inputs(1, 2, 2, 7, 60, 16, 16))
    out, lse, index = centroid_attention(*x, key_mask=torch.zeros(1, 60, dtype=torch.bool), top_k=8, impl=impl)
    assert not out.any() and (lse == -math.inf).all() and (index == -1).all()
    assert not any(y.any() for y in torch.autograd.grad(out.sum(), x))
