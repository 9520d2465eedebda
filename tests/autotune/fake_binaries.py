"""Compilers for tests of searches: a worker has imported all that they need before the first of their jobs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import fastattn.autotune.linear_attention  # noqa: F401  what jobs are made of
from fastattn.autotune.binaries import Figures, Job, recipe_of
from fastattn.autotune.rooms import room_of


def slowly(job: Job) -> Figures:
    """Of a kernel that takes little, written down in the file LOG when it is done."""
    time.sleep(0.05)
    with Path(os.environ["LOG"]).open("a") as log:
        log.write(recipe_of(job) + "\n")
    return Figures(job.target, registers=32, spill_bytes=0, num_warps=job.config.num_warps)


def hangs_at_first(job: Job) -> Figures:
    """Never ends for the heuristic's choice, and is quick for all others."""
    if job.config == room_of(job.kernel).candidates(job.kernel, job.target, job.sizes, 2, job.flags)[0]:
        time.sleep(600)
    return Figures(job.target, registers=32, spill_bytes=0, num_warps=job.config.num_warps)
