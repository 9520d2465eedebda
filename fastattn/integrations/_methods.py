"""The methods that a model can be patched with: which knobs they take, what they draw, how they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.methods.smyrf import smyrf_attention

IMPLEMENTATIONS = ("triton", "reference")


@dataclass(frozen=True)
class Method:
    """name: as users write it. knobs: every knob with its default. draw: (head_dim, knobs, CPU generator) -> the random
    tensor that one layer keeps. attend: (q, k, v, key_mask, scale, draws, knobs) -> out, as the method's own function.
    """

    name: str
    knobs: dict[str, Any]
    draw: Callable[[int, dict[str, Any], torch.Generator], Tensor]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, float, Tensor, dict[str, Any]], Tensor]

    def with_knobs(self, given: dict[str, Any]) -> dict[str, Any]:
        """``given`` checked and completed with the defaults."""
        unknown = sorted(set(given) - set(self.knobs))
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"unknown knob {names} for method {self.name!r}; allowed: {', '.join(self.knobs)}")
        for name, value in given.items():
            _check_knob(name, value)
        return {**self.knobs, **given}


def _check_knob(name: str, value: Any) -> None:
    if name == "impl":
        if value is not None and value not in IMPLEMENTATIONS:
            raise ValueError(f"impl is {value!r}; allowed: None, {', '.join(map(repr, IMPLEMENTATIONS))}")
        return
    if name == "k_cluster_size" and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r} ({type(value).__name__})")
    if value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {value}")


def _draw_smyrf(head_dim: int, knobs: dict[str, Any], generator: torch.Generator) -> Tensor:
    # two rows more than the head has: the two coordinates that the asymmetric transform appends
    return torch.randn(head_dim + 2, knobs["n_hashes"], generator=generator, dtype=torch.float32)


def _attend_smyrf(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draws: Tensor, knobs: dict[str, Any]
) -> Tensor:
    if torch.compiler.is_exporting():  # impl says how torch computes, which is nothing to a graph
        knobs = {**knobs, "impl": None}
    out = smyrf_attention(q, k, v, key_mask=key_mask, scale=scale, projections=draws, **knobs)
    assert isinstance(out, Tensor)
    return out


METHODS = {
    "smyrf": Method(
        name="smyrf",
        knobs={"n_hashes": 4, "q_cluster_size": 64, "k_cluster_size": None, "impl": None},
        draw=_draw_smyrf,
        attend=_attend_smyrf,
    ),
}


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(map(repr, METHODS))}")
    return METHODS[name]
