"""How block attention is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup
from fastattn.autotune.key import Flag
from fastattn.autotune.problem import AtLeastOne, Problem, Tensors, candidates_of, draw, launcher, meta
from fastattn.kernels import block_attention as kernels
from fastattn.kernels.config import Config, Cost
from fastattn.kernels.launch import Launch, device_kind

REFERENCE = ("block_attention",)
PATTERN = kernels.Pattern()  # SMYRF's: each block meets its own block of keys
_CAUSAL = kernels.Pattern(is_causal=True, exclude_self=True, once=True)
_REFORMER = kernels.Pattern(look_back=1, is_causal=True, exclude_self=True, last_resort=True)


@dataclass(frozen=True)
class Sizes(AtLeastOne):
    """The input that kernels are measured on: ``rounds`` random partitions into blocks of ``cluster_size``."""

    length: int = 4096
    cluster_size: int = 64
    head_dim: int = 64
    value_dim: int = 64
    heads: int = 8
    rounds: int = 2
    batch: int = 1

    @property
    def n_blocks(self) -> int:
        return -(-self.length // self.cluster_size)

    def shape(self, kernel: str = "") -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {
            "batch": self.batch, "heads": self.heads, "rounds": self.rounds, "n_blocks": self.n_blocks,
            "c_q": self.cluster_size, "c_k": self.cluster_size,
            "head_dim": self.head_dim, "value_dim": self.value_dim,
        }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cluster_size > self.length:
            raise ValueError(f"cluster_size must not be above length {self.length}, got {self.cluster_size}")


def representative(head_dim: int) -> list[Sizes]:
    """What is tuned where nothing is said: blocks of 64, as methods have by default, and of 128."""
    return [Sizes(head_dim=head_dim, value_dim=head_dim, cluster_size=size) for size in (64, 128)]


def flags(kernel: str) -> list[dict[str, Flag]]:
    """SMYRF's pattern, the causal one, and that of a causal Reformer."""
    return [dict(vars(pattern)) for pattern in (PATTERN, _CAUSAL, _REFORMER)]


def candidates(
    kernel: str, device_type: str, sizes: Sizes, element_size: int = 4, flags: Mapping[str, Flag] | None = None
) -> list[Config]:
    """See :func:`~fastattn.autotune.problem.candidates_of`."""
    size = sizes.cluster_size
    pattern = _pattern(flags)
    first = kernels.heuristic(kernel, device_type, size, size, sizes.head_dim, element_size, pattern)
    return candidates_of(kernels.TUNING[kernel], first, device_type, {"BLOCK_M": size, "BLOCK_N": size})


