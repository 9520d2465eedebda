"""How block attention is tuned: the input that it is run on, and its candidates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup
from fastattn.autotune.tune import Problem, Tensors
from fastattn.kernels import block_attention as kernels
from fastattn.kernels.config import Config, TuningSpace
from fastattn.kernels.launch import Launch, device_kind, run

PATTERN = kernels.Pattern()  # SMYRF's: each block meets its own block of keys
# (q, k, v, q_index, k_index, *, scale) -> (out, lse), differentiable, in the inputs' dtype
Reference = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sizes:
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

    def shape(self) -> dict[str, int]:
        """As the op names the sizes of a call when it looks a configuration up."""
        return {
            "batch": self.batch, "heads": self.heads, "rounds": self.rounds, "n_blocks": self.n_blocks,
            "c_q": self.cluster_size, "c_k": self.cluster_size,
            "head_dim": self.head_dim, "value_dim": self.value_dim,
        }  # fmt: skip

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.cluster_size > self.length:
            raise ValueError(f"cluster_size must not be above length {self.length}, got {self.cluster_size}")


def kernel_names(start: str = "") -> list[str]:
    """The kernels of block attention whose names start so. Raises ValueError where there is none."""
    names = [name for name in kernels.TUNING if name.startswith(start)]
    if not names:
        raise ValueError(f"kernel must be one of {', '.join(kernels.TUNING)}, or how some of them begin, got {start!r}")
    return names


def problems(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, reference: Reference, names: Sequence[str]
) -> Iterator[Problem]:
    """One problem for each of the kernels ``names``.

    reference: the definition that candidates are held against. It is an argument since the tuner stands below it.
    """
    q, k, v, dout, q_index, k_index = _inputs(sizes, dtype, device)
    scale = 1 / math.sqrt(sizes.head_dim)
    inputs = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    backward = any("backward" in name for name in names)
    exact = _solve(reference, [x.double() for x in (q, k, v, dout)], q_index, k_index, scale, backward=backward)
    plain = _solve(reference, [q, k, v, dout], q_index, k_index, scale, backward=backward)
    out, lse = exact["out"], exact["lse"]
    delta = (dout.double() * out).sum(-1).float()
    for name in names:
        fp32 = {"dtype": torch.float32, "device": device}
        if name == "block_attention_forward":
            state_dtype = torch.float32 if sizes.rounds > 1 else dtype
            tensors = inputs | {"out": torch.zeros(out.shape, dtype=state_dtype, device=device)}
            tensors |= {"lse": torch.full(lse.shape, float("-inf"), **fp32)}
            written = ("out", "lse")
        else:
            written = ("dq",) if name == "block_attention_backward_dq" else ("dk", "dv")
            tensors = {"dout": dout} | inputs | {"lse": lse.float(), "delta": delta}
            tensors |= {x: torch.zeros(exact[x].shape, **fp32) for x in written}
        launch = _launcher(name, tensors, scale, device)
        yield Problem(
            kernel=name,
            device=device,
            dtype=dtype,
            shape=sizes.shape(),
            flags=vars(PATTERN),
            sizes=dict(vars(sizes)),
            candidates=candidates(name, device_kind(device), sizes, dtype.itemsize),
            run=launch,
            outputs=tuple(tensors[x] for x in written),
            expected=tuple(exact[x] for x in written),
            plain=tuple(plain[x] for x in written),
        )


def candidates(kernel: str, device_type: str, sizes: Sizes, element_size: int = 4) -> list[Config]:
    """The heuristic's choice, then the rest of the space by how many doublings it is away from that.

    Tiles that are larger than a block rounded up to a power of two do nothing but masked work, and are left out.
    """
    size = sizes.cluster_size
    first = kernels.heuristic(kernel, device_type, size, size, sizes.head_dim, element_size)
    if device_type == "cpu":
        first = Config(first.blocks)  # it has no warps and stages
    largest = max(16, 1 << (size - 1).bit_length())
    space: TuningSpace = kernels.TUNING[kernel]
    fitting = [c for c in space.configs(device_type) if max(c.blocks.values()) <= largest and c != first]
    return [first, *sorted(fitting, key=lambda config: (_doublings(first, config), sorted(config.blocks.items())))]


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


def _doublings(a: Config, b: Config) -> float:
    pairs = [(a.blocks[name], b.blocks[name]) for name in a.blocks]
    pairs += [(a.num_warps, b.num_warps), (a.num_stages, b.num_stages), (a.num_ctas, b.num_ctas)]
    return sum(abs(math.log2(x / y)) for x, y in pairs)


def _inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def draw(dim: int) -> Tensor:
        x = torch.randn(sizes.batch, sizes.heads, sizes.length, dim, generator=generator)
        return x.to(device, dtype)

    def partition() -> Tensor:
        lead = (sizes.batch, sizes.heads, sizes.rounds)
        rows = torch.rand(*lead, sizes.length, generator=generator).argsort(-1).int()
        padded = torch.full((*lead, sizes.n_blocks * sizes.cluster_size), -1, dtype=torch.int32)
        padded[..., : sizes.length] = rows
        return padded.unflatten(-1, (sizes.n_blocks, sizes.cluster_size)).to(device)

    q, k = draw(sizes.head_dim), draw(sizes.head_dim)
    return q, k, draw(sizes.value_dim), draw(sizes.value_dim), partition(), partition()


def _solve(
    reference: Reference, tensors: list[Tensor], q_index: Tensor, k_index: Tensor, scale: float, *, backward: bool
) -> dict[str, Tensor]:
    q, k, v, dout = tensors
    if not backward:
        out, lse = reference(q, k, v, q_index, k_index, scale=scale)
        return {"out": out, "lse": lse}
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, q_index, k_index, scale=scale)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def _launcher(kernel: str, tensors: dict[str, Tensor], scale: float, device: torch.device) -> Callable[[Config], Any]:
    def launch(config: Config) -> None:
        run(kernels.launches_of(kernel, tensors, PATTERN, scale, {kernel: config}))
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    return launch
