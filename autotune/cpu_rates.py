"""This machine's CPU as a device: what can be read is read, what can be measured in a second is measured, once.

Measured are the products of torch.mm (fp32 and bf16) and the copying of what no cache holds, with as many threads as
torch has now. They are kept in the cache folder, a file for each processor and number of threads.

What the engine makes of a processor follows from these by a few constants, which are the engine's and not the
machine's: they were fitted once, to times of an earlier run than that in perf/results/ranking.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import torch

from fastattn.kernels.settings import settings

SECONDS = 0.8  # of measuring, all told
# Calls take a millisecond or less: on a busy machine some of them still run undisturbed.
_SIDE = 384  # of matrices
_COPIED = 96 << 20  # bytes, more than a core's share of any cache, so that no part is met again while it is there ...
_PART = 4 << 20  # ... in such parts


@dataclass(frozen=True)
class Rates:
    """float32, bfloat16: flops per second of products. bandwidth: bytes per second that a copy reads and writes."""

    float32: float
    bfloat16: float
    bandwidth: float


def measure() -> Rates:
    """Best of what fits in :data:`SECONDS`: whatever else the machine does makes it slower, never faster.

    Threads that wait for one another hardly ever run undisturbed on a busy machine, so one alone is measured too, and
    all together are taken to do half of what each would alone, at least.
    """
    threads = torch.get_num_threads()
    alone = together = _measure()
    if threads > 1:
        try:
            torch.set_num_threads(1)
            alone = _measure()
        finally:
            torch.set_num_threads(threads)
    float32 = max(together.float32, alone.float32 * threads / 2)
    # where the processor has no products of bf16, the engine's are those of fp32
    bfloat16 = max(float32, together.bfloat16, alone.bfloat16 * threads / 2)
    return Rates(float32, bfloat16, max(together.bandwidth, alone.bandwidth))


@torch.inference_mode()
def _measure() -> Rates:
    def product(dtype: torch.dtype) -> float:
        a = torch.ones(_SIDE, _SIDE, dtype=dtype)
        out = torch.empty_like(a)
        return 2 * _SIDE**3 / _least_seconds(repeat(lambda: torch.mm(a, a, out=out)))

    source, target = (torch.ones(_COPIED, dtype=torch.uint8).split(_PART) for _ in range(2))
    copies = (lambda a=a, b=b: a.copy_(b) for a, b in cycle(zip(target, source, strict=True)))
    return Rates(product(torch.float32), product(torch.bfloat16), 2 * _PART / _least_seconds(copies))


def _least_seconds(calls: Iterator[Callable[[], object]]) -> float:
    """Of as many of ``calls`` as fit in a sixth of the time, and three at least; the first one is not counted."""
    least, start = float("inf"), time.perf_counter()
    for number, call in enumerate(calls):
        began = time.perf_counter()
        call()
        ended = time.perf_counter()
        if number > 0:
            least = min(least, ended - began)
        if number > 3 and ended - start > SECONDS / 6:
            break
    return least


def rates() -> Rates:
    """This machine's, from the cache folder; measured where there are none for this processor and these threads."""
    return _rates(settings().cache_dir, torch.get_num_threads())


@lru_cache
def _rates(cache_dir: Path, threads: int) -> Rates:
    from fastattn.kernels.cpu.machine import fingerprint

    file = cache_dir / "rates" / f"cpu-{fingerprint()}-{threads}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = Rates(**json.loads(file.read_text(encoding="utf-8")))
        if all(isinstance(rate, float) and rate > 0 for rate in asdict(known).values()):
            return known
    found = measure()
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process a second
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    return found


# The engine's, of one core: flops of products of fp32 in whose time it does one exp or another operation on an
# element, reads an element for a product, loads or stores a byte, or gets one back that its first cache had not ...
_FLOPS_OF_EXP, _FLOPS_OF_OPERATION, _FLOPS_OF_OPERAND, _FLOPS_OF_LOAD, _FLOPS_OF_SPILL = 8.0, 7.2, 2.2, 2.3, 1.2
# ... microseconds that a program and a step take beside their work, and a launch ...
_PROGRAM_US, _STEP_US, _LAUNCH_US = 0.03, 0.001, 10.0
# ... and how fast products of int8 and population counts are, against products of fp32.
_INT8, _POPCOUNT = 0.66, 9.5


def figures(rates: Rates, threads: int) -> dict[str, Any]:
    """The fields of :class:`~fastattn.autotune.devices.Device` of a CPU of such rates, as kernels find it, but for its
    names."""
    flops = {"float32": rates.float32, "float16": rates.float32, "bfloat16": rates.bfloat16}
    flops |= {"int8": _INT8 * rates.float32, "popcount": _POPCOUNT * rates.float32}
    # a core has one program at a time, with no bounds to its tiles
    one = ("warp_size", "threads_per_sm", "blocks_per_sm", "registers_per_sm", "registers_per_thread")
    one += ("register_granularity", "warp_granularity", "shared_granularity")
    none = ("shared_reserved", "shared_per_block", "shared_per_sm", "clock_ghz")
    return {
        **dict.fromkeys(one, 1), **dict.fromkeys(none, 0), "sms": threads, "threads": threads, "flops": flops,
        "l2_bytes": _cache_bytes("SC_LEVEL2_CACHE_SIZE", 1 << 20),
        "l1_bytes": _cache_bytes("SC_LEVEL1_DCACHE_SIZE", 32 << 10),
        "bandwidth": rates.bandwidth, "cached_bandwidth": rates.float32 / _FLOPS_OF_LOAD,
        "tile_bandwidth": 4 * rates.float32 / _FLOPS_OF_OPERAND, "spill_bandwidth": rates.float32 / _FLOPS_OF_SPILL,
        "exps": rates.float32 / _FLOPS_OF_EXP, "pointwise": rates.float32 / _FLOPS_OF_OPERATION,
        "launch_us": _LAUNCH_US, "program_us": _PROGRAM_US, "step_us": _STEP_US,
        "notes": ("rates of products and of copying are measured, the others follow from them",),
    }  # fmt: skip


def _cache_bytes(name: str, usual: int) -> int:
    """A cache that a core has for itself, as the C library tells it; ``usual`` where it does not."""
    try:
        size = os.sysconf(name)
    except (ValueError, OSError):
        return usual
    return size if size > 0 else usual
