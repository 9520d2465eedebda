"""How attention to clusters' lists of keys is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, Tensors, by_head, candidates_of, draw, launcher, meta
from fastattn.kernels import topk_attention as kernels
from fastattn.kernels.config import Config, Cost, cdiv
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("topk_attention",)
_SUM = "topk_attention_sum"


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """``length`` queries in ``n_clusters`` clusters, each with a list of ``top_k`` of as many keys."""

    length: int = 4096
    n_clusters: int = 100
    top_k: int = 32
    head_dim: int = 64
    value_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str) -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        if kernel == _SUM:  # of the gradients of keys
            return {"heads": self.batch * self.heads, "n_rows": self.length, "value_dim": self.head_dim}
        return {
            "batch": self.batch, "heads": self.heads, "n_queries": self.length, "n_clusters": self.n_clusters,
            "top_k": self.top_k, "head_dim": self.head_dim, "value_dim": self.value_dim,
        }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top_k", "n_clusters"):
            if getattr(self, name) > self.length:
                raise ValueError(f"{name} must not be above length {self.length}, got {getattr(self, name)}")


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: what methods have by default."""
    return [Sizes(head_dim=head_dim, value_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    if kernel == _SUM:
        return [{}]
    return [{"is_causal": is_causal, "dropout": False} for is_causal in (False, True)]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    members = cdiv(sizes.length, sizes.n_clusters)
    first = kernels.heuristic(kernel, device_type, sizes.top_k, sizes.head_dim, element_size, members)
    # clusters may be larger than in the mean
    most = {"BLOCK_M": sizes.length if kernel == _SUM else 2 * members, "BLOCK_N": sizes.top_k}
    return candidates_of(kernels.TUNING[kernel], first, device_type, most)


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    return kernels.cost(kernel, **sizes.shape(""), element_size=element_size, config=config)


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    lead = (sizes.batch, sizes.heads)
    if kernel == _SUM:
        heads, entries = sizes.batch * sizes.heads, _n_parts(sizes) * sizes.top_k
        tensors = {"parts": meta(heads, entries, sizes.head_dim), "entries": meta(heads, entries, dtype=torch.int32)}
        tensors["first"] = meta(heads, sizes.length + 1, dtype=torch.int32)
        tensors["sum"] = meta(heads, sizes.length, sizes.head_dim, dtype=dtype)
        return kernels.sum_launch(tensors, config)
    q, v = (meta(*lead, sizes.length, dim, dtype=dtype) for dim in (sizes.head_dim, sizes.value_dim))
    row, integers = meta(*lead, sizes.length), meta(*lead, sizes.length, dtype=torch.int32)
    tensors = {"dout": v, "q": q, "k": q, "v": v, "order": integers, "out": v, "dq": q}
    tensors["offsets"] = meta(*lead, sizes.n_clusters + 1, dtype=torch.int32)
    tensors["topk_index"] = meta(*lead, sizes.n_clusters, sizes.top_k, dtype=torch.int32)
    tensors |= dict.fromkeys(("rest", "drest", "dk", "dv", "mass", "dmass", "lse", "dlse", "delta"), row)
    tensors |= {"rows": integers, "clusters": integers, "seed": meta(dtype=torch.int64)}
    is_causal = bool(flags and flags["is_causal"])
    return kernels.launch_of(kernel, tensors, is_causal, 1.0, 0.5 if flags and flags["dropout"] else 0.0, config)


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``, then, if not ``plain``, those of causal attention.

    reference: ``fastattn.reference.topk_attention``.
    """
    drawn = _draw(sizes, dtype, device) if set(names) != {_SUM} else None
    for is_causal in (False,) if plain else (False, True):
        solved = None
        for name in names:
            if name == _SUM and not is_causal:
                yield _sum_problem(sizes, dtype, device)
            elif name != _SUM and drawn is not None:
                solved = solved or _solutions(drawn, sizes, dtype, reference, is_causal)
                yield _problem(name, drawn, solved, sizes, dtype, device, is_causal)


def _problem(
    kernel: str, drawn: Mapping[str, Tensor], solved: tuple[dict[str, Tensor], dict[str, Tensor]], sizes: Sizes,
    dtype: torch.dtype, device: torch.device, is_causal: bool,
) -> Problem:  # fmt: skip
    exact, plain = solved
    inputs = {name: x for name, x in drawn.items() if name != "of_query"}
    inputs |= {"lse": exact["lse"].float(), "delta": exact["delta"].float()}
    outputs = _outputs(kernel, sizes, drawn)
    wanted = {
        "topk_attention_forward": ("out", "lse"),
        "topk_attention_backward_dq": ("dq", "delta"),
        "topk_attention_backward_dkv": ("dk", "dv", "dmass", "drest"),
    }[kernel]
    is_dkv = kernel == "topk_attention_backward_dkv"
    options: dict[str, Flag] = {"is_causal": is_causal, "dropout": False}

    def launches(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
        return [kernels.launch_of(kernel, tensors, is_causal, _scale(sizes), 0.0, config)]

    return Problem(
        kernel=kernel,
        device=device,
        dtype=dtype,
        shape=sizes.shape(kernel),
        flags=options,
        sizes=dict(vars(sizes)),
        candidates=candidates(kernel, device_kind(device), sizes, dtype.itemsize, options),
        run=launcher(inputs | outputs, launches),
        outputs=tuple(outputs.values()),
        results=partial(_of_parts, outputs, sizes) if is_dkv else None,
        expected=tuple(exact[x] for x in wanted),
        plain=tuple(plain[x] for x in wanted),
    )


def _sum_problem(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """Gradients of lists' keys, summed by key: random rows, among which some are of no key."""
    generator = torch.Generator().manual_seed(0)
    heads, n_entries = sizes.batch * sizes.heads, _n_parts(sizes) * sizes.top_k
    parts = draw((heads, n_entries, sizes.head_dim), generator, device, torch.float32)
    rows = torch.randint(-1, sizes.length, (heads, n_entries), generator=generator, dtype=torch.int32).to(device)
    in_order, entries = torch.sort(rows, dim=-1, stable=True)
    wanted = torch.arange(sizes.length + 1, dtype=torch.int32, device=device).expand(heads, -1).contiguous()
    tensors = {"parts": parts, "entries": entries.int(), "first": torch.searchsorted(in_order, wanted, out_int32=True)}
    tensors["sum"] = torch.empty(heads, sizes.length, sizes.head_dim, dtype=dtype, device=device)
    place = torch.where(rows < 0, sizes.length, rows).long().unsqueeze(-1).expand_as(parts)
    exact, plain = (
        x.new_zeros(heads, sizes.length + 1, sizes.head_dim).scatter_add_(1, place, x)[:, :-1]
        for x in (parts.double(), parts)
    )

    def launches(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
        return [kernels.sum_launch(tensors, config)]

    return Problem(
        kernel=_SUM,
        device=device,
        dtype=dtype,
        shape=sizes.shape(_SUM),
        flags={},
        sizes=dict(vars(sizes)),
        candidates=candidates(_SUM, device_kind(device), sizes, dtype.itemsize),
        run=launcher(tensors, launches),
        outputs=(tensors["sum"],),
        expected=(exact,),
        plain=(plain.to(dtype),),
    )


def _scale(sizes: Sizes) -> float:
    return 1 / math.sqrt(sizes.head_dim)


def _n_parts(sizes: Sizes) -> int:
    return kernels.parts_of(sizes.length, sizes.n_clusters, sizes.top_k)[0]


def _draw(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors of all kernels, but for what they write, and the cluster ``of_query``."""
    generator = torch.Generator().manual_seed(0)
    lead = (sizes.batch, sizes.heads)

    def rows(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw((*lead, *shape), generator, device, dtype)

    drawn = {"q": rows(sizes.length, sizes.head_dim), "k": rows(sizes.length, sizes.head_dim)}
    drawn |= {"v": rows(sizes.length, sizes.value_dim), "dout": rows(sizes.length, sizes.value_dim)}
    drawn["mass"] = rows(sizes.n_clusters, dtype=torch.float32).sigmoid()
    drawn["rest"] = rows(sizes.n_clusters, sizes.value_dim, dtype=torch.float32)
    drawn["dlse"] = torch.zeros(*lead, sizes.length, device=device)
    drawn["seed"] = torch.zeros((), dtype=torch.int64, device=device)
    clusters = torch.randint(sizes.n_clusters, (*lead, sizes.length), generator=generator)
    in_order, order = torch.sort(clusters, dim=-1, stable=True)
    wanted = torch.arange(sizes.n_clusters + 1).expand(*lead, -1).contiguous()
    drawn |= {"order": order.int(), "offsets": torch.searchsorted(in_order, wanted, out_int32=True)}
    lists = torch.rand(*lead, sizes.n_clusters, sizes.length, generator=generator).topk(sizes.top_k, -1).indices
    drawn |= {"topk_index": lists.int(), "of_query": clusters.int()}
    return {name: x.to(device) for name, x in drawn.items()}


def _solutions(
    drawn: Mapping[str, Tensor], sizes: Sizes, dtype: torch.dtype, reference: Any, is_causal: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(in float64, in ``dtype``)."""
    options = {"is_causal": is_causal, "scale": _scale(sizes)}
    names = ("out", "lse", "delta", "dq", "dk", "dv", "dmass", "drest")

    def solve(*given: Tensor) -> Tensors:
        q, k, v, dout, mass, rest, dlse, clusters, lists = given
        out, lse = reference.topk_attention(q, k, v, clusters, lists, mass, rest, **options)
        ones = torch.ones_like(mass)
        weighted, _ = reference.topk_attention(q, k, v, clusters, lists, ones, None, **options)
        delta = (weighted.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
        grads = reference.topk_attention_backward(dout, dlse, q, k, v, clusters, lists, mass, lse, **options)
        return out, lse, delta, *grads

    solved = []
    for as_type, state in ((torch.float64, torch.float64), (dtype, torch.float32)):
        given = [drawn[name].to(as_type) for name in ("q", "k", "v", "dout")]
        given += [drawn[name].to(state) for name in ("mass", "rest", "dlse")]
        solved.append(dict(zip(names, by_head(solve, *given, drawn["of_query"], drawn["topk_index"]), strict=True)))
    return solved[0], solved[1]


def _outputs(kernel: str, sizes: Sizes, drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return drawn["q"].new_empty(sizes.batch, sizes.heads, *shape, dtype=dtype)

    if kernel == "topk_attention_forward":
        return {"out": torch.empty_like(drawn["v"]), "lse": empty(sizes.length)}
    if kernel == "topk_attention_backward_dq":
        return {"dq": torch.empty_like(drawn["q"]), "delta": empty(sizes.length)}
    n_parts = _n_parts(sizes)
    parts = {"dk": empty(n_parts, sizes.top_k, sizes.head_dim), "dv": empty(n_parts, sizes.top_k, sizes.value_dim)}
    parts |= {"rows": empty(n_parts, sizes.top_k, dtype=torch.int32), "drest": empty(n_parts, sizes.value_dim)}
    return parts | {"dmass": empty(n_parts), "clusters": empty(n_parts, dtype=torch.int32)}


def _of_parts(parts: Mapping[str, Tensor], sizes: Sizes) -> Tensors:
    """(dk, dv, dmass, drest): the sums of the parts, as the op makes them."""
    rows, clusters = parts["rows"].flatten(2), parts["clusters"]
    return (
        _sum_by(rows, parts["dk"].flatten(2, 3), sizes.length),
        _sum_by(rows, parts["dv"].flatten(2, 3), sizes.length),
        _sum_by(clusters, parts["dmass"].unsqueeze(-1), sizes.n_clusters).squeeze(-1),
        _sum_by(clusters, parts["drest"], sizes.n_clusters),
    )


def _sum_by(place: Tensor, x: Tensor, length: int) -> Tensor:
    """Sums of rows (B, H, E, F) by their place, (B, H, length, F); -1 is none, and what cannot be one gives NaN."""
    is_place = (place >= -1) & (place < length)
    x = torch.where(is_place.unsqueeze(-1), x, math.nan)
    place = torch.where((place < 0) & is_place, length, place.clamp(0, length - 1)).long()
    sums = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
    return sums.scatter_add_(2, place.unsqueeze(-1).expand_as(x), x)[:, :, :-1]


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``improved_clustered_attention`` runs with its defaults, on tensors without memory.

    cluster_size: lists do not depend on it. every_pattern: False gives none, for SMYRF has no lists; True also gives
    what causal calls run.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for is_causal in (False,) if kernel == "topk_attention_sum" else (False, True):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", is_causal=is_causal)
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', is_causal' if is_causal else ''}", launch
