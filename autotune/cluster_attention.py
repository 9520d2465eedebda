"""How clusters' sums and their broadcast are tuned: the input that they are run on, and their candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, Tensors, candidates_of, draw, launcher, meta, one_scatter
from fastattn.kernels import cluster_attention as kernels
from fastattn.kernels.config import Config, Cost
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("cluster_attention",)


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """Rows of ``head_dim`` numbers in ``n_clusters`` clusters."""

    length: int = 4096
    n_clusters: int = 100
    head_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {"clusters": self.n_clusters, "head_dim": self.head_dim}


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: what methods have by default."""
    return [Sizes(head_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """There are none."""
    return [{}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.n_clusters, sizes.head_dim, element_size)
    most = {"BLOCK_N": sizes.length, "BLOCK_C": sizes.n_clusters}
    return one_scatter(candidates_of(kernels.TUNING[kernel], first, device_type, most), device_type)


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    return kernels.cost(
        kernel, batch=sizes.batch, heads=sizes.heads, length=sizes.length, n_clusters=sizes.n_clusters,
        dim=sizes.head_dim, element_size=element_size, config=config,
    )  # fmt: skip


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    lead = (sizes.batch, sizes.heads)
    x = meta(*lead, sizes.length, sizes.head_dim, dtype=dtype)
    shape = (*lead, kernels.chunks(sizes.length, device_type)[0], sizes.n_clusters + 1)
    tensors = {"x": x, "out": x, "clusters": meta(*lead, sizes.length, dtype=torch.int32)}
    tensors |= {"sums": meta(*shape, sizes.head_dim), "counts": meta(*shape, dtype=torch.int32)}
    tensors["values"] = meta(*lead, sizes.n_clusters, sizes.head_dim)
    return _launch(kernel, tensors, device_type, config)


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``. reference: ``fastattn.reference.cluster_attention``."""
    generator = torch.Generator().manual_seed(0)
    kind, lead = device_kind(device), (sizes.batch, sizes.heads)
    x = draw((*lead, sizes.length, sizes.head_dim), generator, device, dtype)
    values = draw((*lead, sizes.n_clusters, sizes.head_dim), generator, device, torch.float32)
    clusters = torch.randint(sizes.n_clusters, (*lead, sizes.length), generator=generator).int().to(device)
    shape = (*lead, kernels.chunks(sizes.length, kind)[0], sizes.n_clusters + 1)
    sums = torch.empty(*shape, sizes.head_dim, device=device)
    counts = torch.empty(shape, dtype=torch.int32, device=device)
    tensors = {
        "x": x,
        "values": values,
        "clusters": clusters,
        "sums": sums,
        "counts": counts,
        "out": torch.empty_like(x),
    }

    def added() -> Tensors:
        return sums[..., :-1, :].sum(2), counts[..., :-1].sum(2)

    def launches(config: Config, tensors: Mapping[str, Tensor], name: str) -> Iterable[Launch]:
        return [_launch(name, tensors, kind, config)]

    for name in names:
        if name == "cluster_attention_sums":
            outputs, results = (sums, counts), added
            expected, about = (reference.cluster_sums(y, clusters, sizes.n_clusters) for y in (x.double(), x))
        else:
            outputs, results = (tensors["out"],), None
            expected = (reference.cluster_broadcast(values.double(), clusters),)
            about = (reference.cluster_broadcast(values, clusters).to(dtype),)
        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype,
            shape=sizes.shape(),
            flags={},
            sizes=dict(vars(sizes)),
            candidates=candidates(name, kind, sizes, dtype.itemsize),
            run=launcher(tensors, partial(launches, name=name)),
            outputs=outputs,
            results=results,
            expected=tuple(y.double() for y in expected),
            plain=about,
        )


def _launch(kernel: str, tensors: Mapping[str, Tensor], device_type: str, config: Config) -> Launch:
    launch = kernels.sums_launch if kernel == "cluster_attention_sums" else kernels.broadcast_launch
    return launch(tensors, device_type, config)


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``clustered_attention`` runs around its attention, on tensors without memory.

    cluster_size: nothing depends on it. every_pattern: False gives none, for SMYRF has no means.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu")
        tile = " x ".join(str(size) for size in launch.config.blocks.values())
        yield f"{kernel}, tile {tile}", launch