def cost(
    kernel: str, sizes: Sizes, element_size: int = 4, config: Config | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Cost:  # fmt: skip
    pattern = _pattern(flags)
    neighbours = 1 + pattern.look_back + pattern.look_ahead
    return kernels.cost(
        kernel, **sizes.shape(), element_size=element_size, neighbours=neighbours,
        correct_duplicates=pattern.correct_duplicates, config=config,
    )  # fmt: skip


def example(
    kernel: str, sizes: Sizes, dtype: torch.dtype, device_type: str, config: Config,
    flags: Mapping[str, Flag] | None = None,
) -> Launch:  # fmt: skip
    """The launch of the first round that other rounds came before, or the only one, without memory."""
    pattern = _pattern(flags)
    lead, index = (sizes.batch, sizes.heads, sizes.length), (sizes.rounds, sizes.n_blocks, sizes.cluster_size)
    x, y = meta(*lead, sizes.head_dim, dtype=dtype), meta(*lead, sizes.value_dim, dtype=dtype)
    row, rows = meta(*lead), meta(*lead[:2], *index, dtype=torch.int32)
    dx, dy = (meta(*lead, dim) for dim in (sizes.head_dim, sizes.value_dim))
    tensors = {"q": x, "k": x, "v": y, "q_index": rows, "k_index": rows, "lse": row, "out": dy, "dout": y}
    tensors |= {
        "delta": row,
        "dq": dx,
        "dk": dx,
        "dv": dy,
        "own_mask": meta(sizes.batch, sizes.length, dtype=torch.bool),
    }
    found = [launch for launch in _launches(kernel, tensors, pattern, 1.0, config) if launch.config is config]
    return found[min(1, len(found) - 1)]


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Any, names: Sequence[str], *, plain: bool = False
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names`` and its flags, the plain ones first, or alone.

    reference: ``fastattn.reference.block_attention``, the definition that candidates are held against. It is an
    argument since the tuner stands below it. Where queries leave their own key to a kernel of its own, that one's time
    is in the kernel's.
    """
    given = _inputs(sizes, dtype, device)
    for options in flags(names[0])[: 1 if plain else None]:
        yield from _problems_of(given, sizes, dtype, device, reference.block_attention, names, _pattern(options))


def _problems_of(
    given: Tensors, sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Callable[..., Tensors],
    names: Sequence[str], pattern: kernels.Pattern,
) -> Iterator[Problem]:  # fmt: skip
    q, k, v, dout, q_index, k_index = given
    scale = 1 / math.sqrt(sizes.head_dim)
    inputs = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    if pattern.own_key:
        inputs["own_mask"] = torch.ones(sizes.batch, sizes.length, dtype=torch.bool, device=device)
    options = {"scale": scale, "is_causal": pattern.is_causal, "look_back": pattern.look_back}
    options["self_mode"] = "last_resort" if pattern.last_resort else "once" if pattern.once else "attend"
    backward = any("backward" in name for name in names)
    rows = (q_index, k_index)
    exact = _solve(reference, [x.double() for x in (q, k, v, dout)], rows, options, backward=backward)
    plain = _solve(reference, [q, k, v, dout], rows, options, backward=backward)
    fp32 = {"dtype": torch.float32, "device": device}
    for name in names:
        if name == "block_attention_forward":
            state_dtype = torch.float32 if sizes.rounds > 1 or pattern.own_key else dtype
            tensors = inputs | {"out": torch.empty(exact["out"].shape, dtype=state_dtype, device=device)}
            tensors |= {"lse": torch.empty(exact["lse"].shape, **fp32)}
            written = ("out", "lse")
        else:
            written = ("dq",) if name == "block_attention_backward_dq" else ("dk", "dv")
            out, lse = exact["out"], exact["lse"].float()
            if pattern.last_resort:  # the lowest bit says where an own key was the last resort
                _, lse = kernels.forward(q, k, v, *rows, **options)
            tensors = {"dout": dout} | inputs | {"lse": lse, "delta": (dout.double() * out).sum(-1).float()}
            tensors |= {x: torch.empty(exact[x].shape, **fp32) for x in ("dq", "dk", "dv")}

        def launches(config: Config, tensors: Mapping[str, Tensor], name: str = name) -> Iterable[Launch]:
            return _launches(name, tensors, pattern, scale, config)

        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype,
            shape=sizes.shape(),
            flags=dict(vars(pattern)),
            sizes=dict(vars(sizes)),
            candidates=candidates(name, device_kind(device), sizes, dtype.itemsize, vars(pattern)),
            run=launcher(tensors, launches),
            outputs=tuple(tensors[x] for x in written),
            expected=tuple(exact[x] for x in written),
            plain=tuple(plain[x] for x in written),
        )


def _launches(
    kernel: str, tensors: Mapping[str, Tensor], pattern: kernels.Pattern, scale: float, config: Config
) -> Iterator[Launch]:
    """Those of ``kernel`` and, where own keys are apart, of theirs, which begins a backward and ends a forward."""
    order = [kernel]
    if pattern.own_key:
        order = [kernel, "block_attention_own_key_forward"]
        if kernel != "block_attention_forward":
            order = ["block_attention_own_key_backward", kernel]
    begins = {"out_ptr": 0.0, "lse_ptr": -math.inf} if order[0] == "block_attention_forward" else {}
    if "backward" in kernel:
        begins = {"dq_ptr": 0.0, "dk_ptr": 0.0, "dv_ptr": 0.0}
    for name in order:
        for launch in kernels.launches_of(name, tensors, pattern, scale, {kernel: config}):
            begun = [argument for argument in begins if launch.args.get(argument) is not None]
            yield replace(launch, fill={argument: begins.pop(argument) for argument in begun})


def _pattern(flags: Mapping[str, Flag] | None) -> kernels.Pattern:
    return PATTERN if flags is None else kernels.Pattern(**flags)  # pyright: ignore[reportArgumentType]


def launches_ahead(
    dtype: torch.dtype, head_dim: int, cluster_size: int, *, every_pattern: bool = False
) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all that calls on the CPU run, for who wants it built before: on tensors without memory.

    Tiles are those of the kernels' heuristic, and the tuned ones where there are some. every_pattern: also what causal
    SMYRF and Reformer run, and all of these with corrected duplicates and a local round of blocks as large.
    """
    sizes = Sizes(length=max(4096, cluster_size), cluster_size=cluster_size, head_dim=head_dim, value_dim=head_dim)
    patterns = _patterns_of_methods() if every_pattern else [PATTERN]
    for kernel, pattern in product(kernels.TUNING, patterns):
        block = (cluster_size, cluster_size, head_dim, dtype.itemsize)
        first = kernels.heuristic(kernel, "cpu", *block, pattern)
        tuned = lookup(kernel, torch.device("cpu"), dtype, sizes.shape(), vars(pattern))
        rounds = {"first round": {"first": True}, "later rounds": {"first": False}}
        if pattern.own_key and kernel != "block_attention_forward":
            rounds = {"every round": {"first": False}}
        if every_pattern:
            rounds["local round"] = {"local": True}
        for config in dict.fromkeys([first] if tuned is None else [first, tuned]):
            tile = " x ".join(str(size) for size in config.blocks.values())
            for name, which in rounds.items():
                launch = kernels.example_launch(
                    kernel, dtype, head_dim=head_dim, c_q=cluster_size, c_k=cluster_size, device_type="cpu",
                    pattern=pattern, config=config, **which,
                )  # fmt: skip
                yield f"{kernel}, tile {tile}, {name}{_flags(pattern)}", launch
    own_key = dict.fromkeys(replace(kernels.Pattern(), last_resort=p.last_resort, once=p.once) for p in patterns)
    for kernel, pattern in product([name for name in kernels.KERNELS if name not in kernels.TUNING], own_key):
        if pattern.own_key:
            launch = kernels.example_launch(kernel, dtype, head_dim=head_dim, device_type="cpu", pattern=pattern)
            yield f"{kernel}{_flags(pattern)}", launch


def _patterns_of_methods() -> list[kernels.Pattern]:
    """Plain SMYRF and a causal one; Reformer, causal or not, whose looking back is no build of its own. With duplicates
    counted as they come, and once."""
    reformer = kernels.Pattern(exclude_self=True, last_resort=True)
    patterns = [PATTERN, kernels.Pattern(is_causal=True, exclude_self=True, once=True), reformer]
    patterns.append(replace(reformer, is_causal=True))
    return [replace(pattern, correct_duplicates=corrected) for corrected in (False, True) for pattern in patterns]


def _flags(pattern: kernels.Pattern) -> str:
    """In words, what is not as in plain SMYRF."""
    return "".join(f", {name}" for name, value in vars(pattern).items() if value is True and name != "wrap")


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def rows_of(dim: int) -> Tensor:
        return draw((sizes.batch, sizes.heads, sizes.length, dim), generator, device, dtype)

    def partition() -> Tensor:
        lead = (sizes.batch, sizes.heads, sizes.rounds)
        rows = torch.rand(*lead, sizes.length, generator=generator).argsort(-1).int()
        padded = torch.full((*lead, sizes.n_blocks * sizes.cluster_size), -1, dtype=torch.int32)
        padded[..., : sizes.length] = rows
        return padded.unflatten(-1, (sizes.n_blocks, sizes.cluster_size)).to(device)

    q, k = rows_of(sizes.head_dim), rows_of(sizes.head_dim)
    return q, k, rows_of(sizes.value_dim), rows_of(sizes.value_dim), partition(), partition()


def _solve(
    reference: Callable[..., Tensors], tensors: list[Tensor], rows: Tensors, options: Mapping[str, Any], *,
    backward: bool,
) -> dict[str, Tensor]:  # fmt: skip
    q, k, v, dout = tensors
    if not backward:
        out, lse = reference(q, k, v, *rows, **options)
        return {"out": out, "lse": lse}
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, *rows, **options)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
