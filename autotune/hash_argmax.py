"""How hashing of rows is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, agreement, candidates_of, cost_of, draw, launcher, meta
from fastattn.kernels import hash_argmax as kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("hash_argmax",)
# halves of the factors that default numbers of buckets have: up to 64 for one factor, up to 32 for each of two
_FIRST, _LATER = (16, 32, 64), (16, 32)
_OPEN = 1e-3  # of the largest product: as near to it as that, another may be the largest by rounding


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """Rows that are hashed by one factor of ``2 * columns`` buckets, ``rounds`` times over."""

    length: int = 4096
    columns: int = 64
    head_dim: int = 64
    heads: int = 8
    rounds: int = 8
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {"rounds": self.rounds, "head_dim": self.head_dim, "columns": self.columns}


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: the factors of 4,096 and of 16,384 rows in blocks of 64."""
    return [Sizes(head_dim=head_dim), Sizes(head_dim=head_dim, columns=16)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """None that select other tiles: a later factor adds its digit to those before it."""
    return [{}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.columns, sizes.head_dim)
    most = {"BLOCK_M": sizes.length, "BLOCK_N": sizes.columns}
    return candidates_of(kernels.TUNING[kernel], first, device_type, most)


cost = cost_of(kernels)


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """The first factor's launch, without memory."""
    launch = kernels.example_launch(
        kernel, dtype, head_dim=sizes.head_dim, columns=sizes.columns, device_type=device_type, config=config
    )
    lead = (sizes.batch, sizes.heads)
    tensors = {"x": meta(*lead, sizes.length, sizes.head_dim, dtype=dtype)}
    tensors["rotations"] = meta(sizes.heads, sizes.rounds, sizes.columns, sizes.head_dim)
    tensors["buckets"] = meta(*lead, sizes.rounds, sizes.length, dtype=torch.int32)
    (sized,) = kernels.launches_of(tensors, (2 * sizes.columns,), {sizes.columns: config})
    return Launch(sized.kernel, sized.grid, sized.args | {"PRECISION": launch.args["PRECISION"]}, config)


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``. reference: ``fastattn.reference.hash_argmax``."""
    generator = torch.Generator().manual_seed(0)
    factors = (2 * sizes.columns,)
    x = draw((sizes.batch, sizes.heads, sizes.length, sizes.head_dim), generator, device, dtype)
    shape = (sizes.heads, sizes.head_dim, sizes.rounds, sizes.columns)
    rotations = draw(shape, generator, device, torch.float32)
    expected = reference.hash_argmax(x.double(), rotations.double(), factors)
    # [B, H, h, N, columns]
    products = torch.einsum("bhnd,hdrw->bhrnw", x.float(), rotations).abs()
    first, second = products.topk(2, -1).values.unbind(-1) if sizes.columns > 1 else (products[..., 0], 0.0)
    is_open = first - second < _OPEN * first
    tensors = {"x": x, "rotations": rotations.permute(0, 2, 3, 1).contiguous()}
    tensors["buckets"] = buckets = torch.empty(expected.shape, dtype=torch.int32, device=device)

    def launches(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
        return kernels.launches_of(tensors, factors, {sizes.columns: config})

    for name in names:
        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype,
            shape=sizes.shape(),
            flags={},
            sizes=dict(vars(sizes)),
            candidates=candidates(name, device_kind(device), sizes, dtype.itemsize),
            run=launcher(tensors, launches),
            outputs=(buckets,),
            results=lambda: (agreement(buckets, expected, is_open),),
            expected=(torch.ones(expected.shape, dtype=torch.float64, device=device),),
            plain=(torch.ones(expected.shape, device=device),),
        )


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``lsh_attention`` hashes with, on tensors without memory.

    cluster_size: hashing does not depend on it. every_pattern: False gives none, for SMYRF does not hash so.
    """
    if not every_pattern:
        return
    for is_first, halves in ((True, _FIRST), (False, _LATER)):
        for half in halves:
            config: Config = kernels.heuristic("hash_argmax_digit", "cpu", half, head_dim)
            launch = kernels.example_launch(
                "hash_argmax_digit", dtype, head_dim=head_dim, columns=half, first=is_first, device_type="cpu",
                config=config,
            )  # fmt: skip
            tile = " x ".join(str(size) for size in config.blocks.values())
            yield f"hash_argmax_digit, tile {tile}, {'first factor' if is_first else 'later factors'}", launch
