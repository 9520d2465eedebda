"""Linear attention's definition against the formula with all weights written out, in fp64; and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.linear_attention import linear_attention, linear_attention_backward, phi, slope
from fastattn.reference.linear_attention_step import linear_attention_step

F, DV = 3, 2
MAPS = ["elu", "relu", "relu2", "identity"]


def inputs(n: int = 9, s: int = 9) -> list[Tensor]:
    """q, k, v and a state; 2 examples, 4 query heads, 2 key heads."""
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n, F), (2, 2, s, F), (2, 2, s, DV)]
    draws = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    state = torch.rand(2, 4, F * (DV + 1), generator=g, dtype=torch.float64) + 1
    return [x.requires_grad_() for x in (*draws, state)]


def written_out(q: Tensor, k: Tensor, v: Tensor, state: Tensor, feature_map: str, is_causal: bool, mask: Any) -> Tensor:
    plain = {
        "elu": lambda x: torch.nn.functional.elu(x) + 1,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x) ** 2,
        "identity": lambda x: x,
    }[feature_map]
    x, y = plain(q), plain(k).repeat_interleave(2, 1)
    weights = torch.einsum("bhnf,bhsf->bhns", x, y)
    if is_causal:
        weights = weights.tril()
    if mask is not None:
        weights = weights * mask[:, None, None]
    s, z = state[..., : F * DV].unflatten(-1, (F, DV)), state[..., F * DV :]
    sums = weights @ v.repeat_interleave(2, 1) + x @ s
    return sums / (weights.sum(-1) + torch.einsum("bhnf,bhf->bhn", x, z) + 1e-3).unsqueeze(-1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_formula(feature_map: str, is_causal: bool, masked: bool) -> None:
    q, k, v, state = inputs(s=9 if is_causal else 14)
    mask = torch.arange(k.shape[2]).expand(2, -1) % 3 != 1 if masked else None
    knobs: dict[str, Any] = {"feature_map": feature_map, "is_causal": is_causal, "key_mask": mask, "eps": 1e-3}
    expected = written_out(q, k, v, state, feature_map, is_causal, mask)
    for chunk in (1, 4, 64):
        out, den, last = linear_attention(q, k, v, initial=state, chunk=chunk, **knobs)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weights = (torch.randn_like(out), torch.randn_like(last))
    exact = torch.autograd.grad([out, last], (q, k, v, state), weights)
    knobs.pop("eps")
    for chunk in (1, 4, 64):
        given = linear_attention_backward(
            weights[0], weights[1], q, k, v, out, den, initial=state, chunk=chunk, **knobs
        )  # fmt: skip
        for a, b in zip(given, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_right_twice(is_causal: bool) -> None:
    x = inputs(n=4, s=4)

    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, _, state = linear_attention(*x[:3], initial=x[3], is_causal=is_causal, chunk=3)
        return out, state

    assert torch.autograd.gradcheck(attend, x)
    assert torch.autograd.gradgradcheck(attend, [y[:1] for y in x])


@pytest.mark.parametrize("feature_map", MAPS)
def test_slopes_are_the_derivatives_of_the_maps(feature_map: str) -> None:
    x = torch.tensor([-3.0, -0.5, 0.0, 0.5, 200.0, -2000.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(phi(x, feature_map).sum(), x)
    torch.testing.assert_close(slope(x, feature_map), expected)


def test_steps_are_the_causal_form() -> None:
    q, k, v, state = inputs()
    out, _, last = linear_attention(q, k, v, initial=state, is_causal=True)
    s, z = state[..., : F * DV].unflatten(-1, (F, DV)), state[..., F * DV :]
    outs = []
    for at in range(q.shape[2]):
        step, s, z = linear_attention_step(*(x[:, :, at : at + 1] for x in (q, k, v)), s, z)
        outs.append(step)
    torch.testing.assert_close(torch.cat(outs, 2), out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([s.flatten(2), z], -1), last, rtol=1e-9, atol=1e-9)
