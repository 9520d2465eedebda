"""The processor, as the engine sees it: how wide its vectors are and what to tell the compiler."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Level:
    """An instruction set.

    lanes: 32-bit lanes of a vector. flags: the compiler's; none of them is ``-march=native``, so that a level is the
    same instructions on every machine (``-mtune`` only orders them). needs: the processor's features, as Linux names
    them.
    """

    name: str
    lanes: int
    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()


def _level(name: str, lanes: int, features: dict[str, str], *flags: str) -> Level:
    return Level(name, lanes, (*features.values(), "-mtune=native", *flags), frozenset(features))


# the processor's name of a feature and the compiler's flag for it; one by one, for -march=x86-64-v4 and its like are
# unknown to g++ before 11
_AVX2 = {
    "avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c", "bmi1": "-mbmi", "bmi2": "-mbmi2", "abm": "-mlzcnt",
    "popcnt": "-mpopcnt", "movbe": "-mmovbe",
}  # fmt: skip
_AVX512 = _AVX2 | {f"avx512{part}": f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl")}
_AVX512_BF16 = _AVX512 | {
    "avx512_bf16": "-mavx512bf16", "avx512_vnni": "-mavx512vnni", "avx512_vpopcntdq": "-mavx512vpopcntdq"
}  # fmt: skip
# macros of our own, for g++ 10 has no flags for these: products.h writes their instructions itself, or does without
_AMX_BF16 = _AVX512_BF16 | {"amx_tile": "-DAMX_TILE", "amx_bf16": "-DAMX_BF16"}

# Intel Sapphire Rapids and later Xeons: products of bf16 in matrix registers, where Linux lends them to this process
AMX_BF16 = _level("amx_bf16", 16, _AMX_BF16, "-mprefer-vector-width=512")
# AMD Zen 4 and later, and those Xeons where AMX is refused: products of bf16 and int8 in pairs, population counts of
# whole vectors. (Cooper Lake has the products alone, and takes the next level.) Its flags are known to g++ from 10 and
# to clang from 9
AVX512_BF16 = _level("avx512_bf16", 16, _AVX512_BF16, "-mprefer-vector-width=512")
# Intel Skylake-X, Cascade Lake, Ice Lake, Tiger Lake
AVX512 = _level("avx512", 16, _AVX512, "-mprefer-vector-width=512")
# Intel from Haswell on, AMD from Zen on
AVX2 = _level("avx2", 8, _AVX2)
# 128-bit vectors, which every 64-bit processor has: SSE2 on x86-64, NEON on aarch64
BASELINE = Level("baseline", 4)
LEVELS = (AMX_BF16, AVX512_BF16, AVX512, AVX2, BASELINE)  # best first


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


@lru_cache
def may_use_amx() -> bool:
    """Whether Linux lends this process the registers of AMX, asked for once, for all of its threads.

    Generated code asks too, for hosts without Python, and does without them where it is refused.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    words = map(ctypes.c_long, (arch_prctl, request_permission, tile_data))
    return ctypes.CDLL(None).syscall(*words) == 0


def supported_levels() -> list[Level]:
    """The levels that this machine can run, best first."""
    has = features() if platform.machine() == "x86_64" else frozenset()
    if "amx_tile" in has and not may_use_amx():
        has -= {"amx_tile"}
    return [level for level in LEVELS if level.needs <= has]


@lru_cache
def fingerprint() -> str:
    """Changes with the processor, so that an object built for another one is never loaded."""
    text = " ".join([platform.machine(), model_name(), *sorted(features())])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
