"""How many programs of a kernel run on one multiprocessor at once, and what keeps it from more.

The arithmetic is that of NVIDIA's occupancy calculator (cuda_occupancy.h of the CUDA toolkit), and for AMD that of LLVM
(AMDGPUBaseInfo.cpp): warps, registers and shared memory are handed out in portions, and the scarcest of them decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.autotune.devices import Device
from fastattn.kernels.config import cdiv


@dataclass(frozen=True)
class Occupancy:
    """blocks: programs on a multiprocessor; 0 is a kernel that cannot run. limit: what more of would let more run:
    ``"blocks"``, ``"threads"``, ``"registers"`` or ``"shared memory"``. share: of the threads that a multiprocessor
    takes, how many there are."""

    blocks: int
    limit: str
    share: float


def blocks_per_sm(device: Device, *, registers: int, threads: int, shared: int) -> int:
    """Programs on a multiprocessor of ``device``; 0 where one program is more than it, or a program, may have.

    registers: of a thread (on AMD, vector registers, accumulation ones too). threads: of a program. shared: bytes of
    shared memory of a program.
    """
    return occupancy(device, registers=registers, threads=threads, shared=shared).blocks


def occupancy(device: Device, *, registers: int, threads: int, shared: int) -> Occupancy:
    """:func:`blocks_per_sm`, and what limits it. Raises ValueError for a size below 0, or no threads."""
    for name, size, least in (("registers", registers, 0), ("threads", threads, 1), ("shared", shared, 0)):
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}")
    warps = cdiv(threads, device.warp_size)
    limits = {
        "blocks": device.blocks_per_sm,
        "threads": device.threads_per_sm // device.warp_size // warps,
        "registers": _by_registers(device, registers, warps),
        "shared memory": _by_shared(device, shared),
    }
    if warps == 1 and device.kind == "hip":
        del limits["blocks"]  # a work-group of one wave needs no barrier, which is what there are 16 of
    limit = min(limits, key=lambda name: limits[name])
    blocks = limits[limit]
    return Occupancy(blocks, limit, blocks * warps * device.warp_size / device.threads_per_sm)


def _by_registers(device: Device, registers: int, warps: int) -> int:
    if registers > device.registers_per_thread:
        return 0
    of_warp = cdiv(max(1, registers) * device.warp_size, device.register_granularity) * device.register_granularity
    # registers lie with the schedulers, of which there are as many as warp_granularity says, and each has its own
    of_scheduler = device.registers_per_sm // device.warp_granularity // of_warp
    return of_scheduler * device.warp_granularity // warps


def _by_shared(device: Device, shared: int) -> int:
    if shared > device.shared_per_block:
        return 0
    portion = cdiv(shared, device.shared_granularity) * device.shared_granularity + device.shared_reserved
    return device.shared_per_sm // max(1, portion)
