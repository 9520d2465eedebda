"""Inputs of linear attention for tests of its op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.reference import linear_attention as reference


@dataclass(frozen=True)
class LinearCase:
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    n_queries: int = 150
    n_keys: int = 150
    features: int = 16
    value_dim: int = 16
    feature_map: str = "elu"
    is_causal: bool = False
    has_mask: bool = False
    has_state: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """q, k, v, and the initial state if there is one, that ask for gradients."""
        g = torch.Generator().manual_seed(0)
        shapes = [
            (self.batch, self.heads, self.n_queries, self.features),
            (self.batch, self.kv_heads, self.n_keys, self.features),
            (self.batch, self.kv_heads, self.n_keys, self.value_dim),
        ]
        draws = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
        if self.feature_map == "identity":  # features are positive, but for those of random Fourier
            draws[:2] = [x.abs() for x in draws[:2]]
        result = [x.to(dtype) for x in draws]
        if self.has_state:
            shape = (self.batch, self.heads, self.features * (self.value_dim + 1))
            result.append(torch.rand(shape, generator=g).to(torch.promote_types(dtype, torch.float32)) * 5)
        return [x.requires_grad_() for x in result]

    def mask(self) -> Tensor | None:
        if not self.has_mask:
            return None
        keep = torch.rand(self.batch, self.n_keys, generator=torch.Generator().manual_seed(1)) < 0.7
        keep[:, 0] = False  # causal: a row without keys
        return keep

    def options(self) -> dict[str, Any]:
        return {"feature_map": self.feature_map, "is_causal": self.is_causal, "key_mask": self.mask()}

    def weights(self, *like: Tensor) -> list[Tensor]:
        """What the gradients of out and of the state are taken of."""
        g = torch.Generator().manual_seed(2)
        scales = (1.0, 0.01)  # a state is a sum over all keys
        return [torch.randn(x.shape, generator=g).to(x.dtype) * scale for x, scale in zip(like, scales, strict=True)]

    def defined(self, dtype: torch.dtype, inputs: list[Tensor]) -> dict[str, Tensor]:
        """out, state and gradients by the definition in ``dtype``, of the values that ``inputs`` hold."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = [dtype] * 3 + [wide] * (len(inputs) - 3)
        leaves = [x.detach().to(to).requires_grad_() for x, to in zip(inputs, dtypes, strict=True)]
        initial = leaves[3] if self.has_state else None
        out, _, state = reference.linear_attention(*leaves[:3], initial=initial, **self.options())
        return results(self, out, state, leaves)


def results(case: LinearCase, out: Tensor, state: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad([out, state], inputs, case.weights(out, state))
    names = ("dq", "dk", "dv", "dinitial")
    return {"out": out.detach(), "state": state.detach(), **dict(zip(names, gradients, strict=False))}
