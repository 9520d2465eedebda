"""Which candidates of a kernel are worth a compile, for GPUs that are not here; and the rows that come of it.

For a kernel on an architecture in a dtype and a head dim: candidates pass the gates (:mod:`fastattn.autotune.bounds`),
are ranked by the model (:mod:`fastattn.autotune.model`), and the most promising ones are compiled, a dozen at most, for
all devices of the architecture together; once a few are of use, only what may still be faster than these. Binaries that
spill or take too much shared memory are rejected; the rest is ranked again, with the occupancy that their registers
allow. Which are compiled depends on nothing but the kernel and the devices: not on the number of workers, nor on where
an earlier run was killed.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from fastattn.autotune.binaries import Binaries, Figures, Job, recipe_of
from fastattn.autotune.bounds import Tiles, gate, refusal, register_bound, shared_bound
from fastattn.autotune.devices import Device
from fastattn.autotune.key import Key, key_for
from fastattn.autotune.model import Modelled, modelled_time
from fastattn.autotune.rooms import key_dtype, room_of
from fastattn.autotune.schema import FAILED, MODELLED, OK, ConfigFields, Entry, Row
from fastattn.kernels.config import Config

MOST_COMPILES = 12  # for a kernel, architecture, dtype and head dim
_SHORTLIST = 24  # candidates whose IR is looked at, of those that the model likes most
_FLAT, _FLAT_AFTER = 1.02, 4  # a kernel whose first four binaries are as close as that hardly depends on its tiles
_ENOUGH = 3  # binaries of use, after which only what the model expects to be faster than the best of them is compiled
_OVERHEAD = 48  # registers of addresses, counters and masks, as our kernels have them
_UNROLLED = 4  # multiply-adds of a product for each register of a thread, where no tensor core does it
_WITHOUT_TENSOR_CORES = "sm_75"  # which Triton does not use there


@dataclass(frozen=True)
class Case:
    """Calls that share a row of the cache: a room's ``Sizes``, and flags."""

    sizes: Any
    flags: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """What shares compiles. devices: of one architecture. dtype: torch's name. cases: those of the plainest flags
    first, and of equal flags together."""

    kernel: str
    dtype: str
    head_dim: int
    devices: tuple[Device, ...]
    cases: tuple[Case, ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype} {self.head_dim} on {self.devices[0].arch}"

    def candidates(self, case: Case) -> list[Config]:
        size = getattr(torch, self.dtype).itemsize
        return room_of(self.kernel).candidates(self.kernel, self.devices[0].target, case.sizes, size, case.flags)

    def most_compiles(self, limit: int) -> int:
        """How many a search may take, of ``limit``."""
        return min(
            limit, len({config for case in self.cases for config in self.candidates(case)}) * len(self.flags_in_order())
        )

    def flags_in_order(self) -> list[tuple[Any, ...]]:
        return list(dict.fromkeys(tuple(case.flags.items()) for case in self.cases))

    def job(self, case: Case, config: Config) -> Job:
        return Job(self.kernel, self.devices[0].target, self.dtype, case.sizes, case.flags, config)

    def key(self, case: Case, device: Device) -> Key:
        """Where the rows of a case stand."""
        dtype = key_dtype(self.kernel, getattr(torch, self.dtype))
        return key_for(self.kernel, device.device_name(), dtype, case.sizes.shape(self.kernel), case.flags)


@dataclass(frozen=True)
class Report:
    """What came of a group. entries: rows for each device and case. compiled: binaries that were made now. rejected: of
    all its binaries, those that are of no use, or that could not be made."""

    group: Group
    entries: list[Entry]
    compiled: int
    rejected: int


