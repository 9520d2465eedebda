"""The definition of SMYRF against the original implementation's results, and its transforms against their theory."""

from __future__ import annotations

import pytest
import torch

from fastattn.reference.smyrf import hashes, meeting_counts, smyrf_attention
from tests.accuracy import original


@pytest.mark.parametrize("name", ["smyrf_self", "smyrf_onecluster"])
def test_equals_the_original(name: str) -> None:
    f = original(name)
    q, k, v = (f[x].unsqueeze(0).requires_grad_() for x in "qkv")  # the original's rows as heads
    size, scale = int(f["q_cluster"]), 1 / float(f["norm_factor"])
    out, _ = smyrf_attention(q, k, v, f["alpha"], q_cluster_size=size, scale=scale)
    torch.testing.assert_close(out[0], f["out"], rtol=0, atol=2e-6)
    for gradient, x in zip(torch.autograd.grad((out[0] * f["w"]).sum(), (q, k, v)), "qkv", strict=True):
        torch.testing.assert_close(gradient[0], f["d" + x], rtol=0, atol=5e-6)


def test_transforms_put_all_on_one_sphere_and_keep_inner_products() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (7, 9))
    f, h = hashes(q, k, torch.eye(7))  # projected on the axes: the transforms themselves
    torch.testing.assert_close(f @ h.T, q @ k.T)
    radius = q.norm(dim=1).amax() ** 2 + k.norm(dim=1).amax() ** 2
    torch.testing.assert_close(f.square().sum(1), radius.expand(7))
    torch.testing.assert_close(h.square().sum(1), radius.expand(9))


@pytest.mark.parametrize(("n", "s", "size"), [(32, 32, 8), (30, 30, 8), (30, 17, 8), (5, 40, 2), (40, 3, 4)])
def test_each_round_puts_each_query_with_one_balanced_cluster_of_keys(n: int, s: int, size: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, n, 6, generator=g), torch.randn(1, 2, s, 6, generator=g)
    count = meeting_counts(q, k, torch.randn(8, 3, generator=g), q_cluster_size=size)
    n_blocks = min(-(-n // size), s)
    per_query = count.sum(-1)
    assert per_query.min() >= 3  # a key in each round at the least
    assert per_query.max() <= 3 * (size if n == s else -(-s // n_blocks))
    assert count.sum(-2).min() >= 3
