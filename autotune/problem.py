"""What is tuned: one kernel on one input, with what its results should be; and what all rooms share in making one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.key import Flag
from fastattn.kernels.config import Config, Cost, TuningSpace, next_power_of_2
from fastattn.kernels.launch import Launch, run_planned

Tensors = tuple[Tensor, ...]
# Thread-block clusters came with sm_90.
_FIRST_WITH_CLUSTERS = 90


@dataclass(frozen=True)
class Problem:
    """One kernel on one input.

    candidates: what may be tried, the likeliest first; the first is what runs when nothing is tuned.
    run: the kernel's launches; on a GPU they are still at work when it returns (:func:`wait`). outputs: what they
    write, every element of it. results: what of that is compared; None is all of ``outputs``.
    expected: what the results should be, in float64. plain: the same in ``dtype`` by plain torch operations, whose
    error says how exact the dtype lets anyone be. sizes: for the record. shape, flags: as
    :func:`fastattn.autotune.choice.lookup` gets them, dtype too, which is that of integers for a kernel that only has
    these.
    """

    kernel: str
    device: torch.device
    dtype: torch.dtype
    shape: dict[str, int]
    flags: dict[str, Flag]
    sizes: dict[str, int]
    candidates: list[Config]
    run: Callable[[Config], object]
    outputs: Tensors
    expected: Tensors
    plain: Tensors
    results: Callable[[], Tensors] | None = None

    def spoil(self) -> None:
        """Fills the outputs with what no kernel writes: or a candidate that writes nothing would show what the last one
        wrote."""
        for output in self.outputs:
            output.fill_(math.nan if output.is_floating_point() else torch.iinfo(output.dtype).min)

    def deviation(self) -> tuple[float, float]:
        """(error, tolerance) of the result that uses most of its tolerance."""
        pairs = []
        results = self.outputs if self.results is None else self.results()
        eps = torch.finfo(self.dtype).eps if self.dtype.is_floating_point else 0.0
        for got, plain, truth in zip(results, self.plain, self.expected, strict=True):
            # plain torch in the same dtype may be as wrong once; sums in another order, a little more
            pairs.append((deviation(got, truth), 2 * deviation(plain, truth) + 8 * eps))
        return max(pairs, key=lambda pair: (pair[0] > pair[1], pair[0] / max(pair[1], 1e-30)))


def deviation(got: Tensor, truth: Tensor) -> float:
    """Largest difference as a share of the largest finite value of ``truth``; inf where one has a NaN or an infinity
    that the other has not."""
    got = got.double()
    difference = torch.where(got == truth, 0.0, (got - truth).abs())  # equal infinities differ by nothing
    if not torch.isfinite(difference).all():
        return math.inf
    scale = truth[torch.isfinite(truth)].abs().max().item() if torch.isfinite(truth).any() else 0.0
    return difference.max().item() / max(scale, 1e-30)


def agreement(got: Tensor, expected: Tensor, is_open: Tensor | None = None) -> Tensor:
    """1.0 where integers are what they should be, or where rounding decides what they are (is_open): what is compared,
    with ones, in place of numbers that are equal or wrong."""
    same = got == expected
    return (same if is_open is None else same | is_open).double()


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def launcher(
    tensors: Mapping[str, Tensor] | Callable[[Config], Mapping[str, Tensor]],
    launches: Callable[[Config, Mapping[str, Tensor]], Iterable[Launch]],
) -> Callable[[Config], None]:
    """``run`` of a :class:`Problem`: ``launches(config, tensors)``, made once for a configuration as the ops keep them.

    tensors: all of the launches' by name, or what gives them for a configuration.
    """
    problem = object()  # keeps apart the plans of problems with tensors of one layout
    kept: dict[Config, tuple[Mapping[str, Tensor], list[Launch]]] = {}

    def run(config: Config) -> None:
        if config not in kept:
            given = tensors(config) if callable(tensors) else tensors
            kept[config] = given, list(launches(config, given))
        given, made = kept[config]
        run_planned((problem, config), given, lambda: made)

    return run


def candidates_of(
    space: TuningSpace, first: Config, device_type: str, most: Mapping[str, int], fixed: Mapping[str, int] | None = None
) -> list[Config]:
    """``first``, then the rest of the space by how many doublings it is away from that.

    device_type: as :func:`fastattn.kernels.launch.device_kind` says it. most: by block name, what a tile is to cover;
    tiles above the next power of two, or above 16, do nothing but masked work, and are left out. fixed: blocks that
    have no choice.
    """
    if device_type == "cpu":
        first = Config(first.blocks)  # it has no warps and stages
    largest = {name: max(16, next_power_of_2(size)) for name, size in most.items()}
    found = []
    for config in _space(space, device_type):
        blocks = config.blocks
        if all(blocks[name] <= limit for name, limit in largest.items() if name in blocks) and all(
            blocks[name] == size for name, size in (fixed or {}).items()
        ):
            found.append(config)
    rest = sorted(set(found) - {first}, key=lambda config: (doublings(first, config), *_order(config)))
    return [first, *rest]


def one_scatter(candidates: list[Config], device_type: str) -> list[Config]:
    """``candidates`` of a kernel that can go row by row (``SCATTER``), with one that does so on a CPU, which alone has
    memory of its own for that, and none elsewhere: no tile has an effect there."""
    row_by_row = candidates[0].blocks | {"SCATTER": 1}
    return [
        config for config in candidates
        if not config.blocks.get("SCATTER") or (device_type == "cpu" and config.blocks == row_by_row)
    ]  # fmt: skip


def _space(space: TuningSpace, device_type: str) -> Iterator[Config]:
    yield from space.configs(device_type)
    has_clusters = device_type.startswith("cuda:") and int(device_type.removeprefix("cuda:")) >= _FIRST_WITH_CLUSTERS
    # two blocks may share the tiles of a product; what only moves rows has nothing to share
    if has_clusters and len(space.blocks) > 1 and max(space.num_warps) > 4:
        for config in space.configs(device_type):
            yield Config(config.blocks, config.num_warps, config.num_stages, 2)


def _order(config: Config) -> tuple[Any, ...]:
    return sorted(config.blocks.items()), config.num_warps, config.num_stages, config.num_ctas


def doublings(a: Config, b: Config) -> float:
    """How far two configurations are apart: the logarithms of their numbers' ratios, added up; on and off are 1."""
    pairs = [(a.blocks[name], b.blocks[name]) for name in a.blocks]
    pairs += [(a.num_warps, b.num_warps), (a.num_stages, b.num_stages), (a.num_ctas, b.num_ctas)]
    return sum(abs(math.log2(x / y)) if x and y else float(x != y) for x, y in pairs)


