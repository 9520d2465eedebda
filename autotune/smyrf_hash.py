"""How SMYRF's hash is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, candidates_of, cost_of, draw, launcher, meta
from fastattn.kernels import smyrf_hash as kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("smyrf_hash",)


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """One side: rows that are hashed ``rounds`` times over."""

    length: int = 16384
    head_dim: int = 64
    heads: int = 8
    rounds: int = 4
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        if kernel == "smyrf_hash_lift":
            return {"rounds": self.rounds}
        return {"rounds": self.rounds, "head_dim": self.head_dim}


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: SMYRF's default of four rounds."""
    return [Sizes(head_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """None that select other tiles: a mask is a byte a row."""
    return [{}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.head_dim)
    space = kernels.TUNING[kernel]
    most = {"BLOCK_M": max(sizes.length, min(space.blocks["BLOCK_M"])), "BLOCK_K": sizes.head_dim}
    # a CPU has no registers to spare by it: rows that were read in two parts took 1.8 times as long
    fixed = {"BLOCK_K": first.blocks["BLOCK_K"]} if device_type == "cpu" and "BLOCK_K" in space.blocks else None
    return candidates_of(space, first, device_type, most, fixed)


cost = cost_of(kernels)


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """One side's launch, without memory."""
    x = meta(sizes.batch, sizes.heads, sizes.length, sizes.head_dim, dtype=dtype)
    directions = meta(sizes.rounds, sizes.head_dim + 2).expand(sizes.batch, sizes.heads, -1, -1)
    side = kernels.side_of(x, directions, None)
    if kernel == "smyrf_hash_project":
        return kernels.project_launch(side, device_type, config)
    return _lift(side | {"other_most": side["most"], "hashes": side["products"]}, device_type, config)


def _lift(side: Mapping[str, Tensor], device_type: str, config: Config) -> Launch:
    """Of the queries, where the keys are as many."""
    return kernels.lift_launch(
        side, _tile(side, device_type), side["products"].shape[3], device_type, of_queries=True, config=config
    )


def _tile(side: Mapping[str, Tensor], device_type: str) -> int:
    """Rows of a tile, as the products are made where nothing was tuned."""
    return kernels.heuristic("smyrf_hash_project", device_type, side["directions"].shape[3] - 2).blocks["BLOCK_M"]


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``. reference: ``fastattn.reference.smyrf_hash``."""
    generator, kind = torch.Generator().manual_seed(0), device_kind(device)
    x = draw((sizes.batch, sizes.heads, sizes.length, sizes.head_dim), generator, device, dtype)
    projections = draw((sizes.head_dim + 2, sizes.rounds), generator, device, torch.float32)
    flat = projections.clone()
    flat[-2:] = 0  # no last coordinate: products alone
    side = kernels.side_of(x, projections.mT.contiguous().expand(sizes.batch, sizes.heads, -1, -1), None)
    outputs = side["products"], side["squares"]

    def results(x: Tensor) -> tuple[Tensor, Tensor]:
        """Products and squares as the definition has them."""
        return reference.smyrf_hash(x, x, flat)[0], x.square().sum(-1)

    exact, about = results(x.double()), results(x.float())
    for name in names:
        what: dict[str, Any] = {
            "kernel": name, "device": device, "shape": sizes.shape(name), "flags": {}, "sizes": dict(vars(sizes)),
            "candidates": candidates(name, kind, sizes, dtype.itemsize),
        }  # fmt: skip
        if name == "smyrf_hash_project":

            def project(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
                return [kernels.project_launch(tensors, kind, config)]

            yield Problem(
                **what,
                dtype=dtype,
                run=launcher(side, project),
                outputs=outputs,
                expected=exact,
                plain=about,
            )
        else:
            tile = _tile(side, kind)
            filled = torch.nn.functional.pad(about[1], (0, -sizes.length % tile)).unflatten(-1, (-1, tile)).amax(-1)
            given = {"products": about[0], "squares": about[1], "most": filled, "other_most": filled}
            hashes = torch.empty_like(about[0])

            def lift(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
                return [_lift(tensors, kind, config)]

            yield Problem(
                **what,
                dtype=torch.float32,
                run=launcher(given | {"directions": side["directions"], "hashes": hashes}, lift),
                outputs=(hashes,),
                expected=reference.smyrf_hash(x.double(), x.double(), projections)[:1],
                plain=reference.smyrf_hash(x.float(), x.float(), projections)[:1],
            )


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``smyrf_attention`` hashes with, on tensors without memory.

    cluster_size, every_pattern: hashing does not depend on them.
    """
    for is_masked in (False, True):
        launch = kernels.example_launch(
            "smyrf_hash_project", dtype, head_dim=head_dim, is_masked=is_masked, device_type="cpu"
        )  # fmt: skip
        yield f"smyrf_hash_project{', masked' if is_masked else ''}", launch
    yield "smyrf_hash_lift", kernels.example_launch("smyrf_hash_lift", dtype, head_dim=head_dim, device_type="cpu")
