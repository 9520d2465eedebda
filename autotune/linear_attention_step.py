"""How a step of linear attention is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, candidates_of, draw, launcher, meta
from fastattn.kernels import linear_attention_step as kernels
from fastattn.kernels.config import Config, Cost
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("linear_attention_step",)
_EPS = 1e-6


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """One token of each example and head."""

    head_dim: int = 64
    value_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {"batch": self.batch, "heads": self.heads, "head_dim": self.head_dim, "value_dim": self.value_dim}


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: one sequence, and many at once."""
    return [Sizes(head_dim=head_dim, value_dim=head_dim, batch=batch) for batch in (1, 32)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """The map elu + 1."""
    return [{"feature_map": "elu"}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.head_dim, sizes.value_dim)
    most = {"BLOCK_F": sizes.head_dim, "BLOCK_DV": sizes.value_dim}
    return candidates_of(kernels.TUNING[kernel], first, device_type, most)


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    return kernels.cost(
        kernel, batch=sizes.batch, heads=sizes.heads, features=sizes.head_dim, value_dim=sizes.value_dim,
        element_size=element_size, config=config,
    )  # fmt: skip


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    lead = (sizes.batch, sizes.heads)
    q, v = (meta(*lead, 1, dim, dtype=dtype) for dim in (sizes.head_dim, sizes.value_dim))
    s, z = meta(*lead, sizes.head_dim, sizes.value_dim), meta(*lead, sizes.head_dim)
    tensors = {"q": q, "k": q, "v": v, "s": s, "z": z, "out": v, "new_s": s, "new_z": z}
    (launch,) = kernels.launches_of(kernel, tensors, _feature_map(flags), _EPS, config)
    return launch


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``. reference: ``fastattn.reference.linear_attention_step``."""
    generator = torch.Generator().manual_seed(0)
    lead = (sizes.batch, sizes.heads)

    def rows(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw((*lead, *shape), generator, device, dtype)

    q, k, v = rows(1, sizes.head_dim), rows(1, sizes.head_dim), rows(1, sizes.value_dim)
    # sums of features, which are positive
    s = rows(sizes.head_dim, sizes.value_dim, dtype=torch.float32)
    z = rows(sizes.head_dim, dtype=torch.float32).abs()
    exact, about = (
        reference.linear_attention_step(*(x.to(as_type) for x in (q, k, v)), s.to(state), z.to(state), eps=_EPS)
        for as_type, state in ((torch.float64, torch.float64), (dtype, torch.float32))
    )
    outputs = {"out": torch.empty_like(v), "new_s": torch.empty_like(s), "new_z": torch.empty_like(z)}
    for name in names:
        for options in flags(name):

            def launches(config: Config, tensors: Mapping[str, Tensor], name: str = name) -> Iterable[Launch]:
                return kernels.launches_of(name, tensors, "elu", _EPS, config)

            yield Problem(
                kernel=name,
                device=device,
                dtype=dtype,
                shape=sizes.shape(),
                flags=options,
                sizes=dict(vars(sizes)),
                candidates=candidates(name, device_kind(device), sizes, dtype.itemsize, options),
                run=launcher({"q": q, "k": k, "v": v, "s": s, "z": z} | outputs, launches),
                outputs=tuple(outputs.values()),
                expected=exact,
                plain=about,
            )


def _feature_map(flags: Mapping[str, Flag] | None) -> str:
    return "elu" if flags is None else str(flags["feature_map"])


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of ``linear_attention_step`` with the map elu + 1, on tensors without memory.

    cluster_size: a step has none. every_pattern: False gives nothing, for SMYRF does not run it.
    """
    if every_pattern:
        for kernel in kernels.KERNELS:
            yield kernel, kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu")
