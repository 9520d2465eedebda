"""What "as accurate as plain PyTorch" means in these tests, and the fixtures made by the original implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FIXTURES = Path(__file__).parent / "fixtures"


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """``actual`` is at most twice as far from ``exact`` (fp64) as ``plain`` is, give or take a few roundings."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype, (what, actual.shape, actual.dtype)
    actual, plain = actual.detach(), plain.detach()
    band = 8 * torch.finfo(actual.dtype).eps * max(1.0, float(exact.abs().max()))  # inputs are of order 1
    error = float((actual.double() - exact).abs().max())
    allowed = 2 * float((plain.double() - exact).abs().max()) + band
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def original(name: str) -> dict[str, Tensor]:
    """The arrays of a fixture; scalars as 0-dimensional tensors."""
    with np.load(_FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.as_tensor(arrays[key]) for key in arrays}
