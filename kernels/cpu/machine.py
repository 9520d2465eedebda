"""The processor, as the engine sees it: how wide its vectors are and what to tell the compiler."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Level:
    """An instruction set. lanes: 32-bit lanes of a vector. flags: the compiler's."""

    name: str
    lanes: int
    flags: tuple[str, ...]


AVX512 = Level("avx512", 16, ("-march=x86-64-v4", "-mtune=native", "-mprefer-vector-width=512"))
AVX2 = Level("avx2", 8, ("-march=x86-64-v3", "-mtune=native"))
BASELINE = Level("baseline", 4, ())  # 128-bit vectors: SSE2 or NEON, which every 64-bit processor has

_NEEDS = (
    (AVX512, {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "fma", "bmi2"}),
    (AVX2, {"avx2", "fma", "bmi2", "f16c", "movbe"}),
)


@lru_cache
def features() -> frozenset[str]:
    """The processor's feature flags, as Linux names them; empty where they can't be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


@lru_cache
def model_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def supported_levels() -> list[Level]:
    """The levels that this machine can run, best first."""
    wide = [level for level, needs in _NEEDS if needs <= features()] if platform.machine() == "x86_64" else []
    return [*wide, BASELINE]


@lru_cache
def fingerprint() -> str:
    """Changes with the processor, so that an object built for another one is never loaded."""
    text = " ".join([platform.machine(), model_name(), *sorted(features())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
