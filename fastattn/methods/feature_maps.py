"""Random features: maps phi whose inner products approach a kernel of queries and keys, for linear attention.

Each takes x (..., D) and directions omega (D, m), fp16 and bf16 in fp32, and keeps gradients to both. ``exp`` of fp16
features would underflow, so features stay fp32 and linear attention takes them beside fp16 or bf16 values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.ops import checks


def random_directions(
    head_dim: int,
    n_directions: int,
    *,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """omega (head_dim, n_directions): columns from the standard normal distribution, in fp32.

    orthogonal: the columns of each block of ``head_dim`` are orthogonal to one another, with the lengths that
    independent ones would have, so that each alone is still standard normal; estimates then vary less (Choromanski et
    al. 2021, "Rethinking Attention with Performers", section 3).
    """
    checks.check_int("head_dim", head_dim, 1)
    checks.check_int("n_directions", n_directions, 1)
    checks.check_bool("orthogonal", orthogonal)
    place = torch.device("cpu" if device is None else device)
    if not orthogonal:
        return common.draw_normal((head_dim, n_directions), generator, place)
    blocks = -(-n_directions // head_dim)
    with common.drawn_now():
        draws = common.draw_normal((blocks, head_dim, head_dim), generator, place)
        # of a Gaussian matrix Q is uniform among orthogonal ones, once the signs that QR leaves open are fixed
        basis, upper = torch.linalg.qr(draws)
        basis = basis * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        omega = basis * torch.linalg.vector_norm(draws, dim=-1).unsqueeze(-2)  # Q is independent of the rows' lengths
        return omega.transpose(0, 1).flatten(1)[:, :n_directions].contiguous()


def favor_features(x: Tensor, omega: Tensor, *, stabilize: bool = False) -> Tensor:
    """Positive features (..., 2 m) of the softmax kernel: in the mean, phi(q) . phi(k) = exp(q . k / sqrt(D)).

    With u = omega^T x / D^(1/4): exp(+u - |x|^2 / (2 sqrt(D))) and exp(-u - ...), divided by sqrt(2 m) (Choromanski et
    al. 2021, section 2.3, "hyperbolic" variant). With more features the mean over the draws is met more closely.

    stabilize: subtracts the largest such |x|^2 of the sequence (dimension -2) in the exponent as well, as
    pytorch-fast-transformers does. That factor cancels between numerator and denominator, but for eps. It looks at all
    of the sequence, later tokens too, and one token at a time each gets another factor, which does not cancel: so this
    is not for causal attention or for steps.
    """
    x, omega = _wide(x, omega)
    x = x * x.shape[-1] ** -0.25
    square = x.square().sum(-1, keepdim=True)
    offset = square / 2 + 0.5 * math.log(2 * omega.shape[-1])
    if stabilize:
        offset = offset + square.amax(-2, keepdim=True)
    u = x @ omega
    return torch.cat([torch.exp(u - offset), torch.exp(-u - offset)], -1)


def rff_features(x: Tensor, omega: Tensor) -> Tensor:
    """Random Fourier features (..., 2 m): in the mean, phi(q) . phi(k) = exp(-|q - k|^2 / (2 sqrt(D))).

    [cos, sin] of omega^T x / D^(1/4), divided by sqrt(m) (Rahimi and Recht 2007). They have both signs: with few of
    them, or far apart queries and keys, a denominator may come close to 0, and that row is then off by any amount.
    """
    x, omega = _wide(x, omega)
    u = (x * x.shape[-1] ** -0.25) @ omega
    return torch.cat([u.cos(), u.sin()], -1) * omega.shape[-1] ** -0.5


def grf_features(x: Tensor, omega: Tensor) -> Tensor:
    """Generalised random features (..., m): relu(omega^T x) (Choromanski et al. 2021, section 4, Performer-ReLU)."""
    x, omega = _wide(x, omega)
    return (x @ omega).relu()


RANDOM_FEATURES: dict[str, Any] = {"favor": favor_features, "rff": rff_features, "grf": grf_features}


def _wide(x: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), omega.to(dtype)
