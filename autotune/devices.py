"""The devices that kernels are tuned for: a table of GPUs, with sources, and the device at hand.

Figures are in ``devices.json``: what an architecture has (``archs``), and what a device is (``devices``). A GPU that is
not in the table is read from its driver; what that does not tell is its architecture's. A CPU's rates are measured
(:mod:`fastattn.autotune.cpu_rates`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from fastattn.autotune import cpu_rates
from fastattn.autotune.device import DeviceName, describe


@dataclass(frozen=True)
class Device:
    """What a kernel finds on a device.

    name: the command's, ``"h100"``. title: the driver's, as ``torch.cuda.get_device_properties(...).name`` and a cache
    key have it; also: other titles of the same chip. kind: ``"cuda"``, ``"hip"`` or ``"cpu"``. arch: ``"sm_90"``.

    sms: multiprocessors, or cores. clock_ghz: at which they reach ``flops``; 0 where it is not known. A multiprocessor
    runs up to threads_per_sm threads of blocks_per_sm programs, in warps of warp_size. Its registers (32 bits) go to
    warps in portions of register_granularity, warps to programs in portions of warp_granularity, shared memory (bytes)
    in portions of shared_granularity, after shared_reserved for each program.

    Rates are of the whole device. flops: per second by dtype, two for a multiply-add: of tensor cores with fp32 sums
    for 16 bits, "tf32" and "int8", exact for "float32"; "popcount": bits compared, two for each. exps, pointwise: exps,
    and other operations on elements, per second. bandwidth: bytes per second of memory; cached_bandwidth: of the cache
    that all programs share, of l2_bytes (a CPU: that a core has for itself); tile_bandwidth: of what products read
    their operands from; spill_bandwidth: of where tiles go that registers do not hold, or a CPU's first cache, of
    l1_bytes, which is None for a GPU.

    launch_us: from one launch's end to the next one's work. program_us, step_us: what each program and each iteration
    of an inner loop waits for, when nothing else runs beside it.

    sources: where the figures come from. notes: what is not the device's own figure but was derived.
    """

    name: str
    title: str
    kind: str
    arch: str
    sms: int
    clock_ghz: float
    warp_size: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int
    registers_per_thread: int
    register_granularity: int
    warp_granularity: int
    shared_granularity: int
    shared_reserved: int
    shared_per_block: int
    shared_per_sm: int
    l2_bytes: int
    bandwidth: float
    cached_bandwidth: float
    tile_bandwidth: float
    spill_bandwidth: float
    flops: Mapping[str, float] = field(hash=False)
    exps: float
    pointwise: float
    launch_us: float
    program_us: float
    step_us: float
    threads: int | None = None
    l1_bytes: int | None = None
    also: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """As :func:`fastattn.kernels.ahead.compile_ahead` names the architecture, ``"cuda:90"``."""
        return f"{self.kind}:{self.arch.removeprefix('sm_')}"

    def device_name(self) -> DeviceName:
        """As it stands in cache keys."""
        return DeviceName(self.arch, self.title, self.threads)

    def rate(self, name: str) -> float:
        """Flops per second of products in ``name``: a dtype, or another name in ``flops``, or ``"tf32x3"``, which makes
        fp32 of three products where there is tf32. What the device has no rate for runs as fp32."""
        exact = self.flops["float32"]
        if name == "tf32x3":
            return max(exact, self.flops.get("tf32", 0.0) / 3) if self.kind == "cuda" else exact
        return self.flops.get(name, exact)


# Vendors publish no rate of the cache that all multiprocessors share: half of what their ports take (64 bytes a clock),
# which is what measurements find, within a factor of two (A100: 47 bytes, by its whitepaper).
CACHED_BYTES_PER_CLOCK = 32
# Microseconds, by order of magnitude: a launch behind another on the same stream; a program's start until its first
# tile is there, and a step's wait for a tile, each a trip to memory (0.5 to 0.8 µs on all of these).
GPU_WAITS = {"launch_us": 3.0, "program_us": 1.0, "step_us": 0.6}


@cache
def devices() -> dict[str, Device]:
    """The GPUs of the table, by name."""
    return {name: _of_table(name, row) for name, row in _table()["devices"].items()}


def device_named(name: str) -> Device:
    """The GPU called ``name``, or ``"cpu"``: this machine's. Raises ValueError for any other."""
    if name == "cpu":
        return at_hand(torch.device("cpu"))
    if name not in devices():
        raise ValueError(f"gpu must be one of {', '.join(devices())}, got {name!r}")
    return devices()[name]


