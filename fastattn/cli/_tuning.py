"""Measured tuning of many kernels: which problems there are, and a share of the time for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fastattn.autotune import devices, rooms
from fastattn.autotune.device import describe
from fastattn.autotune.key import key_for
from fastattn.autotune.model import modelled_time
from fastattn.kernels.config import Config
from fastattn.kernels.launch import device_kind

if TYPE_CHECKING:
    from fastattn.autotune.problem import Problem


@dataclass(frozen=True)
class Group:
    """Problems that have their input in common: kernels of a room on one size. plain: only the first of a kernel's
    flags. keys: what their rows stand under."""

    room: ModuleType
    sizes: Any
    dtype: torch.dtype
    names: tuple[str, ...]
    plain: bool
    keys: tuple[str, ...] = field(hash=False)

    @property
    def name(self) -> str:
        return self.names[0]

    def problems(self, device: torch.device) -> Iterator[Problem]:
        with torch.inference_mode(False):
            reference = definitions(self.room)
            yield from self.room.problems(self.sizes, self.dtype, device, reference, self.names, plain=self.plain)

    def predictor(self, problem: Problem) -> Callable[[Config], float] | None:
        """The time model's microseconds for a candidate of ``problem``; None where the device is unknown to it."""
        try:
            device = devices.at_hand(problem.device)
        except ValueError:
            return None
        kind, dtype = device_kind(problem.device), str(self.dtype).removeprefix("torch.")

        def predict(config: Config) -> float:
            launch = self.room.example(problem.kernel, self.sizes, self.dtype, kind, config, problem.flags)
            cost = self.room.cost(problem.kernel, self.sizes, self.dtype.itemsize, config, problem.flags)
            return modelled_time(device, cost, dtype, math.prod(launch.grid), config).time_us

        return predict


def definitions(room: ModuleType) -> SimpleNamespace:
    """What a room's ``problems`` takes as ``reference``."""
    modules = [import_module(f"fastattn.reference.{name}") for name in room.REFERENCE]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def names_of(kernel: str) -> list[str]:
    """The kernels that an option names: ``"all"``, a name or its start, or several with commas between them."""
    starts = [start.strip() for start in kernel.split(",")]
    return list(dict.fromkeys(name for start in starts for name in rooms.kernel_names(start)))


def groups(
    names: Sequence[str], dtypes: Sequence[torch.dtype], head_dims: Sequence[int], device: torch.device,
    given: Mapping[str, Sequence[int]], *, plain: bool = False, one_by_one: bool = False,
) -> list[Group]:  # fmt: skip
    """All that is to be tuned; what has the same key as something before is left out.

    plain: only the first of a kernel's flags. one_by_one: each kernel apart, for several workers. given: values by the
    name of a size, in place of those of a room's representative sizes. Raises ValueError for sizes that make no sense.
    """
    found, seen = [], set()
    by_room: dict[ModuleType, list[str]] = {}
    for name in names:
        by_room.setdefault(rooms.room_of(name), []).append(name)
    for room, own in by_room.items():
        for dtype in dtypes:
            for sizes in (sizes for dim in head_dims for sizes in sizes_of(room, dim, given)):
                keys = {name: _keys(room, name, sizes, dtype, device, plain) for name in own}
                new = [name for name in own if not seen.issuperset(keys[name])]
                seen.update(key for name in new for key in keys[name])
                for together in [[name] for name in new] if one_by_one or not new else [new]:
                    new_keys = tuple(key for name in together for key in keys[name])
                    found.append(Group(room, sizes, dtype, tuple(together), plain, new_keys))
    return found


def sizes_of(room: ModuleType, head_dim: int, given: Mapping[str, Sequence[int]]) -> list[Any]:
    """The representative sizes of a room with the values that are given, each once."""
    found = room.representative(head_dim)
    for name, values in given.items():
        if any(field.name == name for field in fields(room.Sizes)):
            found = [replace(sizes, **{name: value}) for sizes in found for value in values]
    return list(dict.fromkeys(found))


def _keys(
    room: ModuleType, kernel: str, sizes: Any, dtype: torch.dtype, device: torch.device, plain: bool
) -> list[str]:
    name, shape = describe(device), sizes.shape(kernel)
    dtype = rooms.key_dtype(kernel, dtype)
    return [
        key_for(kernel, name, dtype, shape, flags).identity() for flags in room.flags(kernel)[: 1 if plain else None]
    ]
