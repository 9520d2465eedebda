"""How linear attention is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, candidates_of, draw, launcher, meta
from fastattn.kernels import linear_attention as kernels
from fastattn.kernels.config import Config, Cost, cdiv
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("linear_attention",)
# (kernel, does it make what belongs to keys?)
_PASSES = tuple(product(kernels.KERNELS, (False, True)))
_STATES, _SCAN, _OUTPUTS, _GRADIENTS = kernels.KERNELS
_EPS = 1e-6


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """Rows of ``head_dim`` features, for queries and for as many keys."""

    length: int = 4096
    head_dim: int = 64
    value_dim: int = 64
    heads: int = 8
    batch: int = 1

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {
            "batch": self.batch, "heads": self.heads, "n_rows": self.length,
            "head_dim": self.head_dim, "value_dim": self.value_dim,
        }  # fmt: skip


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said."""
    return [Sizes(head_dim=head_dim, value_dim=head_dim)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """The map elu + 1: results of queries and of keys, over all rows, then causal."""
    return [
        dict(vars(kernels.Pattern(is_causal=is_causal, own_keys=own_keys)))
        for is_causal, own_keys in product((False, True), repeat=2)
    ]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`.

    A causal pass has one BLOCK_M, the length of its chunks: that of the kernel that is the first to have one.
    """
    pattern = _pattern(flags)
    first = _heuristic(kernel, device_type, sizes, element_size, pattern.is_causal)
    most = {"BLOCK_M": sizes.length, "BLOCK_F": sizes.head_dim, "BLOCK_DV": sizes.value_dim}
    if kernel == _STATES:
        most["BLOCK_N"] = _chunk(device_type, sizes, element_size, pattern, {})
    elif kernel == _SCAN:
        most["BLOCK_SIZE"] = sizes.head_dim * (sizes.value_dim + 1)
    fixed = {"BLOCK_M": first.blocks["BLOCK_M"]} if kernel == _OUTPUTS and _follows(kernel, pattern) else None
    return candidates_of(kernels.TUNING[kernel], first, device_type, most, fixed)


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    """With that of the states, where ``config`` says how many there are."""
    pattern = _pattern(flags)
    shape = {"batch": sizes.batch, "heads": sizes.heads, "length": sizes.length, "features": sizes.head_dim}
    shape |= {"value_dim": sizes.value_dim}
    chosen = {} if config is None else {kernel: config}
    chunk = _chunk("cpu", sizes, element_size, pattern, chosen)
    of = partial(
        kernels.cost, **shape, is_causal=pattern.is_causal, own_keys=pattern.own_keys, element_size=element_size,
        chunk=chunk,
    )  # fmt: skip
    own = of(kernel, config=config)
    if config is None or not _sets_chunk(kernel, pattern):
        return own
    before = [of(name, config=_heuristic(name, "cpu", sizes, element_size, True)) for name in (_STATES, _SCAN)]
    numbers = [field.name for field in fields(Cost) if field.name not in ("launches", "rate")]
    return replace(own, **{name: sum(getattr(each, name) for each in (own, *before)) for name in numbers})


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """A launch without memory."""
    pattern = _pattern(flags)
    chunk = _chunk(device_type, sizes, dtype.itemsize, pattern, {kernel: config})
    lead, size = (sizes.batch, sizes.heads), sizes.head_dim * (sizes.value_dim + 1)
    x, y = (meta(*lead, sizes.length, dim, dtype=dtype) for dim in (sizes.head_dim, sizes.value_dim))
    row, state = meta(*lead, sizes.length), meta(*lead, size)
    states = meta(*lead, cdiv(sizes.length, chunk), size)
    tensors = {"own_x": x, "own_y": y, "other_x": x, "other_y": y, "den": row, "delta": row, "dx": x, "result": y}
    tensors |= {"states": states, "before": states if pattern.is_causal else state, "final": state, "initial": state}
    tensors |= {"out": state if pattern.own_keys else y, "key_mask": state}
    if pattern.has_mask:
        tensors["key_mask"] = meta(sizes.batch, sizes.length, dtype=torch.bool)
    (launch,) = kernels.launches_of((kernel,), tensors, pattern, _EPS, {kernel: config}, chunk, device_type)
    return launch


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names`` and its flags, the plain ones first, or alone.

    reference: ``fastattn.reference.linear_attention``. A causal pass has as many states as its tiles ask for: there
    their time is in the kernel's.
    """
    generator = torch.Generator().manual_seed(0)

    def rows(dim: int) -> Tensor:
        return draw((sizes.batch, sizes.heads, sizes.length, dim), generator, device, dtype)

    q, k, v, dout = rows(sizes.head_dim), rows(sizes.head_dim), rows(sizes.value_dim), rows(sizes.value_dim)
    for options in flags(names[0])[: 1 if plain else None]:
        pattern = _pattern(options)
        exact, about = (
            _Solution(reference, q.to(as_type), k.to(as_type), v.to(as_type), dout.to(as_type), pattern)
            for as_type in (torch.float64, dtype)
        )
        for name in names:
            yield _problem(name, (q, k, v, dout), exact, about, sizes, pattern)


def _problem(
    kernel: str, given: tuple[Tensor, Tensor, Tensor, Tensor], exact: _Solution, plain: _Solution, sizes: Sizes,
    pattern: kernels.Pattern,
) -> Problem:  # fmt: skip
    q, k, v, dout = given
    device, dtype, lead = v.device, v.dtype, (sizes.batch, sizes.heads)
    kind, size = device_kind(device), sizes.head_dim * (sizes.value_dim + 1)
    before_it = (_STATES, _SCAN) if _sets_chunk(kernel, pattern) else ()
    inputs = {"own_x": q, "own_y": dout, "other_x": k, "other_y": v, "out": exact.out.to(dtype)}
    if pattern.own_keys:
        inputs = {"own_x": k, "own_y": v, "other_x": q, "other_y": dout, "out": v}  # which this pass does not read
    inputs |= {"den": exact.den.float(), "delta": exact.delta.float()}
    if kernel == _OUTPUTS:
        outputs = {"result": torch.empty_like(v)}
        pairs = [(exact.dv, plain.dv) if pattern.own_keys else (exact.out, plain.out)]
        if not pattern.own_keys:
            outputs["den"] = torch.empty_like(inputs["den"])
            pairs.append((exact.den, plain.den))
    elif kernel == _GRADIENTS:
        outputs = {"dx": torch.empty_like(q)}
        pairs = [(exact.dk, plain.dk) if pattern.own_keys else (exact.dq, plain.dq)]
        if not pattern.own_keys:
            outputs["delta"] = torch.empty_like(inputs["delta"])
            pairs.append((exact.delta, plain.delta))
    else:
        chunk = _chunk(kind, sizes, dtype.itemsize, pattern, {})
        states, before, final = zip(exact.chunks(chunk), plain.chunks(chunk), strict=True)
        if kernel == _STATES:
            outputs, pairs = {"states": states[0].float()}, [states]
        else:
            inputs["states"] = states[0].float()
            outputs, pairs = {"final": final[0].float()}, [final]
            if pattern.is_causal:
                outputs["before"] = before[0].float()
                pairs.append(before)

    @cache
    def tensors_of(chunk: int) -> dict[str, Tensor]:
        tensors = inputs | outputs
        if "states" not in tensors:
            states, before, final = exact.chunks(chunk)
            tensors |= {"states": states.float(), "final": final.float()}
            tensors["before"] = before.float() if pattern.is_causal else tensors["final"]
        state = torch.zeros(*lead, size, device=device)
        return {"final": state, "before": state, "initial": state, "key_mask": state} | tensors

    def tensors_for(config: Config) -> dict[str, Tensor]:
        return tensors_of(_chunk(kind, sizes, dtype.itemsize, pattern, {kernel: config}))

    def launches(config: Config, tensors: Mapping[str, Tensor]) -> Iterable[Launch]:
        names = (*before_it, kernel)
        shape = (sizes.head_dim, sizes.value_dim, dtype.itemsize, pattern.is_causal)
        chosen = kernels.configurations(names, kind, *shape, {kernel: config})
        chunk = _chunk(kind, sizes, dtype.itemsize, pattern, {kernel: config})
        return kernels.launches_of(names, tensors, pattern, _EPS, chosen, chunk)

    return Problem(
        kernel=kernel,
        device=device,
        dtype=dtype,
        shape=sizes.shape(),
        flags=dict(vars(pattern)),
        sizes=dict(vars(sizes)),
        candidates=candidates(kernel, kind, sizes, dtype.itemsize, vars(pattern)),
        run=launcher(tensors_for, launches),
        outputs=tuple(outputs.values()),
        expected=tuple(pair[0] for pair in pairs),
        plain=tuple(pair[1] for pair in pairs),
    )


class _Solution:
    """What all kernels of a pass are to write, by the definition, in the dtype of the inputs."""

    def __init__(
        self, reference: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: kernels.Pattern
    ) -> None:  # fmt: skip
        options = {"feature_map": pattern.feature_map, "is_causal": pattern.is_causal}
        self.out, self.den, _ = reference.linear_attention(q, k, v, eps=_EPS, **options)
        given = (dout, None, q, k, v, self.out, self.den)
        self.dq, self.dk, self.dv, _ = reference.linear_attention_backward(*given, **options)
        state = self.den.dtype
        self.delta = (dout.to(state) * self.out.to(state)).sum(-1)
        phi = reference.phi((q if pattern.own_keys else k).to(state), pattern.feature_map)
        self._y, self._weights = v.to(state), torch.ones_like(self.den)
        self._backward = pattern.own_keys
        if pattern.own_keys:
            phi, self._y, self._weights = phi / self.den.unsqueeze(-1), dout.to(state), -self.delta
        self._phi = phi

    def chunks(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(states, what stands before each, the last), as the kernels lay them out, of chunks of ``length`` rows."""

        def cut(x: Tensor) -> Tensor:
            missing = -x.shape[2] % length
            return torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, length))

        phi, y, weights = cut(self._phi), cut(self._y), cut(self._weights.unsqueeze(-1))
        states = torch.cat([(phi.mT @ y).flatten(3), (phi * weights).sum(3)], -1)  # [B, H, chunks, F * (Dv + 1)]
        in_order = states.flip(2) if self._backward else states
        sums = in_order.cumsum(2)
        before = sums - in_order
        return states, before.flip(2) if self._backward else before, sums[:, :, -1]


def _pattern(flags: Mapping[str, Flag] | None) -> kernels.Pattern:
    return kernels.Pattern() if flags is None else kernels.Pattern(**flags)  # pyright: ignore[reportArgumentType]


def _heuristic(kernel: str, device_type: str, sizes: Sizes, element_size: int, is_causal: bool) -> Config:
    return kernels.heuristic(kernel, device_type, sizes.head_dim, sizes.value_dim, element_size, is_causal)


def _follows(kernel: str, pattern: kernels.Pattern) -> bool:
    """Whether another kernel of the pass says how long its chunks are: with keys' results gradients come first."""
    return pattern.is_causal and kernel == _OUTPUTS and pattern.own_keys


def _sets_chunk(kernel: str, pattern: kernels.Pattern) -> bool:
    return pattern.is_causal and kernel in (_OUTPUTS, _GRADIENTS) and not _follows(kernel, pattern)


def _chunk(
    device_type: str, sizes: Sizes, element_size: int, pattern: kernels.Pattern, chosen: Mapping[str, Config]
) -> int:
    """Rows of a state, where the pass has the configurations ``chosen`` and else those of the heuristic."""
    of_pass = dict(chosen)
    if not any("BLOCK_M" in config.blocks for config in of_pass.values()):
        last = _GRADIENTS if pattern.own_keys else _OUTPUTS
        of_pass[last] = _heuristic(last, device_type, sizes, element_size, pattern.is_causal)
    return kernels.chunk_length(sizes.length, pattern.is_causal, of_pass)


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of what ``linear_attention`` runs with the map elu + 1, forward and backward, causal and not, on
    tensors without memory.

    cluster_size: linear attention has none. every_pattern: False gives nothing, for SMYRF does not run it.
    """
    if not every_pattern:
        return
    for (kernel, own_keys), is_causal, has_mask in product(_PASSES, (False, True), (False, True)):
        pattern = kernels.Pattern(is_causal=is_causal, own_keys=own_keys, has_mask=has_mask)
        launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", pattern=pattern)
        flags = [name for name in ("is_causal", "own_keys", "has_mask") if getattr(pattern, name)]
        yield ", ".join([kernel, *flags]), launch
