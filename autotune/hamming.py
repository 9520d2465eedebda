"""How hashing and clustering of queries are tuned: the input that they are run on, and their candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import (
    AtLeastOne,
    Problem,
    Tensors,
    agreement,
    candidates_of,
    cost_of,
    draw,
    launcher,
    meta,
    one_scatter,
)
from fastattn.kernels import hamming as kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("hash_bits", "hamming_kmeans")
_OPEN = 1e-4  # of the norm of a row: as near to a plane as that, rounding decides the side
_ITERATIONS = 2  # of Lloyd's algorithm, the fewest in which all its kernels run
_WRITTEN = {
    "hamming_hash": "codes",
    "hamming_assign": "clusters",
    "hamming_count": "counts",
    "hamming_update": "centroids",
}


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """Rows that are hashed to ``n_bits`` bits, and put into ``n_clusters`` clusters by these."""

    length: int = 4096
    n_clusters: int = 100
    n_bits: int = 63
    head_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str) -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        if kernel == "hamming_hash":
            return {"head_dim": self.head_dim, "bits": self.n_bits}
        return {"batch": self.batch, "heads": self.heads, "clusters": self.n_clusters}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("n_bits", 63), ("n_clusters", self.length)):
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: what methods have by default."""
    return [Sizes(head_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """None that select other tiles."""
    return [{}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.n_clusters, sizes.head_dim)
    most = {"BLOCK_M": sizes.length, "BLOCK_N": sizes.length, "BLOCK_C": sizes.n_clusters, "BLOCK_K": sizes.head_dim}
    return one_scatter(candidates_of(kernels.TUNING[kernel], first, device_type, most), device_type)


cost = cost_of(kernels)


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    lead = (sizes.batch, sizes.heads)
    codes = meta(*lead, sizes.length, dtype=torch.int64)
    tensors = {"codes": codes, "mask": codes, "clusters": meta(*lead, sizes.length, dtype=torch.int32)}
    tensors["x"] = meta(*lead, sizes.length, sizes.head_dim, dtype=dtype)
    tensors["planes"] = meta(sizes.head_dim + 1, sizes.n_bits)
    tensors["centroids"] = meta(*lead, 2, sizes.n_clusters, dtype=torch.int32)
    tensors["ranks"] = meta(*lead, sizes.n_clusters, dtype=torch.int32)
    size = kernels.counts_size(*lead, sizes.length, sizes.n_clusters, device_type)
    tensors |= {"counts": meta(*size, dtype=torch.int32), "seed": meta(dtype=torch.int64)}
    return _launch(kernel, tensors, sizes, device_type, config)


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``; all but hashing have codes, which are int64 whatever ``dtype`` is.

    reference: what has the functions of ``fastattn.reference.hash_bits`` and ``hamming_kmeans``.
    """
    generator = torch.Generator().manual_seed(0)
    kind, lead = device_kind(device), (sizes.batch, sizes.heads)
    x = draw((*lead, sizes.length, sizes.head_dim), generator, device, dtype)
    planes = draw((sizes.n_bits, sizes.head_dim + 1), generator, device, torch.float32)
    codes = reference.hash_bits(x.double(), planes.double())
    number = torch.arange(sizes.n_clusters, dtype=torch.int32, device=device)
    initial = codes[..., : sizes.n_clusters]
    seed = torch.zeros((), dtype=torch.int64, device=device)
    tensors = {"x": x, "planes": planes.mT.contiguous(), "codes": codes, "mask": codes, "seed": seed}
    tensors["centroids"] = torch.stack([initial, initial >> 32], -2).to(torch.int32)
    tensors["ranks"] = number.expand(*lead, -1).contiguous()
    rows = number.expand(*lead, -1)
    tensors["clusters"] = reference.hamming_kmeans(codes, rows, None, seed, n_bits=sizes.n_bits, n_iterations=1)
    size = kernels.counts_size(*lead, sizes.length, sizes.n_clusters, kind)
    counted, centroids = _counted(tensors, size, kernels.chunks(sizes.length, kind)[1], sizes, reference)
    tensors["counts"] = torch.zeros(size, dtype=torch.int32, device=device)
    tensors["counts"][:, :, :-1] = counted
    truth = {"hamming_hash": codes, "hamming_assign": tensors["clusters"]}
    truth |= {"hamming_count": counted, "hamming_update": centroids}
    for name in names:
        output = torch.empty_like(tensors[_WRITTEN[name]])
        seen = partial(_seen, name, output, truth[name], x, planes, reference)
        of_results = seen()[0]

        def launches(config: Config, tensors: Mapping[str, Tensor], name: str = name) -> Iterable[Launch]:
            return [_launch(name, tensors, sizes, kind, config)]

        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype if name == "hamming_hash" else torch.int64,
            shape=sizes.shape(name),
            flags={},
            sizes=dict(vars(sizes)),
            candidates=candidates(name, kind, sizes, dtype.itemsize),
            run=launcher(tensors | {_WRITTEN[name]: output}, launches),
            outputs=(output,),
            results=seen,
            expected=(torch.ones_like(of_results),),
            plain=(torch.ones_like(of_results),),
        )


def _launch(
    kernel: str, tensors: Mapping[str, Tensor], sizes: Sizes, device_type: str, config: Config
) -> Launch:  # fmt: skip
    if kernel == "hamming_hash":
        return kernels.hash_launch(tensors, device_type, config)
    launches = kernels.kmeans_launches(tensors, sizes.n_bits, _ITERATIONS, device_type, {kernel: config})
    return next(launch for launch in launches if launch.kernel is kernels.KERNELS[kernel])


def _counted(
    tensors: Mapping[str, Tensor], size: tuple[int, ...], chunk: int, sizes: Sizes, reference: Any
) -> tuple[Tensor, Tensor]:
    """(members with each bit, by chunk of rows and cluster, and at 63 all members; the centroids that follow)."""
    codes, clusters = tensors["codes"], tensors["clusters"]
    bits = torch.nn.functional.pad(reference.unpack(codes, 63).int(), (0, 1), value=1)  # [B, H, N, 64]
    place = torch.arange(sizes.length, device=codes.device) // chunk * sizes.n_clusters + clusters.long()
    sums = bits.new_zeros(*codes.shape[:2], size[1] * sizes.n_clusters, 64)
    sums.scatter_add_(2, place.unsqueeze(-1).expand_as(bits), bits)
    counted = sums.unflatten(2, (size[1], sizes.n_clusters)).flatten(0, 1)  # [B * H, chunks, C, 64]
    total = counted.sum(1).unflatten(0, codes.shape[:2])
    members = total[..., 63:]
    drawn = reference.random_codes(tensors["seed"], 0, sizes.n_clusters)
    packed = reference.pack(2 * total[..., : sizes.n_bits] > members)
    packed = torch.where(members[..., 0] == 0, drawn & ((1 << sizes.n_bits) - 1), packed)
    return counted, torch.stack([packed, packed >> 32], -2).to(torch.int32)


def _seen(
    kernel: str, output: Tensor, truth: Tensor, x: Tensor, planes: Tensor, reference: Any
) -> Tensors:  # fmt: skip
    """Which numbers are right; of a code, which bits."""
    if kernel == "hamming_count":
        return (agreement(output[:, :, :-1], truth),)
    if kernel != "hamming_hash":
        return (agreement(output, truth),)
    n_bits = len(planes)
    side = x.float() @ planes[:, :-1].mT - planes[:, -1]  # [B, H, N, n_bits]
    scale = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True) * torch.linalg.vector_norm(planes, dim=-1)
    is_open = side.abs() < _OPEN * scale
    beyond = agreement(output >> n_bits, truth >> n_bits).unsqueeze(-1)
    bits = agreement(reference.unpack(output, n_bits), reference.unpack(truth, n_bits), is_open)
    return (torch.cat([bits, beyond], -1),)


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``clustered_attention`` runs to find clusters, on tensors without memory.

    cluster_size: nothing depends on it. every_pattern: False gives none, for SMYRF does not cluster so.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for masked in (False, True) if kernel == "hamming_assign" else (False,):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, masked=masked, device_type="cpu")
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', masked' if masked else ''}", launch
