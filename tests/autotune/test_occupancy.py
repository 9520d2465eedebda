"""Occupancy against the vendors' own arithmetic."""

from __future__ import annotations

import pytest

from fastattn.autotune.devices import device_named, devices
from fastattn.autotune.occupancy import Occupancy, blocks_per_sm, occupancy

KIB = 1024


@pytest.mark.parametrize(
    ("gpu", "registers", "threads", "shared", "blocks", "limit"),
    [
        # as the calculator of Nsight Compute works them out
        ("a100", 32, 256, 0, 8, "threads"),  # 2048 threads are all
        ("a100", 32, 64, 0, 32, "blocks"),
        ("a100", 64, 256, 0, 4, "registers"),  # 64 x 32 = 2048 of a warp: 32 warps in 65536
        ("a100", 65, 256, 0, 3, "registers"),  # 65 x 32 = 2080, rounded up to 2304: 28 warps, 3 x 8 of them
        ("a100", 255, 128, 0, 2, "registers"),  # 8160, up to 8192: 8 warps
        ("a100", 32, 128, 48 * KIB, 3, "shared memory"),  # 49 KiB with the system's own: 3 in 164
        ("a100", 32, 128, 163 * KIB, 1, "shared memory"),
        ("a100", 32, 128, 81 * KIB, 2, "shared memory"),  # 82 KiB each: exactly 164
        ("a100", 32, 128, 81 * KIB + 1, 1, "shared memory"),  # rounded up to 128 bytes more
        ("h100", 168, 384, 0, 1, "registers"),  # three warp groups of 168: 12 warps of the 12 that fit
        ("h100", 128, 128, 100 * KIB, 2, "shared memory"),
        ("rtx4090", 40, 512, 0, 3, "threads"),  # 1536 threads, not 2048
        ("rtx4090", 32, 128, 49 * KIB, 2, "shared memory"),
        ("rtx3090", 16, 32, 0, 16, "blocks"),
        ("t4", 32, 128, 32 * KIB, 2, "shared memory"),  # sm_75 keeps nothing for itself
        ("t4", 32, 1024, 0, 1, "threads"),
        # 512 VGPRs of a SIMD by portions of 8, at most 8 waves on each of 4 SIMDs
        ("mi300x", 64, 256, 0, 8, "threads"),
        ("mi300x", 65, 256, 0, 7, "registers"),  # 72: 7 waves of a SIMD
        ("mi300x", 128, 256, 0, 4, "registers"),
        ("mi300x", 256, 256, 0, 2, "registers"),
        ("mi300x", 512, 256, 0, 1, "registers"),
        ("mi300x", 64, 256, 20 * KIB, 3, "shared memory"),
        ("mi300x", 64, 256, 64 * KIB, 1, "shared memory"),
        ("mi300x", 16, 128, 0, 16, "blocks"),  # barriers
        ("mi300x", 16, 64, 0, 32, "threads"),  # a wave alone needs none
    ],
)
def test_as_the_vendors_calculators_say(
    gpu: str, registers: int, threads: int, shared: int, blocks: int, limit: str
) -> None:
    found = occupancy(device_named(gpu), registers=registers, threads=threads, shared=shared)
    assert (found.blocks, found.limit) == (blocks, limit)


def test_a_kernel_that_cannot_run_has_no_blocks() -> None:
    h100, mi300x = device_named("h100"), device_named("mi300x")
    assert blocks_per_sm(h100, registers=256, threads=128, shared=0) == 0
    assert blocks_per_sm(h100, registers=32, threads=128, shared=227 * KIB + 1) == 0
    assert blocks_per_sm(mi300x, registers=32, threads=128, shared=64 * KIB + 1) == 0
    assert blocks_per_sm(h100, registers=255, threads=1024, shared=0) == 0


def test_the_share_is_of_the_threads() -> None:
    assert occupancy(device_named("a100"), registers=64, threads=256, shared=0) == Occupancy(4, "registers", 0.5)


@pytest.mark.parametrize("gpu", devices())
def test_more_of_anything_never_lets_more_run(gpu: str) -> None:
    device = device_named(gpu)

    def blocks(registers: int, threads: int, shared: int) -> int:
        return blocks_per_sm(device, registers=registers, threads=threads, shared=shared)

    for threads in (64, 128, 256, 512):
        by_registers = [blocks(registers, threads, 0) for registers in range(1, 256)]
        assert by_registers == sorted(by_registers, reverse=True)
        by_shared = [blocks(32, threads, shared) for shared in range(0, 100 * KIB, 999)]
        assert by_shared == sorted(by_shared, reverse=True)


@pytest.mark.parametrize(("given", "name"), [({"threads": 0}, "threads"), ({"registers": -1}, "registers")])
def test_impossible_sizes_are_refused(given: dict[str, int], name: str) -> None:
    sizes = {"registers": 32, "threads": 128, "shared": 0} | given
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        occupancy(device_named("h100"), **sizes)
