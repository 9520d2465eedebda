"""How long a kernel takes with a configuration, by arithmetic: a roofline with what tiles add to it.

A launch has ``programs`` programs, of which ``b`` run on a multiprocessor at once (:mod:`fastattn.autotune.occupancy`).
So it goes in waves of ``b`` on each of ``sms``, and the last one may have fewer. The work of a program keeps units of
its multiprocessor busy, each for a *term* of its own (:class:`~fastattn.kernels.config.Cost` says what is counted):

    products    tile_flops / rate of the dtype's products, or a share of it where tiles are too small for their warps
    operands    what products read / bandwidth of shared memory, or on a CPU of its first cache
    exps        tile_exps / rate
    pointwise   other operations on elements of tiles / rate
    memory      bytes / bandwidth
    cache       what all programs load / bandwidth of the cache that they share
    spills      what each step stores and loads again for want of registers, or on a CPU of its first cache / bandwidth
                of what is next

and it waits: at its start (``program_us``), in each step of its loop (``step_us``) for tiles that were asked for as
many steps ago as there are stages, and there too for the other blocks of its cluster, where it is spread over several.
The programs of a multiprocessor work one after the other and wait at the same time:

    busy   = each term of one program * the programs of its multiprocessor (of memory and cache: of all)
    waits  = program_us + steps of one program * (step_us / stages + cluster_us)
    wave   = longest of these + (their sum - longest) / w

If all of it overlapped, a wave would take as long as its longest term, and if nothing did, as long as the sum. What
overlaps is the work of different warps: of ``w`` warps for each scheduler of a multiprocessor, ``1 / w`` of what stands
beside the longest term is still to be seen. A core of a CPU has one program at a time, whose terms add up. In all,

    time   = launches * (launch_us + full waves * wave(b * sms) + wave(programs that are left for the last one))

The model is for ranking the configurations of one kernel: a factor that they share does not matter to it. Every term is
kept, in microseconds of the whole device and all launches, as if programs could be divided evenly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from fastattn.autotune.devices import Device
from fastattn.autotune.occupancy import Occupancy, occupancy
from fastattn.kernels.config import Config, Cost, cdiv

_SHARED = ("memory", "cache")  # by all multiprocessors
_OPERAND_BYTES = {"int8": 1, "float16": 2, "bfloat16": 2}  # of the others: 4
# Results of a product that keep the tensor cores of one warp at work: two instructions' side by side.
_RESULTS_OF_WARP = 256
# From sm_90 on the full rate is that of instructions of four warps, which take 64 rows. The older ones reach 62 % of it
# on an H100 (Luo et al. 2024, "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture").
_GROUP_ROWS, _WITHOUT_GROUPS = 64, 0.62
_OF_GROUPS = ("HGMMA", "IGMMA", "UTC")
# Two meetings of a cluster's blocks, and a tile out of another one's shared memory, by order of magnitude: a GPU may
# show that clusters are worth more than this lets them be.
_CLUSTER_US = 0.5


class Binary(Protocol):
    """What the model asks of a compiled kernel: :class:`fastattn.kernels.ahead.Compiled` is one."""

    @property
    def registers(self) -> int | None: ...
    @property
    def spill_bytes(self) -> int | None: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def instructions(self) -> Mapping[str, int]: ...
    @property
    def tensor_core_instructions(self) -> Mapping[str, int]: ...


@dataclass(frozen=True)
class Modelled:
    """time_us: of all launches; infinite for a binary that the device cannot run. terms: by name, and with them
    launch, the launches' own microseconds; waves, of one launch; blocks_per_sm and limit, of occupancy; tail, the time
    of a launch over that of its share of full waves."""

    time_us: float
    terms: Mapping[str, float | str] = field(hash=False)


def modelled_time(
    device: Device, cost: Cost, dtype: str, programs: int, config: Config, binary: Binary | None = None
) -> Modelled:
    """The time of a kernel's launches on ``device``.

    cost: of the kernel with ``config``. dtype: of its inputs, ``"float16"``. programs: of one launch. binary: what the
    compiler made of it; without one, registers and shared memory are taken to allow what threads do, and nothing to
    spill. Raises ValueError where cost was made without a configuration.
    """
    if cost.steps <= 0:
        raise ValueError("cost must be that of a configuration: it has no steps")
    if programs < 1:
        raise ValueError(f"programs must be at least 1, got {programs}")
    on_gpu, held = device.kind != "cpu", Occupancy(1, "blocks", 1.0)  # a core runs one program at a time
    if on_gpu:
        held = occupancy(
            device, threads=config.num_warps * device.warp_size, registers=(binary.registers or 0) if binary else 0,
            shared=binary.shared_bytes if binary else 0,
        )  # fmt: skip
    if held.blocks == 0:
        return Modelled(math.inf, {"blocks_per_sm": 0, "limit": held.limit})
    blocks = programs * config.num_ctas  # those of a cluster run together, on as many multiprocessors
    busy = _work(device, cost, dtype, config, binary)
    stages = config.num_stages if on_gpu else 1
    steps = cost.steps / cost.launches / programs
    waits = {"start": device.program_us, "steps": steps * device.step_us / stages}
    if config.num_ctas > 1:
        waits["clusters"] = steps * _CLUSTER_US

    def wave(n: int) -> float:
        """Microseconds of n programs at once."""
        each = cdiv(n, device.sms)
        # a multiprocessor's units have its own programs' work, memory and cache that of all
        share = {name: n if name in _SHARED else each * device.sms for name in busy}
        parts = [us * share[name] / (cost.launches * blocks) for name, us in busy.items()] + [sum(waits.values())]
        warps = max(1.0, each * config.num_warps / device.warp_granularity) if on_gpu else 1.0
        return max(parts) + (sum(parts) - max(parts)) / warps

    slots = device.sms * held.blocks
    full, rest = divmod(blocks, slots)
    time_us = full * wave(slots) + (wave(rest) if rest else 0.0)
    waves = blocks / slots
    facts: dict[str, float | str] = {"launch": cost.launches * device.launch_us, "waves": waves, "limit": held.limit}
    facts |= {"blocks_per_sm": held.blocks, "tail": time_us / (waves * wave(slots))}
    waiting = {name: us * waves * cost.launches for name, us in waits.items()}
    return Modelled(cost.launches * (device.launch_us + time_us), {**busy, **waiting, **facts})


def _work(device: Device, cost: Cost, dtype: str, config: Config, binary: Binary | None) -> dict[str, float]:
    """Microseconds for which each unit of the device is busy."""
    rate = cost.rate or dtype
    terms = {
        "products": cost.tile_flops / (device.rate(rate) * _share_of_peak(device, cost, rate, config, binary)),
        "operands": cost.operands * _OPERAND_BYTES.get(rate, 4) / device.tile_bandwidth,
        "exps": cost.tile_exps / device.exps,
        "pointwise": cost.pointwise / device.pointwise,
        "memory": cost.bytes / device.bandwidth,
        "cache": cost.loaded / device.cached_bandwidth,
    }
    spilled = 0.0  # bytes in each step
    if device.l1_bytes is not None:
        # a tile has a quarter of the cache, beside what it is made of and what is made of it
        spilled = max(0.0, cost.held - device.l1_bytes / 4)
    elif binary is not None and binary.spill_bytes:
        spilled = 2 * binary.spill_bytes * config.num_warps * device.warp_size * config.num_ctas
    terms["spills"] = cost.steps * spilled / device.spill_bandwidth
    return {name: seconds * 1e6 for name, seconds in terms.items()}


def _share_of_peak(device: Device, cost: Cost, rate: str, config: Config, binary: Binary | None) -> float:
    """Of the rate of products, what these tiles can reach where nothing else is in their way."""
    if device.kind == "cpu" or not cost.dots or device.rate(rate) <= device.rate("float32"):
        return 1.0
    if binary is not None and binary.instructions and not binary.tensor_core_instructions:
        return device.rate("float32") / device.rate(rate)
    of_warp = cost.results / cost.dots / (config.num_warps * config.num_ctas)
    share = min(1.0, of_warp / _RESULTS_OF_WARP)
    if device.arch in ("sm_90", "sm_100"):
        if binary is not None and binary.tensor_core_instructions:
            in_groups = any(name.startswith(_OF_GROUPS) for name in binary.tensor_core_instructions)
        else:
            in_groups = max(config.blocks.values()) >= _GROUP_ROWS and config.num_warps >= 4
        share *= 1.0 if in_groups else _WITHOUT_GROUPS
    return share
