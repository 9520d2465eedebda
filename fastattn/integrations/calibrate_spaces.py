"""What calibration knows of each method: which knobs to try, how to call it, and how much work a setting is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations._methods import METHODS, Method
from fastattn.methods.feature_maps import random_directions
from fastattn.methods.linear import linear_attention
from fastattn.methods.reformer import default_factors, lsh_attention
from fastattn.ops import checks

Knobs = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Inputs of one attention call: q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv); key_mask (B, N) or None.

    Rows that the mask leaves out take no part as queries either. ``scale`` is the factor of q . k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    is_causal: bool = False

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def resized(self, length: int) -> Sample:
        """The rows repeated, or cut off, to ``length``, all taking part: for times, which hardly ask for more."""
        rows = torch.arange(length, device=self.q.device) % self.length
        q, k, v = (x.index_select(2, rows) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, key_mask=None)


@dataclass(frozen=True)
class Space:
    """name: of the method. defaults: the knobs that may be tried, with what they are where nobody says otherwise.
    candidates: (length, is_causal) -> settings of such knobs. check: raises for a knob's value that is not allowed.
    draw: (sample, knobs, CPU generator) -> what is drawn once. attend: (sample, draws, knobs) -> out.
    share: (knobs, length) -> products of rows with rows, as a share of dense attention's.
    is_shared: keys are the queries, so that the truth is shared-QK attention. causal: whether there is a causal form.
    """

    name: str
    defaults: Knobs
    candidates: Callable[[int, bool], Iterator[Knobs]]
    check: Callable[[Knobs], Knobs]
    draw: Callable[[Sample, Knobs, torch.Generator], Tensor]
    attend: Callable[[Sample, Tensor, Knobs], Tensor]
    share: Callable[[Knobs, int], float]
    is_shared: bool = False
    causal: bool = True

    def settings(self, length: int, is_causal: bool, grid: Mapping[str, Sequence[Any]] | None) -> list[Knobs]:
        """What to try on inputs of ``length``: the method's own choice, or all combinations of ``grid``."""
        if grid is None:
            return list(self.candidates(length, is_causal))
        for name, values in grid.items():
            if name not in self.defaults:
                raise ValueError(
                    f"unknown knob {name!r} in grid for method {self.name!r}; allowed: {', '.join(self.defaults)}"
                )
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise TypeError(f"grid[{name!r}] must be a sequence of values, got {values!r}")
        found = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        for knobs in found:
            self.check(knobs)
        return found


def space_named(method: str) -> Space:
    if method not in SPACES:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(map(repr, SPACES))}")
    return SPACES[method]


def _of_patch(method: Method, candidates: Any, share: Any, **rest: Any) -> Space:
    """The space of a method that models are patched with: drawn and called in the same way."""
    return Space(
        name=method.name,
        defaults=method.knobs,
        candidates=candidates,
        check=method.with_knobs,
        draw=lambda sample, knobs, generator: method.draw(sample.q.shape[-1], method.with_knobs(knobs), generator),
        attend=lambda sample, draws, knobs: method.attend(
            sample.q, sample.k, sample.v, sample.key_mask, sample.scale, draws,
            {**method.with_knobs(knobs), **({"is_causal": True} if sample.is_causal else {})},
        ),
        share=share,
        **rest,
    )  # fmt: skip


def _rounds(size_name: str, sizes: Sequence[int], blocks: int, length: int, **fixed: Any) -> Iterator[Knobs]:
    """Rounds x sizes up to dense attention's work, as published, and with what makes rounds go further."""
    for extras, n_hashes, size in product((False, True), (1, 2, 4, 8), sizes):
        if n_hashes * size * blocks + size * extras > length:
            continue
        knobs = {"n_hashes": n_hashes, size_name: size, **fixed}
        yield {**knobs, "correct_duplicates": True, "local_window": size} if extras else knobs


def _smyrf(length: int, is_causal: bool) -> Iterator[Knobs]:
    return _rounds("q_cluster_size", (32, 64, 128, 256), 1, length)


def _smyrf_share(knobs: Knobs, length: int) -> float:
    knobs = {**METHODS["smyrf"].knobs, **knobs}
    return (knobs["n_hashes"] * knobs["q_cluster_size"] + knobs["local_window"]) / length


def _lsh(length: int, is_causal: bool) -> Iterator[Knobs]:
    # a block looks back in the paper's causal form, and both ways otherwise
    return _rounds("bucket_size", (32, 64, 128), 2 if is_causal else 3, length, look_ahead=0 if is_causal else 1)


