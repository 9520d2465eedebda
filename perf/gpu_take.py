"""A stage's steps, taken one by one in a process of their own: see :mod:`perf.gpu`."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from perf.gpu_journal import Journal

QUICK_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """device: torch's name of it. quick: a little of everything. workers: processes for the tests."""

    device: str
    quick: bool = False
    workers: int = 1

    @property
    def is_cpu(self) -> bool:
        return self.device.startswith("cpu")

    def arguments(self) -> list[str]:
        return ["--device", self.device, *(["--quick"] if self.quick else [])]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Steps = Callable[[Options], Iterator[str]]
Do = Callable[[str, float, Options], dict[str, Any]]


def take(stage: str, steps: Steps, do: Do, journal: Journal, deadline: float, options: Options) -> None:
    """Takes what is left of a stage's steps, until ``deadline`` (seconds since 1970).

    A step gets an equal part of the time that is left. One that raises is told so in the journal, and the next begins.
    """
    story = journal.read()
    if not any(line["kind"] == "plan" and line["stage"] == stage for line in story.lines):
        journal.write("plan", stage=stage, steps=list(steps(options)))
        story = journal.read()
    left = story.left(stage)
    for at, step in enumerate(left):
        seconds = (deadline - time.time()) / (len(left) - at)
        if seconds <= 0:
            return
        if options.quick:
            seconds = min(seconds, QUICK_SECONDS)
        journal.write("begin", stage=stage, step=step)
        start = time.monotonic()
        told: dict[str, Any]
        try:
            told = {"status": "done", "result": do(step, seconds, options)}
        except Exception as error:  # a step's own trouble is a line of the report
            traceback.print_exc()
            told = {"status": "failed", "why": f"{type(error).__name__}: {error}"[:2000]}
        journal.write("end", stage=stage, step=step, seconds=round(time.monotonic() - start, 3), **told)
        if told["status"] == "failed" and not _answers(options):
            os._exit(3)  # nothing runs in this process any more; the next one goes on


def _answers(options: Options) -> bool:
    if options.is_cpu:
        return True
    import torch

    try:
        torch.get_device_module(options.device).synchronize(options.device)
    except RuntimeError:
        return False
    return True
