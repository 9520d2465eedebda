"""Memory that a call needs, as the system saw it."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which this process's resident memory rose, at its highest, while ``call`` ran once.

    Results that ``call`` returns are counted, its inputs are not. The system's own high-water mark is read (VmHWM),
    reset just before through ``/proc/self/clear_refs``, so no short peak is missed; memory that was freed earlier is
    first handed back to the system, or it would be reused unseen. None where there is no such mark (not Linux).
    Run the call once before: what it builds or loads the first time is not memory that it needs.
    """
    if not sys.platform.startswith("linux") or not _STATUS.exists():
        return None
    gc.collect()
    _hand_back_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def extra_device_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which torch's allocations on a GPU rose, at their highest, while ``call`` ran once: results counted,
    inputs not, as in :func:`extra_memory`."""
    import torch

    memory = torch.get_device_module(device)
    gc.collect()
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    result = call()
    memory.synchronize(device)
    peak = memory.max_memory_allocated(device)
    del result
    return max(0, peak - before)


def _hand_back_freed_memory() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}")