class Search:
    """The compiles of one group, one at a time: :meth:`next` names one, :meth:`tell` says what came of it."""

    def __init__(self, group: Group, binaries: Binaries, compiles: int = MOST_COMPILES) -> None:
        self.group = group
        self.binaries = binaries
        self.compiles = compiles
        self.compiled = 0
        self._known: dict[str, Figures] = {}  # by recipe
        self._tried: dict[Config, Figures] = {}  # what is known of a configuration, whatever the case
        self._refused: dict[int, int] = {}  # candidates by the number of the case
        self._guesses: dict[tuple[int, Config], Figures] = {}  # of those that are only ranked, for the case of a number
        self._recipes: dict[tuple[int, Config], str] = {}
        self._programs: dict[tuple[int, Config], int] = {}
        self.asked: tuple[Job, str] | None = None  # the last of :meth:`next`, with its recipe
        self._steps = self._search()

    def next(self) -> Job | None:
        """What is to be compiled next; None where the group is done."""
        return next(self._steps, None)

    def tell(self, figures: Figures | None, reason: str | None, seconds: float) -> None:
        """figures: of the last :meth:`next`; None for ``reason``."""
        assert self.asked is not None
        job, recipe = self.asked
        found = Figures(job.target, reason=reason) if figures is None else figures
        found = replace(found, seconds=round(seconds, 2))
        self.binaries.add(job, recipe, found)
        self._known[recipe] = found
        self.compiled += 1

    def look(self) -> None:
        """In place of :meth:`tell`, where another search was told of the same binary."""
        assert self.asked is not None
        job, recipe = self.asked
        found = self.binaries.figures(job, recipe)
        assert found is not None
        self._known[recipe] = found

    def report(self) -> Report:
        entries = []
        for number, case in enumerate(self.group.cases):
            for device in self.group.devices:
                if rows := self._rows(number, device):
                    entries.append(Entry(key=self.group.key(case, device), rows=rows))
        rejected = sum(self._rejected(figures) for figures in self._known.values())
        return Report(self.group, entries, self.compiled, rejected)

    def _search(self) -> Generator[Job]:
        left = self._shares()
        leader: Config | None = None
        for number, case in enumerate(self.group.cases):
            flags = tuple(case.flags.items())
            later = any(other.flags == case.flags for other in self.group.cases[number + 1 :])
            kept = left[flags] // 3 if later else 0  # most binaries serve the other sizes too
            times: list[float] = []  # on the first device
            found: list[tuple[Config, Figures]] = []
            for config in self._order(number, leader) if left[flags] > kept else ():
                if self._is_hopeless(config) or (len(found) >= _ENOUGH and not self._may_win(number, config, found)):
                    continue
                recipe = self._recipe(number, config)
                if recipe not in self._known:
                    left[flags] -= 1
                    job = self.group.job(case, config)
                    known = self.binaries.figures(job, recipe)
                    if known is None:
                        self.asked = job, recipe
                        yield job
                    else:
                        self._known[recipe] = known
                figures = self._tried[config] = self._known[recipe]
                if not self._rejected(figures):
                    found.append((config, figures))
                    times.append(self._time(number, self.group.devices[0], config, figures).time_us)
                if left[flags] <= kept or (len(times) == _FLAT_AFTER and max(times) <= _FLAT * min(times)):
                    break
            best = self._rows(number, self.group.devices[0])[:1]
            leader = next((row.launch_config() for row in best if row.verdict == OK), leader)

    def _shares(self) -> dict[tuple[Any, ...], int]:
        """Compiles by flags: the plainest get what others leave, which have its best to begin with."""
        flags = self.group.flags_in_order()
        each = max(1, self.compiles // 6)
        left = self.compiles - max(1, self.compiles - each * (len(flags) - 1))
        shares = {flags[0]: self.compiles - left}
        for other in flags[1:]:
            shares[other] = min(each, left)
            left -= shares[other]
        return shares

    def _order(self, number: int, leader: Config | None) -> Iterator[Config]:
        """The heuristic's choice, what was best in the case before, then as the model has them, for each device in
        turn."""
        case, devices = self.group.cases[number], self.group.devices
        found = self.group.candidates(case)
        first = [found[0], *([leader] if leader in found[1:] else [])]
        yield from first
        possible = [config for config in found if config not in first and gate(devices[0], config) is None]
        refused = len(found) - len(first) - len(possible)
        shortlist: dict[Config, Figures] = {}
        for config in self._by_model(number, possible, {}):
            tiles = self.binaries.tiles(self.group.job(case, config))
            if all(refusal(device, config, tiles) for device in devices):
                refused += 1
                continue
            shortlist[config] = self._guesses[number, config] = guess(devices[0], config, tiles)
            if sum(other.num_ctas == 1 for other in shortlist) == _SHORTLIST:  # clusters may all fail
                break
        self._refused[number] = refused
        yield from self._by_model(number, list(shortlist), shortlist)

    def _by_model(self, number: int, configs: Sequence[Config], guesses: Mapping[Config, Figures]) -> list[Config]:
        """Sorted by time; those that probably spill come last. Of equals, the likelier first."""

        def place(device: Device, config: Config) -> tuple[bool, float]:
            figures = guesses.get(config)
            return bool(figures and figures.spill_bytes), self._time(number, device, config, figures).time_us

        ranks = [sorted(configs, key=lambda config: place(device, config)) for device in self.group.devices]
        return list(dict.fromkeys(config for turn in zip(*ranks, strict=True) for config in turn))

    def _is_hopeless(self, config: Config) -> bool:
        """Whether a binary that was no good says that this one is none: one of smaller tiles, or of as many blocks in
        a cluster."""
        for tried, figures in self._tried.items():
            if not self._rejected(figures) or tried.num_ctas != config.num_ctas:
                continue
            if config.num_ctas > 1 and figures.reason is not None:
                return True  # the compiler does not split this kernel's products
            blocks = [_is_as_large(name, config.blocks[name], size) for name, size in tried.blocks.items()]
            if all(blocks) and tried.num_warps >= config.num_warps and tried.num_stages <= config.num_stages:
                return True
        return False

    def _may_win(self, number: int, config: Config, found: Sequence[tuple[Config, Figures]]) -> bool:
        """Whether ``config``, by what is guessed of its binary, is faster on a device than all of ``found``."""
        guessed = self._guesses.get((number, config))
        if guessed is None:
            return True  # a choice of the heuristic, or of another case
        if guessed.spill_bytes:
            return False
        return any(
            self._time(number, device, config, guessed).time_us
            < min(self._time(number, device, *other).time_us for other in found)
            for device in self.group.devices
        )

    def _rejected(self, figures: Figures) -> bool:
        """Whether a binary is of use on none of the devices."""
        return all(rejection(device, figures) for device in self.group.devices)

    def _recipe(self, number: int, config: Config) -> str:
        if (number, config) not in self._recipes:
            self._recipes[number, config] = recipe_of(self.group.job(self.group.cases[number], config))
        return self._recipes[number, config]

    def _time(self, number: int, device: Device, config: Config, figures: Figures | None) -> Modelled:
        group, case = self.group, self.group.cases[number]
        if (number, config) not in self._programs:
            self._programs[number, config] = math.prod(group.job(case, config).launch().grid)
        size = getattr(torch, group.dtype).itemsize
        cost = room_of(group.kernel).cost(group.kernel, case.sizes, size, config, case.flags)
        return modelled_time(device, cost, group.dtype, self._programs[number, config], config, figures)

    def _rows(self, number: int, device: Device) -> list[Row]:
        """A row for each binary that serves a case, the fastest first, those that were rejected last."""
        case = self.group.cases[number]
        candidates = set(self.group.candidates(case))
        configs = [config for config in self._tried if config in candidates]
        found = [(config, self._known.get(self._recipe(number, config))) for config in configs]
        counts = {"compiled": 0, "rejected": 0, "refused": self._refused.get(number, 0)}
        rows: list[dict[str, Any]] = []
        now = datetime.now(UTC).replace(microsecond=0)
        for config, figures in found:
            if figures is None:
                continue
            row: dict[str, Any] = {"config": ConfigFields(**config.to_dict()), "label": MODELLED, "written": now}
            row |= {"problem": dict(vars(case.sizes)), "terms": of_binary(figures)}
            reason = rejection(device, figures)
            if reason is None:
                modelled = self._time(number, device, config, figures)
                row["time_us"] = max(0.01, round(modelled.time_us, 2))
                row["terms"] |= {name: _short(value) for name, value in modelled.terms.items()}
            else:
                row |= {"verdict": FAILED, "reason": reason}
            counts["compiled"] += 1
            counts["rejected"] += reason is not None
            rows.append(row)
        made = [Row(**{**row, "terms": row["terms"] | counts}) for row in rows]
        return sorted(made, key=lambda row: (row.verdict != OK, row.time_us or 0.0))


def rejection(device: Device, figures: Figures) -> str | None:
    """Why ``device`` has no use for a binary; None where it has."""
    if figures.reason is not None:
        return figures.reason
    if figures.spill_bytes:
        return f"spills {figures.spill_bytes} bytes a thread"
    if figures.shared_bytes > device.shared_per_block:
        return f"takes {figures.shared_bytes} bytes of shared memory of {device.shared_per_block}"
    if (figures.registers or 0) * figures.num_warps * device.warp_size > device.registers_per_sm:
        return f"takes {figures.registers} registers a thread for {figures.num_warps} warps"
    return None


def guess(device: Device, config: Config, tiles: Tiles) -> Figures:
    """What a binary may be like, before there is one: what loops carry, the results of two products, and the rest."""
    threads = config.num_warps * device.warp_size * config.num_ctas
    most = max((m * n for m, n in tiles.products), default=0)
    registers = register_bound(device, config, tiles) + 2 * most // threads + _OVERHEAD
    if device.kind == "cuda":  # AMD's matrix cores take fp32 as it is
        unrolled = tiles.work if device.arch == _WITHOUT_TENSOR_CORES else tiles.exact
        registers += unrolled // threads // _UNROLLED
    fitting = min(registers, device.registers_per_thread)
    shared = min(shared_bound(device, config, tiles), device.shared_per_block)
    return Figures(device.target, fitting, 4 * (registers - fitting), shared, config.num_warps)


def of_binary(figures: Figures) -> dict[str, Any]:
    """What a row keeps of a binary."""
    if figures.reason is not None:
        return {}
    return {
        "registers": figures.registers, "spill_bytes": figures.spill_bytes, "shared_bytes": figures.shared_bytes,
        "instructions": figures.instructions.total(),
        "tensor_core_instructions": figures.tensor_core_instructions.total(),
    }  # fmt: skip


def _short(value: float | str) -> float | str:
    return value if isinstance(value, str) else float(f"{value:.4g}")


def _is_as_large(name: str, size: int, other: int) -> bool:
    """Of blocks; what is no size but a switch has to be the same."""
    return size >= other if name.startswith("BLOCK") else size == other
