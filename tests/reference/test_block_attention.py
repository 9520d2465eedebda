"""The definition of block attention, against loops over rows, and its gradient, against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.block_attention import block_attention, block_attention_backward
from tests.ops.cases import Case, Three, leaves

SMALL: dict[str, Any] = {
    "heads": 2,
    "kv_heads": 1,
    "n_queries": 9,
    "n_keys": 11,
    "head_dim": 3,
    "value_dim": 2,
    "c_q": 3,
    "c_k": 4,
}
OPTIONS = [
    pytest.param({}, id="own block"),
    pytest.param({"look_back": 1}, id="look back"),
    pytest.param({"look_back": 2, "look_ahead": 1, "wrap": False}, id="no wrap"),
    pytest.param({"look_back": 4, "look_ahead": 3}, id="round the end, some blocks twice"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"self_mode": "exclude", "look_ahead": 1}, id="exclude self"),
    pytest.param({"is_causal": True, "self_mode": "exclude", "scale": 0.7}, id="causal, exclude self, own scale"),
]


def small() -> tuple[Three, tuple[Tensor, Tensor]]:
    case = Case(**SMALL)
    return leaves(*case.inputs(torch.float64)), case.indices()


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, look_back: int = 0, look_ahead: int = 0,
    wrap: bool = True, is_causal: bool = False, self_mode: str = "attend", scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists the keys that each row meets, one by one, and takes one softmax over the list."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    batch, heads, n_rounds, n_blocks, _ = q_index.shape
    for b in range(batch):
        for h in range(heads):
            met: dict[int, list[int]] = {}
            for r in range(n_rounds):
                for c in range(n_blocks):
                    keys = []
                    for other in range(c - look_back, c + look_ahead + 1):
                        if wrap:
                            number = (r * n_blocks + other) % (n_rounds * n_blocks)
                            keys += k_index[b, h].flatten(0, 1)[number].tolist()
                        elif 0 <= other < n_blocks:
                            keys += k_index[b, h, r, other].tolist()
                    for i in q_index[b, h, r, c].tolist():
                        if i >= 0:
                            met.setdefault(i, []).extend(j for j in keys if j >= 0)
            kv = h // (heads // k.shape[1])
            for i, js in met.items():
                js = [j for j in js if (j <= i or not is_causal) and (j != i or self_mode == "attend")]
                if js:
                    s = k[b, kv, js] @ q[b, h, i] * factor
                    out[b, h, i] = torch.softmax(s, 0) @ v[b, kv, js]
                    lse[b, h, i] = torch.logsumexp(s, 0)
    return out, lse


@pytest.mark.parametrize("options", OPTIONS)
def test_is_one_softmax_over_all_keys_met(options: dict[str, Any]) -> None:
    (q, k, v), (q_index, k_index) = small()
    out, lse = block_attention(q, k, v, q_index, k_index, **options)
    expected, expected_lse = by_loops(q, k, v, q_index, k_index, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_from_out_and_lse_is_that_of_autograd(options: dict[str, Any]) -> None:
    (q, k, v), (q_index, k_index) = small()
    out, lse = block_attention(q, k, v, q_index, k_index, **options)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        actual = block_attention_backward(dout, q, k, v, q_index, k_index, out, lse, **options)
    for gradient, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-13)


def test_first_and_second_derivatives_agree_with_finite_differences() -> None:
    (q, k, v), (q_index, k_index) = small()

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_attention(q, k, v, q_index, k_index, look_back=1)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: both(*x)[0].sum((1, 2)), (q, k, v))


@pytest.mark.parametrize("shift", [-4000.0, 4000.0])
def test_scores_of_any_size_neither_vanish_nor_overflow(shift: float) -> None:
    (q, k, v), (q_index, k_index) = small()
    q_index[:, :, 1, 0] = -1  # rows that are in the first round alone
    with torch.no_grad():  # another column adds the same to every score
        q, k = (torch.cat([x, torch.full_like(x[..., :1], c)], -1) for x, c in ((q, 1.0), (k, shift)))
    out, lse = block_attention(q, k, v, q_index, k_index, scale=0.5)
    expected, expected_lse = by_loops(q, k, v, q_index, k_index, scale=0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)


def test_a_key_mask_is_as_if_the_key_were_in_no_block() -> None:
    (q, k, v), (q_index, k_index) = small()
    key_mask = torch.arange(11).unsqueeze(0) % 3 != 1
    out, lse = block_attention(q, k, v, q_index, k_index, key_mask=key_mask)
    without = torch.where(torch.isin(k_index, torch.tensor([1, 4, 7, 10])), -1, k_index)
    expected, expected_lse = by_loops(q, k, v, q_index, without)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


def test_rows_that_meet_no_key_are_zero_with_zero_gradients() -> None:
    (q, k, v), (q_index, k_index) = small()
    k_index[:, :, :, 0] = -1  # the first block's queries meet nobody, unless in another round
    q_index[:, :, 1] = q_index[:, :, 0]
    alone = q_index[:, :, 0, 0].long()
    alone = torch.zeros(1, 2, 9).scatter(2, alone.clamp_min(0), (alone >= 0).float()).bool()
    out, lse = block_attention(q, k, v, q_index, k_index)
    dq, dk, dv = torch.autograd.grad(out.square().sum() + lse[~alone].sum(), (q, k, v))
    assert alone.any()
    assert torch.equal(lse == -math.inf, alone)
    assert not out[alone].any() and not dq[alone].any()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


def test_rows_in_no_block_may_hold_nan() -> None:
    (q, k, v), (q_index, k_index) = small()
    q_index, k_index = (torch.where(index == 0, -1, index) for index in (q_index, k_index))
    with torch.no_grad():
        clean, clean_lse = block_attention(q, k, v, q_index, k_index, look_back=1)
        for tensor in (q, k, v):
            tensor[:, :, 0] = math.nan
    out, lse = block_attention(q, k, v, q_index, k_index, look_back=1)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert all(torch.isfinite(gradient).all() for gradient in (dq, dk, dv))
    with torch.no_grad():
        written = block_attention_backward(torch.ones_like(out), q, k, v, q_index, k_index, out, lse, look_back=1)
    assert all(torch.isfinite(gradient).all() for gradient in written)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    case = Case()
    q, k, v = case.inputs(dtype)
    out, lse = block_attention(q, k, v, *case.indices())
    expected, expected_lse = block_attention(q.float(), k.float(), v.float(), *case.indices())
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)
    gradients = block_attention_backward(torch.ones_like(out), q, k, v, *case.indices(), out, lse)
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3
