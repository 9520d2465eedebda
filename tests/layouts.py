"""Views of a (B, H, N, D) tensor that are not contiguous, or whose elements share memory."""

from __future__ import annotations

import pytest
import torch

LAYOUTS = [
    pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads inside"),
    pytest.param(lambda x: torch.stack([x, x + 1], 3)[:, :, :, 0], id="every other row"),
    pytest.param(lambda x: torch.stack([x, x + 1], -1)[..., 0], id="every other column"),
    pytest.param(lambda x: x.mT.contiguous().mT, id="columns first"),
    pytest.param(lambda x: x[:1].expand_as(x), id="one example for all"),
    pytest.param(lambda x: x[:, :1].expand_as(x), id="one head for all"),
    pytest.param(lambda x: x[:, :, :1].expand_as(x), id="one row for all"),
    pytest.param(lambda x: x[..., :1].expand_as(x), id="one column for all"),
]
