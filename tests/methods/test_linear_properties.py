"""What linear attention promises: limits, masks, causality, independence. Statistical claims are seeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import linear_attention
from fastattn.methods.feature_maps import favor_features, random_directions, rff_features
from tests.ops.cases import gradients, leaves

D, DV = 8, 6
QUICK = settings(max_examples=10, deadline=None)
MAPS = st.sampled_from(["elu", "relu", "relu2"])
SEEDS = st.integers(0, 2**31 - 1)


def draw(seed: int, n: int, s: int | None = None, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, heads, rows, D, generator=g) for rows in (n, s or n))
    return q, k, torch.randn(2, heads, s or n, DV, generator=g)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 140), cut=st.integers(0, 139), feature_map=MAPS)
def test_no_value_and_no_gradient_of_a_later_position_enters(seed: int, n: int, cut: int, feature_map: str) -> None:
    cut = min(cut, n - 1)
    x = leaves(*draw(seed, n))
    out = linear_attention(*x, feature_map=feature_map, is_causal=True)
    dout = torch.zeros_like(out)
    dout[:, :, : cut + 1] = 1.0
    for gradient in gradients(out, x, dout):
        assert not gradient[:, :, cut + 1 :].any()
    alone = linear_attention(*(y[:, :, : cut + 1] for y in x), feature_map=feature_map, is_causal=True)
    torch.testing.assert_close(out[:, :, : cut + 1], alone, rtol=0, atol=0)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 90), s=st.integers(1, 600), feature_map=MAPS)
def test_the_order_of_keys_does_not_matter(seed: int, n: int, s: int, feature_map: str) -> None:
    q, k, v = draw(seed, n, s)
    order = torch.randperm(s, generator=torch.Generator().manual_seed(seed))
    out = linear_attention(q, k, v, feature_map=feature_map)
    shuffled = linear_attention(q, k[:, :, order], v[:, :, order], feature_map=feature_map)
    torch.testing.assert_close(shuffled, out, rtol=1e-4, atol=1e-4)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 90), padding=st.integers(1, 90), is_causal=st.booleans())
def test_padding_is_ignored_exactly(seed: int, n: int, padding: int, is_causal: bool) -> None:
    q, k, v = draw(seed, n + padding)
    mask = (torch.arange(n + padding) < n).expand(2, -1)
    out = linear_attention(q, k, v, key_mask=mask, is_causal=is_causal)[:, :, :n]
    alone = linear_attention(
        q[:, :, :n], k[:, :, :n], v[:, :, :n], key_mask=mask[:, :n], is_causal=is_causal
    )  # fmt: skip
    assert torch.equal(out, alone)


@QUICK
@given(seed=SEEDS, n=st.integers(1, 90), is_causal=st.booleans())
def test_examples_and_heads_are_independent(seed: int, n: int, is_causal: bool) -> None:
    x = draw(seed, n, heads=3)
    out = linear_attention(*x, is_causal=is_causal)
    alone = linear_attention(*(y[1:, 2:] for y in x), is_causal=is_causal)
    assert torch.equal(out[1:, 2:], alone)


@QUICK
@given(seed=SEEDS, n=st.integers(2, 90), is_causal=st.booleans())
def test_outputs_are_means_of_values(seed: int, n: int, is_causal: bool) -> None:
    q, k, v = draw(seed, n)
    out = linear_attention(q, k, v, is_causal=is_causal)
    low, high = v.amin(2, keepdim=True), v.amax(2, keepdim=True)
    assert ((out >= low - 1e-4) & (out <= high + 1e-4)).all()


def errors(feature_map: str, wanted: Tensor, x: Any, directions: tuple[int, ...], is_causal: bool) -> list[float]:
    """Root mean square error of out over 8 draws, by number of directions."""
    result = []
    for m in directions:
        squares = []
        for seed in range(8):
            omega = random_directions(D, m, generator=torch.Generator().manual_seed(seed))
            out = linear_attention(*x, feature_map=feature_map, omega=omega, is_causal=is_causal, impl="reference")
            squares.append((out - wanted).square().mean())
        result.append(float(torch.stack(squares).mean().sqrt()))
    return result


@pytest.mark.parametrize("is_causal", [False, True])
def test_favor_approaches_softmax_attention(is_causal: bool) -> None:
    q, k, v = draw(0, 32)
    x = 0.6 * q, 0.6 * k, v  # the features' variance grows with exp(|q + k|^2)
    wanted = torch.nn.functional.scaled_dot_product_attention(*x, is_causal=is_causal)
    few, more, most = errors("favor", wanted, x, (8, 128, 2048), is_causal)
    assert most < more / 2 < few / 3 and most < 0.06  # a quarter is expected of 16 times as many


def test_rff_approaches_attention_by_the_gaussian_kernel() -> None:
    q, k, v = draw(0, 32)
    q, k = 0.5 * q, 0.5 * k
    weights = torch.exp(-torch.cdist(q, k).square() / (2 * D**0.5))
    wanted = weights @ v / weights.sum(-1, keepdim=True)
    few, more, most = errors("rff", wanted, (q, k, v), (32, 256, 2048), False)
    assert most < more / 1.5 < few / 2.25 and most < 0.02


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "Gaussian"])
def test_features_have_the_kernel_as_their_mean(kernel: str, orthogonal: bool) -> None:
    g = torch.Generator().manual_seed(5)
    q, k = (0.7 * torch.randn(4, D, generator=g, dtype=torch.float64) for _ in "qk")
    features = favor_features if kernel == "softmax" else rff_features
    estimates = []
    for _ in range(400):
        omega = random_directions(D, D, orthogonal=orthogonal, generator=g)
        estimates.append(features(q, omega) @ features(k, omega).mT)
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 20
    scale = D**-0.5
    wanted = torch.exp(q @ k.mT * scale) if kernel == "softmax" else torch.exp(-(torch.cdist(q, k) ** 2) * scale / 2)
    assert ((mean - wanted).abs() < 4.5 * error).all()


def test_orthogonal_directions_are_so_and_vary_less() -> None:
    g = torch.Generator().manual_seed(1)
    omega = random_directions(D, 20, generator=g).double()
    assert omega.shape == (D, 20)
    for block in (omega[:, :8], omega[:, 8:16], omega[:, 16:]):
        gram = block.mT @ block
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-5)
    x = torch.randn(16, D, generator=g, dtype=torch.float64)
    spread = []
    for orthogonal in (True, False):
        draws = (random_directions(D, D, orthogonal=orthogonal, generator=g) for _ in range(200))
        spread.append(torch.stack([rff_features(x, o) @ rff_features(x, o).mT for o in draws]).var(0).mean())
    assert spread[0] < 0.9 * spread[1]


def test_a_stabilised_map_cancels_but_for_eps() -> None:
    x = draw(3, 40)
    omega = random_directions(D, D, generator=torch.Generator().manual_seed(0))
    out = linear_attention(*x, feature_map=lambda y: favor_features(y, omega, stabilize=True), eps=0.0)
    torch.testing.assert_close(out, linear_attention(*x, feature_map="favor", omega=omega, eps=0.0), rtol=0, atol=1e-5)
