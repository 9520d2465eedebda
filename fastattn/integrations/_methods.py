"""The methods that a model can be patched with: which knobs they take, what they draw, how they are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.methods import clustered, improved_clustered
from fastattn.methods.clustered import Clustering, clustered_attention
from fastattn.methods.improved_clustered import improved_clustered_attention
from fastattn.methods.smyrf import DIRECTIONS, smyrf_attention
from fastattn.ops.hamming_kmeans import cluster_codes
from fastattn.ops.hash_bits import MOST_BITS, encode

_CHOICES = {"impl": (None, "triton", "reference"), "directions": DIRECTIONS}
_FLAGS = ("correct_duplicates",)
_LEAST = {"local_window": 0}  # of whole numbers, where it is not 1
_MOST = {"n_bits": MOST_BITS}


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
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, _CHOICES[name]))}")
        return
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {value!r} ({type(value).__name__})")
        return
    if name == "k_cluster_size" and value is None:
        return
    least = _LEAST.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least {least}, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value}")
    if value > _MOST.get(name, value):
        raise ValueError(f"{name} must be an int of at most {_MOST[name]}, got {value}")


def _draw_smyrf(head_dim: int, knobs: dict[str, Any], generator: torch.Generator) -> Tensor:
    if knobs["directions"] == "principal":
        if knobs["n_hashes"] > head_dim + 1:
            raise ValueError(
                f"n_hashes must be at most head_dim + 1 = {head_dim + 1} with directions='principal', "
                f"got {knobs['n_hashes']}"
            )
        return torch.empty(0)  # they are no draw
    # two rows more than the head has: the two coordinates that the asymmetric transform appends
    return torch.randn(head_dim + 2, knobs["n_hashes"], generator=generator, dtype=torch.float32)


def _attend_smyrf(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draws: Tensor, knobs: dict[str, Any]
) -> Tensor:
    if torch.compiler.is_exporting():  # impl says how torch computes, which is nothing to a graph
        knobs = {**knobs, "impl": None}
    projections = draws if knobs["directions"] == "random" else None
    out = smyrf_attention(q, k, v, key_mask=key_mask, scale=scale, projections=projections, **knobs)
    assert isinstance(out, Tensor)
    return out


def _draw_clustered(head_dim: int, knobs: dict[str, Any], generator: torch.Generator) -> Tensor:
    # the planes, and a last row whose signs are the seed of the clustering: they outlive a cast to any dtype
    return torch.randn(knobs["n_bits"] + 1, head_dim + 1, generator=generator, dtype=torch.float32)


def _attend_clustered(function: Callable[..., Tensor], as_node: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, draws: Tensor, knobs: dict[str, Any]
    ) -> Tensor:
        seed = _seed_of(draws[-1, :MOST_BITS])
        if torch.compiler.is_exporting():
            return as_node(q, k, v, Clustering(draws[:-1], None, seed, None), key_mask, scale, **knobs)
        clustering = {name: knobs[name] for name in ("n_bits", "n_iterations")}
        rest = {name: value for name, value in knobs.items() if name not in clustering}
        codes = encode(q, draws[:-1], knobs["impl"])
        clusters = cluster_codes(
            codes, knobs["n_clusters"], mask=key_mask, initial=None, seed=seed, impl=knobs["impl"], **clustering
        )
        return function(q, k, v, key_mask=key_mask, scale=scale, clusters=clusters, **rest)

    return attend


def _seed_of(draw: Tensor) -> Tensor:
    """The signs of ``draw`` as the bits of an int64. By halves, because ONNX Runtime's sums of int64 keep 53 bits."""
    seed = draw.new_zeros((), dtype=torch.int64)
    for start in range(0, len(draw), 32):
        half = draw[start : start + 32] > 0
        seed = seed + (half.long() * 2 ** torch.arange(len(half), device=draw.device)).sum() * 2**start
    return seed


_CLUSTERED = {"n_clusters": 100, "n_bits": 63, "n_iterations": 10, "impl": None}
METHODS = {
    "smyrf": Method(
        name="smyrf",
        knobs={
            "n_hashes": 4,
            "q_cluster_size": 64,
            "k_cluster_size": None,
            "correct_duplicates": False,
            "local_window": 0,
            "directions": "random",
            "impl": None,
        },
        draw=_draw_smyrf,
        attend=_attend_smyrf,
    ),
    "clustered": Method(
        name="clustered",
        knobs=_CLUSTERED,
        draw=_draw_clustered,
        attend=_attend_clustered(clustered_attention, clustered.as_node),
    ),
    "improved_clustered": Method(
        name="improved_clustered",
        knobs={"topk": 32, **_CLUSTERED},
        draw=_draw_clustered,
        attend=_attend_clustered(improved_clustered_attention, improved_clustered.as_node),
    ),
}


def method_named(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; allowed: {', '.join(map(repr, METHODS))}")
    return METHODS[name]