class AtLeastOne:
    """What a room's Sizes, a dataclass, stands on: every field is at least 1, or ValueError names it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


def cost_of(kernels: ModuleType) -> Callable[..., Cost]:
    """A room's ``cost``, where its Sizes have the names and no flag changes the work."""

    def cost(
        kernel: str, sizes: AtLeastOne, element_size: int = 4, config: Config | None = None,
        flags: Mapping[str, Flag] | None = None,
    ) -> Cost:  # fmt: skip
        return kernels.cost(kernel, **vars(sizes), element_size=element_size, config=config)

    return cost


def draw(shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal, the same numbers on every device."""
    return torch.randn(shape, generator=generator).to(device, dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory, for launches that are only compiled."""
    return torch.empty(shape, dtype=dtype, device="meta")


def by_head(function: Callable[..., Tensors], *tensors: Tensor) -> Tensors:
    """``function`` of tensors (B, H, ...), head by head: definitions take much memory."""
    batch, heads = tensors[0].shape[:2]
    parts = [
        function(*(x[b : b + 1, h : h + 1] for x in tensors)) for b in range(batch) for h in range(heads)
    ]  # fmt: skip
    return tuple(torch.cat(each).unflatten(0, (batch, heads)).squeeze(2) for each in zip(*parts, strict=True))
