"""How one kernel is launched: its block sizes and the compiler's knobs; and the space that a tuner may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

# May a compiler contract a * b + c? Always said aloud, for Triton's default changes from version to version.
FP_FUSION = True


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
    """Work of one call, for roofline models and for rates in benchmarks."""

    flops: float
    bytes: float
    exps: float