def at_hand(device: torch.device) -> Device:
    """The device of this machine that tensors on ``device`` are on.

    A GPU is looked up in the table by its title, and read from its driver where it is not there. A CPU is measured the
    first time, for less than a second. Raises ValueError for a GPU of an architecture that the table does not have, and
    for other types of devices.
    """
    if device.type == "cpu":
        return cpu_device(cpu_rates.rates(), describe(device))
    if device.type != "cuda":
        raise ValueError(f"device must be a CPU or a CUDA or HIP device, got {device.type!r}")
    return of_driver(describe(device), torch.cuda.get_device_properties(device))


def cpu_device(rates: cpu_rates.Rates, name: DeviceName) -> Device:
    """The CPU called ``name``, of such rates."""
    facts = cpu_rates.figures(rates, name.threads or 1)
    return Device(name="cpu", title=name.name, kind="cpu", arch=name.arch, **facts)


def of_driver(name: DeviceName, properties: Any) -> Device:
    """The device of a driver's properties, from the table or, where it is not there, with its architecture's rates."""
    for known in devices().values():
        if name.name in (known.title, *known.also) and known.arch == name.arch:
            return known
    archs = _table()["archs"]
    if name.arch not in archs:
        raise ValueError(f"{name.name} has architecture {name.arch}; known are {', '.join(archs)}")
    arch = archs[name.arch]
    told: dict[str, Any] = {"sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    notes = []
    clock_khz = getattr(properties, "clock_rate", 0)
    likely = [device for device in devices().values() if device.arch == name.arch]
    if clock_khz:
        told["clock_ghz"] = clock_khz / 1e6
    else:
        told["clock_ghz"] = likely[0].clock_ghz
        notes.append(f"the clock is that of {likely[0].title}: the driver does not tell it")
    memory_khz, bus_bits = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    if memory_khz and bus_bits:
        told["bandwidth"] = 2 * memory_khz * 1e3 * bus_bits / 8
    else:
        told["bandwidth"] = likely[0].bandwidth * told["sms"] / likely[0].sms
        notes.append(f"the bandwidth is that of {likely[0].title}, by multiprocessors: the driver does not tell it")
    for ours, theirs in (
        ("threads_per_sm", "max_threads_per_multi_processor"),
        ("registers_per_sm", "regs_per_multiprocessor"),
        ("shared_per_sm", "shared_memory_per_multiprocessor"),
        ("shared_per_block", "shared_memory_per_block_optin"),
        ("warp_size", "warp_size"),
    ):
        if getattr(properties, theirs, 0):
            told[ours] = getattr(properties, theirs)
    # what GeForce cards halve: see the table's notes
    halved = ("float16", "bfloat16", "tf32") if "GeForce" in name.name else ()
    told["flops"] = {
        dtype: told["sms"] * told["clock_ghz"] * 1e9 * flops / (2 if dtype in halved else 1)
        for dtype, flops in arch["flops_per_clock"].items()
    }
    notes.append(f"rates are those of {name.arch} at this clock")
    return _device(name.name, {"title": name.name, "arch": name.arch, **arch, **told}, tuple(notes))


@cache
def _table() -> dict[str, Any]:
    return json.loads(files("fastattn.autotune").joinpath("devices.json").read_text(encoding="utf-8"))


def _of_table(name: str, row: dict[str, Any]) -> Device:
    arch = _table()["archs"][row["arch"]]
    notes = [_table()["notes"][name]] if name in _table()["notes"] else []
    return _device(name, {**arch, **row, "sources": [*row["sources"], *arch["sources"]]}, tuple(notes))


def _device(name: str, facts: dict[str, Any], notes: tuple[str, ...]) -> Device:
    """facts: an architecture's and a device's fields; rates per clock become rates per second."""
    facts = dict(facts)
    clocks = facts["sms"] * facts["clock_ghz"] * 1e9  # of all multiprocessors, per second
    del facts["flops_per_clock"]
    popcounts = facts.pop("popcounts_per_clock")
    facts["flops"] = {**facts["flops"], "popcount": clocks * popcounts * 2 * 32}
    facts |= {"exps": clocks * facts.pop("exps_per_clock"), "pointwise": facts.pop("pointwise_per_clock") * clocks}
    facts |= {"tile_bandwidth": clocks * facts.pop("tile_bytes_per_clock")}
    cached = clocks * CACHED_BYTES_PER_CLOCK
    facts |= {"cached_bandwidth": cached, "spill_bandwidth": cached, **GPU_WAITS}
    for name_of_list in ("also", "sources"):
        facts[name_of_list] = tuple(facts.get(name_of_list, ()))
    return Device(name=name, notes=notes, **facts)
