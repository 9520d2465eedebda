"""How one kernel is launched: its block sizes and the compiler's knobs; and the space that a tuner may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

# May a compiler contract a * b + c? Always said aloud, for Triton's default changes from version to version.
FP_FUSION = True
# What heuristics tell of architectures, in the names of ahead-of-time targets: where tensor cores read their operands
# from shared memory, which leaves registers for larger tiles, and where a tile takes more registers than elsewhere.
READS_SHARED = ("cuda:90", "cuda:100", "cuda:103")
TIGHT = ("cuda:120", "cuda:121")


@dataclass(frozen=True)
class Config:
    """blocks: values of the kernel's block-size ``constexpr`` arguments, by name, e.g. ``{"BLOCK_M": 64}``.
    num_warps, num_stages, num_ctas: Triton's launch options (no meaning on the CPU)."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    num_ctas: int = 1

    def __hash__(self) -> int:
        return hash((*sorted(self.blocks.items()), self.num_warps, self.num_stages, self.num_ctas))

    def to_dict(self) -> dict[str, Any]:
        return {
            "blocks": dict(sorted(self.blocks.items())),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "num_ctas": self.num_ctas,
        }

    @staticmethod
    def from_dict(row: dict[str, Any]) -> Config:
        return Config(dict(row["blocks"]), row["num_warps"], row["num_stages"], row["num_ctas"])


@dataclass(frozen=True)
class TuningSpace:
    """Every value that a tuner may try, by name; a device takes a subset (a CPU has no warps)."""

    blocks: dict[str, tuple[int, ...]]
    num_warps: tuple[int, ...] = (4,)
    num_stages: tuple[int, ...] = (2,)
    num_ctas: tuple[int, ...] = (1,)

    def block_choices(self) -> Iterator[dict[str, int]]:
        for values in product(*self.blocks.values()):
            yield dict(zip(self.blocks, values, strict=True))

    def configs(self, device_type: str) -> Iterator[Config]:
        """All configurations for ``device_type`` ("cpu", "cuda", ...)."""
        for blocks in self.block_choices():
            if device_type == "cpu":
                yield Config(blocks)
                continue
            for warps, stages, ctas in product(self.num_warps, self.num_stages, self.num_ctas):
                yield Config(blocks, warps, stages, ctas)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 3 µs a call outside of kernels, which launches feel."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, which is at least 1."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Cost:
    """Work of one call of a kernel, for time models and for rates in benchmarks.

    flops, exps: what the result takes. bytes: each tensor's, once a launch.

    The rest is what a configuration makes of that; 0 where none was given:

    tile_flops, tile_exps: as the tiles do it, with what is masked or padded. pointwise: operations on elements of tiles
    outside of products and exps, counted roughly. dots: how many products of tiles there are; operands: elements of the
    tiles that they read; results: of those that they add to. loaded: bytes that all programs together load and store,
    through caches. steps: iterations of the inner loops of all programs. held: bytes of the tiles that one of them goes
    over, beside the operands of products.

    launches: how many equal launches share the work. rate: what products run at, where it is not the rate of the
    inputs' dtype: the name of a rate of :class:`fastattn.autotune.devices.Device`, or "tf32x3".
    """

    flops: float
    bytes: float
    exps: float
    tile_flops: float = 0.0
    tile_exps: float = 0.0
    pointwise: float = 0.0
    dots: float = 0.0
    operands: float = 0.0
    results: float = 0.0
    loaded: float = 0.0
    steps: float = 0.0
    held: float = 0.0
    launches: int = 1
    rate: str | None = None


# Operations outside of products, roughly, on each score of a tile of attention: scaling, the mask, the running maximum,
# the sum; and on each feature: the map and its masks.
SCORE_OPS, FEATURE_OPS = 8, 4


def products(count: float, *shapes: tuple[int, int, int]) -> dict[str, float]:
    """:class:`Cost`'s fields for ``count`` times the products [m, k] x [k, n] of ``shapes``, each (m, n, k)."""
    return {
        "tile_flops": count * sum(2 * m * n * k for m, n, k in shapes),
        "dots": count * len(shapes),
        "operands": count * sum((m + n) * k for m, n, k in shapes),
        "results": count * sum(m * n for m, n, _ in shapes),
    }


def padded(dim: int) -> int:
    """A head dim as tiles have it: a power of two, from 16 on, the least that ``tl.dot`` takes."""
    return max(16, next_power_of_2(dim))