def _lsh_share(knobs: Knobs, length: int) -> float:
    knobs = {**_LSH, **knobs}
    keys = knobs["n_hashes"] * knobs["bucket_size"] * (1 + knobs["look_back"] + knobs["look_ahead"])
    return (keys + knobs["local_window"]) / length


def _rotations(sample: Sample, knobs: Knobs, generator: torch.Generator) -> Tensor:
    knobs = {**_LSH, **knobs}
    columns = sum(default_factors(sample.length, knobs["bucket_size"])) // 2
    shape = (sample.q.shape[1], sample.q.shape[-1], knobs["n_hashes"], columns)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _attend_lsh(sample: Sample, rotations: Tensor, knobs: Knobs) -> Tensor:
    knobs = {**_LSH, **knobs}
    factors = default_factors(sample.length, knobs["bucket_size"])
    return lsh_attention(
        sample.q, sample.v, key_mask=sample.key_mask, scale=sample.scale, is_causal=sample.is_causal,
        n_buckets=factors, rotations=rotations, **knobs,
    )  # fmt: skip


def _clustered(length: int, is_causal: bool) -> Iterator[Knobs]:
    for n_clusters in _up_to(length // 2, (16, 32, 64, 128, 256, 512)):
        for n_bits, n_iterations in ((63, 10), (63, 4), (32, 10)):
            yield {"n_clusters": n_clusters, "n_bits": n_bits, "n_iterations": n_iterations}


def _improved(length: int, is_causal: bool) -> Iterator[Knobs]:
    for n_clusters, topk in product(
        _up_to(length // 2, (16, 32, 64, 128, 256)), _up_to(length // 2, (16, 32, 64, 128))
    ):
        yield {"n_clusters": n_clusters, "topk": topk}


def _clustered_share(knobs: Knobs, length: int) -> float:
    method = METHODS["improved_clustered" if "topk" in knobs else "clustered"]
    knobs = {**method.knobs, **knobs}
    return (min(knobs["n_clusters"], length) + min(knobs.get("topk", 0), length)) / length


def _linear(length: int, is_causal: bool) -> Iterator[Knobs]:
    for n_directions in _up_to(length, (16, 32, 64, 128, 256, 512, 1024)):
        yield {"n_directions": n_directions}


def _directions(sample: Sample, knobs: Knobs, generator: torch.Generator) -> Tensor:
    head_dim = sample.q.shape[-1]
    return random_directions(head_dim, {**_LINEAR, **knobs}["n_directions"], generator=generator)


def _attend_linear(sample: Sample, omega: Tensor, knobs: Knobs) -> Tensor:
    # the features' own scale is 1 / sqrt(D)
    q = sample.q * (sample.scale * sample.q.shape[-1] ** 0.5)
    return linear_attention(
        q, sample.k, sample.v, feature_map="favor", omega=omega, key_mask=sample.key_mask, is_causal=sample.is_causal,
        impl={**_LINEAR, **knobs}["impl"],
    )  # fmt: skip


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size <= most] or [1]


def _check_sizes(defaults: Knobs) -> Callable[[Knobs], Knobs]:
    def check(knobs: Knobs) -> Knobs:
        for name, value in knobs.items():
            if name == "impl":
                checks.check_choice(name, value, checks.IMPLS)
                continue
            kind = type(defaults[name])
            least = 0 if name in ("local_window", "look_back", "look_ahead") else 1
            if type(value) is not kind:
                raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})")
            if kind is int and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        return {**defaults, **knobs}

    return check


_LSH = {
    "n_hashes": 8, "bucket_size": 64, "look_back": 1, "look_ahead": 0, "correct_duplicates": False, "local_window": 0,
    "impl": None,
}  # fmt: skip
_LINEAR = {"n_directions": 64, "impl": None}
SPACES = {
    "smyrf": _of_patch(METHODS["smyrf"], _smyrf, _smyrf_share),
    "lsh": Space("lsh", _LSH, _lsh, _check_sizes(_LSH), _rotations, _attend_lsh, _lsh_share, is_shared=True),
    "clustered": _of_patch(METHODS["clustered"], _clustered, _clustered_share, causal=False),
    "improved_clustered": _of_patch(METHODS["improved_clustered"], _improved, _clustered_share),
    "linear": Space(
        "linear", _LINEAR, _linear, _check_sizes(_LINEAR), _directions, _attend_linear,
        lambda knobs, length: 2 * {**_LINEAR, **knobs}["n_directions"] / length,
    ),
}  # fmt: skip
