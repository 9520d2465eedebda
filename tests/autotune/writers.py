"""What other processes do in the tests of the store. Small, for the server that forks them imports it once."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastattn.autotune.key import Key
from fastattn.autotune.schema import ConfigFields, Row
from fastattn.autotune.store import Store

# Steps of an add at which a process may end: before the file's bytes are safe, before the file has its name, and after.
DEATHS = ("before fsync", "after fsync", "before replace", "after replace")


def write_rows(folder: Path, keys: list[str], first: int, count: int, log: Path, death: str | None = None) -> None:
    """Adds rows for tiles first, first + 1, ..., one at a time, to ``keys`` in turn; each is noted in ``log`` when
    ``add`` has returned. death: kills itself at that step of the second row."""
    store, found = Store(folder), [Key.model_validate_json(key) for key in keys]
    kept = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for tile in range(first, first + count):
        if death is not None and tile == first + 1:
            _die(*death.split())
        config = ConfigFields(blocks={"BLOCK_M": tile}, num_warps=4, num_stages=2, num_ctas=1)
        row = Row(config=config, label="measured", time_us=tile, written=datetime.now(UTC))
        store.add(found[tile % len(found)], [row])
        os.write(kept, f"{tile}\n".encode())
        time.sleep(0.01)  # no tuner writes without end, and others want the lock too


def _die(when: str, name: str) -> None:
    real = getattr(os, name)

    def step(*args: Any) -> None:
        if when == "after":
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, step)
