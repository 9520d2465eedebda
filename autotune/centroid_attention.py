"""How attention of clusters' means is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, Tensors, candidates_of, draw, launcher, meta
from fastattn.kernels import centroid_attention as kernels
from fastattn.kernels.config import Config, Cost, cdiv
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("centroid_attention",)
_GROUP = kernels.GROUP.value


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """``n_queries`` means among ``length`` keys, of which each is to find ``top_k``."""

    length: int = 4096
    n_queries: int = 100
    top_k: int = 32
    head_dim: int = 64
    value_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {
            "batch": self.batch, "heads": self.heads, "n_queries": self.n_queries, "head_dim": self.head_dim,
            "n_keys": self.length, "value_dim": self.value_dim,
        }  # fmt: skip


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: what methods have by default."""
    return [Sizes(head_dim=head_dim, value_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """With peaks, as improved clustered attention needs them; of the forward also without, as clustered attention."""
    if kernel != "centroid_attention_forward":
        return [{"HAS_MASK": False, "HAS_DROPOUT": False}]
    plain: dict[str, Flag] = {"HAS_MASK": False, "HAS_VALUES": True, "HAS_PEAKS": True, "HAS_DROPOUT": False}
    return [plain, plain | {"HAS_PEAKS": False}]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    first = kernels.heuristic(kernel, device_type, sizes.n_queries, sizes.head_dim, element_size)
    most = {"BLOCK_M": sizes.n_queries, "BLOCK_N": sizes.length}
    if kernel == "centroid_attention_candidates":
        most = {"BLOCK_N": _n_chosen(sizes) * _GROUP}
    return candidates_of(kernels.TUNING[kernel], first, device_type, most)


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    shape = sizes.shape()
    return kernels.cost(kernel, **shape, top_k=sizes.top_k, element_size=element_size, config=config)


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    lead, row = (sizes.batch, sizes.heads), meta(1)
    q, out = meta(*lead, sizes.n_queries, sizes.head_dim, dtype=dtype), meta(*lead, sizes.n_queries, sizes.value_dim)
    k, v = (meta(*lead, sizes.length, dim, dtype=dtype) for dim in (sizes.head_dim, sizes.value_dim))
    tensors = {"q": q, "k": k, "v": v, "key_mask": meta(1, dtype=torch.bool), "seed": meta(dtype=torch.int64)}
    tensors |= {"groups": meta(*lead, sizes.n_queries, _n_chosen(sizes), dtype=torch.int32), "dk": k, "dv": v}
    tensors |= {"dout": out.to(dtype), "out": out} | dict.fromkeys(("lse", "peaks", "logits", "delta", "dq"), row)
    return _launch(kernel, tensors, _flags(kernel, flags), 1.0, config)


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names`` and its flags, the plain ones first, or alone.

    reference: ``fastattn.reference.centroid_attention``.
    """
    generator = torch.Generator().manual_seed(0)
    scale, lead = 1 / math.sqrt(sizes.head_dim), (sizes.batch, sizes.heads)

    def rows(length: int, dim: int) -> Tensor:
        return draw((*lead, length, dim), generator, device, dtype)

    q, dout = rows(sizes.n_queries, sizes.head_dim), rows(sizes.n_queries, sizes.value_dim)
    k, v = rows(sizes.length, sizes.head_dim), rows(sizes.length, sizes.value_dim)
    inputs = {"q": q, "k": k, "v": v, "key_mask": torch.empty(1, dtype=torch.bool, device=device)}
    inputs["seed"] = torch.zeros((), dtype=torch.int64, device=device)
    exact, about = (
        _solve(reference, [x.to(as_type) for x in (q, k, v, dout)], scale) for as_type in (torch.float64, dtype)
    )
    n_groups, n_chosen = cdiv(sizes.length, _GROUP), _n_chosen(sizes)
    groups = torch.stack([torch.randperm(n_groups, generator=generator)[:n_chosen] for _ in range(sizes.n_queries)])
    inputs["groups"] = groups.int().to(device).expand(*lead, -1, -1).contiguous()
    inputs |= {"dout": dout, "lse": exact["lse"].float()}
    inputs["delta"] = (dout.double() * exact["out"]).sum(-1).float()

    for name, options in _plain_first(names, plain):
        outputs = _outputs(name, options, sizes, q, k, v)
        if name == "centroid_attention_forward":
            given = inputs | {"peaks": q.new_empty(*lead, sizes.n_queries, 0, dtype=torch.float32)} | outputs
            wanted = ("out", "lse", "peaks") if options["HAS_PEAKS"] else ("out", "lse")
            results = partial(_folded, outputs)
        elif name == "centroid_attention_candidates":
            given, wanted, results = inputs | outputs, ("logits",), None
            for solved in (exact, about):
                solved["logits"] = _of_groups(solved["s"], inputs["groups"], sizes)
        elif name == "centroid_attention_backward_dq":
            given, wanted, results = inputs | outputs, ("dq",), partial(_summed, outputs)
        else:
            given, wanted, results = inputs | outputs, ("dk", "dv"), None

        def launches(
            config: Config, tensors: Mapping[str, Tensor], name: str = name, options: Mapping[str, Flag] = options
        ) -> Iterable[Launch]:
            return [_launch(name, tensors, options, scale, config)]

        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype,
            shape=sizes.shape(),
            flags=dict(options),
            sizes=dict(vars(sizes)),
            candidates=candidates(name, device_kind(device), sizes, dtype.itemsize, options),
            run=launcher(given, launches),
            outputs=tuple(outputs.values()),
            results=results,
            expected=tuple(exact[x] for x in wanted),
            plain=tuple(about[x] for x in wanted),
        )


def _plain_first(names: Sequence[str], plain: bool) -> Iterator[tuple[str, dict[str, Flag]]]:
    for number in range(1 if plain else max(len(flags(name)) for name in names)):
        yield from ((name, flags(name)[number]) for name in names if number < len(flags(name)))


def _flags(kernel: str, options: Mapping[str, Flag] | None) -> Mapping[str, Flag]:
    return flags(kernel)[0] if options is None else options


def _launch(
    kernel: str, tensors: Mapping[str, Tensor], options: Mapping[str, Flag], scale: float, config: Config
) -> Launch:
    own = {name: bool(value) for name, value in options.items() if name != "HAS_DROPOUT"}
    return kernels.launch_of(kernel, tensors, own, scale, 0.5 if options["HAS_DROPOUT"] else 0.0, config)


def _n_chosen(sizes: Sizes) -> int:
    """How many groups of keys a query looks at once more."""
    return min(sizes.top_k, cdiv(sizes.length, _GROUP))


def _outputs(
    kernel: str, options: Mapping[str, Flag], sizes: Sizes, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    n_parts = cdiv(sizes.length, kernels.PART)

    def empty(*shape: int) -> Tensor:
        return q.new_empty(sizes.batch, sizes.heads, *shape, dtype=torch.float32)

    if kernel == "centroid_attention_forward":
        outputs = {"out": empty(n_parts, sizes.n_queries, sizes.value_dim), "lse": empty(n_parts, sizes.n_queries)}
        if options["HAS_PEAKS"]:
            outputs["peaks"] = empty(sizes.n_queries, cdiv(sizes.length, _GROUP))
        return outputs
    if kernel == "centroid_attention_candidates":
        return {"logits": empty(sizes.n_queries, _n_chosen(sizes) * _GROUP)}
    if kernel == "centroid_attention_backward_dq":
        return {"dq": empty(n_parts, sizes.n_queries, sizes.head_dim)}
    return {"dk": torch.empty_like(k), "dv": torch.empty_like(v)}


def _folded(outputs: Mapping[str, Tensor]) -> Tensors:
    lse = torch.logsumexp(outputs["lse"], 2)
    out = (outputs["out"] * torch.exp(outputs["lse"] - lse.unsqueeze(2)).unsqueeze(-1)).sum(2)
    return (out, lse, outputs["peaks"]) if "peaks" in outputs else (out, lse)


def _summed(outputs: Mapping[str, Tensor]) -> Tensors:
    return (outputs["dq"].sum(2),)


def _of_groups(s: Tensor, groups: Tensor, sizes: Sizes) -> Tensor:
    """The logits of the chosen groups' keys, -inf beyond the last key."""
    rows = (groups.long().unsqueeze(-1) * _GROUP + torch.arange(_GROUP, device=s.device)).flatten(-2)
    return s.gather(-1, rows.clamp_max(sizes.length - 1)).masked_fill(rows >= sizes.length, -math.inf)


def _solve(reference: Any, tensors: Sequence[Tensor], scale: float) -> dict[str, Tensor]:
    q, k, v, dout = tensors
    out, lse = reference.centroid_attention(q, k, v, scale=scale)
    given = (dout, torch.zeros_like(lse), q, k, v, out, lse)
    dq, dk, dv = reference.centroid_attention_backward(*given, scale=scale)
    s = reference.logits(q, k, scale=scale) * kernels.LOG2_E  # kernels have powers of two
    n_groups = cdiv(k.shape[2], _GROUP)
    padded = torch.nn.functional.pad(s, (0, n_groups * _GROUP - k.shape[2]), value=-math.inf)
    peaks = padded.unflatten(-1, (n_groups, _GROUP)).amax(-1)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "s": s, "peaks": peaks}


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``improved_clustered_attention`` runs with its defaults, on tensors without memory.

    cluster_size: centroids do not depend on it. every_pattern: False gives none, for SMYRF has no centroids; True gives
    what calls with and without a key mask run.
    """
    if not every_pattern:
        return
    for kernel in kernels.KERNELS:
        for has_mask in (False, True):
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", has_mask=has_mask)
            tile = " x ".join(str(size) for size in launch.config.blocks.values())
            yield f"{kernel}, tile {tile}{', key_mask' if has_mask else ''}", launch
