"""The kernels that can be tuned, and the files that say how: one a room, called as the room of the kernel.

Each of them has ``Sizes``, the sizes of an input; ``representative`` ones; ``flags`` that select code; ``candidates``,
what may be tried; ``cost`` and an ``example`` launch without memory, for who models or compiles; and ``problems``, for
who measures.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from fastattn.autotune.source import ROOMS

_OF_CODES = ("hamming_assign", "hamming_count", "hamming_update")
_OF_HASHES = ("smyrf_hash_lift",)


def kernel_names(start: str = "all") -> list[str]:
    """The tunable kernels whose names start so, room by room. Raises ValueError where there is none."""
    names = [name for room in ROOMS for name in import_module(f"fastattn.kernels.{room}").TUNING]
    found = names if start == "all" else [name for name in names if name.startswith(start)]
    if not start or not found:
        raise ValueError(f"kernel must be all, one of {', '.join(names)}, or how some of them begin, got {start!r}")
    return found


def room_of(kernel: str) -> ModuleType:
    """The file of this folder that says how ``kernel`` is tuned. Raises ValueError for a kernel that is not tunable."""
    for room in ROOMS:
        if kernel in import_module(f"fastattn.kernels.{room}").TUNING:
            return import_module(f"fastattn.autotune.{room}")
    raise ValueError(f"kernel must be one of {', '.join(kernel_names())}, got {kernel!r}")


def key_dtype(kernel: str, dtype: torch.dtype) -> torch.dtype:
    """As which an op looks ``kernel`` up in a call with inputs of ``dtype``: some kernels only see hashes of these."""
    if kernel in _OF_CODES:
        return torch.int64
    return torch.float32 if kernel in _OF_HASHES else dtype
