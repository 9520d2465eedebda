"""What can be said of a configuration before it is compiled: gates of the architecture, and bounds from Triton's IR.

The IR comes in a tenth of a second, where a binary takes seconds: it has the tiles that products read and that loops
carry. What these alone take is less than the binary will, so that whatever they refuse is surely too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from fastattn.autotune.devices import Device
from fastattn.kernels.config import Config, cdiv
from fastattn.kernels.cpu import frontend
from fastattn.kernels.cpu.ttir import Block, Op, Type, Value, parse
from fastattn.kernels.launch import Launch, signature

MOST_THREADS = 1024  # of a program, on NVIDIA's and AMD's GPUs
FIRST_WITH_CLUSTERS = 90
# Their tensor cores keep sums in a memory of their own: tiles that loops carry need not be in registers.
_TENSOR_MEMORY = ("sm_100", "sm_103")
_MFMA = 16  # rows and columns of the least matrix instruction


@dataclass(frozen=True)
class Tiles:
    """Of the IR of a kernel. staged: bytes of the tiles that an iteration of a loop loads for products and nothing
    else. carried: bytes of the tiles that a loop hands from one iteration to the next; summed: those of them that
    products add to. Each of the loop that has most. products: (rows, columns) of results. work: multiply-adds of the
    largest product; exact: of the largest that tensor cores do not do, since it is of fp32 as it is."""

    staged: int = 0
    carried: int = 0
    summed: int = 0
    products: tuple[tuple[int, int], ...] = ()
    work: int = 0
    exact: int = 0


def gate(device: Device, config: Config) -> str | None:
    """Why ``device`` cannot run ``config``, whatever the kernel is; None where it may."""
    threads = config.num_warps * device.warp_size
    if threads > MOST_THREADS:
        return f"{config.num_warps} warps are {threads} threads, more than {MOST_THREADS}"
    if config.num_ctas > 1 and not _has_clusters(device):
        return f"{device.arch} has no thread-block clusters, which came with sm_{FIRST_WITH_CLUSTERS}"
    return None


def refusal(device: Device, config: Config, tiles: Tiles) -> str | None:
    """Why a binary of ``config`` would surely be of no use on ``device``, by its tiles; None where it may be."""
    shared = shared_bound(device, config, tiles)
    if shared > device.shared_per_block:
        return f"its tiles alone take {shared} bytes of shared memory of {device.shared_per_block}"
    registers = register_bound(device, config, tiles)
    if registers > device.registers_per_thread:
        return f"what its loops carry alone takes {registers} registers of {device.registers_per_thread}"
    if device.kind == "hip" and tiles.products:
        most = max(cdiv(m, _MFMA) * cdiv(n, _MFMA) for m, n in tiles.products)
        if most < config.num_warps:
            return f"its products have {most} matrix instructions for {config.num_warps} wavefronts"
    return None


def shared_bound(device: Device, config: Config, tiles: Tiles) -> int:
    """Bytes of shared memory that a program needs at least: each stage of a pipeline but the one at work has its tiles
    there."""
    return tiles.staged * (config.num_stages - 1) // config.num_ctas


def register_bound(device: Device, config: Config, tiles: Tiles) -> int:
    """Registers that a thread needs at least."""
    carried = tiles.carried - (tiles.summed if device.arch in _TENSOR_MEMORY else 0)
    return carried // (4 * config.num_warps * device.warp_size * config.num_ctas)


def tiles_of(launch: Launch) -> Tiles:
    """What the IR of a launch has. The same for launches that differ in warps, stages and clusters alone.

    Raises what :func:`fastattn.kernels.cpu.frontend.ttir` does.
    """
    function = parse(frontend.ttir(launch.kernel, *signature(launch)))
    loops = [op for op in _ops(function.body) if op.name == "scf.for"]
    dots = [op for op in _ops(function.body) if op.name == "tt.dot"]
    accumulators = {id(op.operands[2]) for op in dots}
    staged = [sum(_bytes(value.type) for value in _staged(loop)) for loop in loops]
    carried = [
        (sum(_bytes(x.type) for x in values), sum(_bytes(x.type) for x in values if id(x) in accumulators))
        for values in ([x for x in loop.regions[0].args[1:] if x.shape] for loop in loops)
    ]
    most = max(carried, default=(0, 0))
    products = tuple(sorted({(op.result.shape[-2], op.result.shape[-1]) for op in dots}))
    work = [(prod(op.result.shape) * op.operands[0].shape[-1], _is_exact(op)) for op in dots]
    exact = max((count for count, is_exact in work if is_exact), default=0)
    return Tiles(max(staged, default=0), *most, products, max((count for count, _ in work), default=0), exact)


def _is_exact(dot: Op) -> bool:
    return dot.operands[0].element == "f32" and "tf32" not in dot.text


def _staged(loop: Op) -> list[Value]:
    """What loads in the loop, but not in loops inside it, give to products, as it is or transposed."""
    own = set(map(id, loop.regions[0].ops))
    found: dict[int, Value] = {}
    for op in loop.regions[0].ops:
        for value in op.operands[:2] if op.name == "tt.dot" else []:
            while value.op is not None and value.op.name == "tt.trans":
                value = value.op.operands[0]
            if value.op is not None and value.op.name == "tt.load" and id(value.op) in own:
                found[id(value)] = value
    return list(found.values())


def _ops(block: Block) -> Iterator[Op]:
    for op in block.ops:
        yield op
        for region in op.regions:
            yield from _ops(region)


def _bytes(type_: Type) -> int:
    bits = 64 if type_.element.startswith("!tt.ptr") else int(re.sub(r"\D", "", type_.element) or 32)
    return prod(type_.shape) * bits // 8


def _has_clusters(device: Device) -> bool:
    return device.kind == "cuda" and int(device.arch.removeprefix("sm_")) >= FIRST_WITH_CLUSTERS
