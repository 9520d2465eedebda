"""What a run on a device has done so far, a line of JSON a step: who is killed reads it, and goes on.

Lines are appended and never changed, and a line that was cut off by a kill is left out. Each has its ``kind`` and
``at``, when it was written (seconds since 1970):

- ``run``: one start of the program; ``facts`` of the machine and ``identity``, all that must stay the same;
- ``plan``: ``steps`` of a ``stage``, as many as there are; a later plan adds to it;
- ``begin``, ``end``: of a ``step``; an end has its ``status``, ``seconds`` and ``result``, or ``why`` there is none;
- ``stage``: a process for it was started;
- ``over``: a stage is over, for all is done or, if ``cut``, its time is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "at": round(time.time(), 3), **fields})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            # a line that a kill cut off is ended, or it would swallow this one
            if stream.tell() and self._last_byte() != b"\n":
                line = "\n" + line
            stream.write(line.encode() + b"\n")

    def read(self) -> Story:
        lines = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return Story(lines)

    def _last_byte(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(-1, 2)
            return stream.read(1)


class Story:
    """A journal's lines, and what follows from them."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    @cached_property
    def start(self) -> Line | None:
        """The line of the first run."""
        return next((line for line in self.lines if line["kind"] == "run"), None)

    def ends(self, stage: str) -> dict[str, Line]:
        """What came of each finished step: of what was told twice, the first."""
        return {x["step"]: x for x in reversed(self.lines) if x["kind"] == "end" and x["stage"] == stage}

    def planned(self, stage: str) -> list[str]:
        """All steps that are known of, in their order."""
        plans = (x["steps"] for x in self.lines if x["kind"] == "plan" and x["stage"] == stage)
        return list(dict.fromkeys(step for steps in plans for step in steps))

    def left(self, stage: str) -> list[str]:
        """Planned steps that have not ended."""
        ended = self.ends(stage)
        return [step for step in self.planned(stage) if step not in ended]

    def begun(self, stage: str) -> list[str]:
        """Steps that began, in the last run or in one before, and did not end."""
        ended = self.ends(stage)
        steps = (x["step"] for x in self.lines if x["kind"] == "begin" and x["stage"] == stage)
        return [step for step in dict.fromkeys(steps) if step not in ended]

    def over(self, stage: str) -> Line | None:
        return next((x for x in self.lines if x["kind"] == "over" and x["stage"] == stage), None)

    def seconds(self, stage: str | None = None) -> float:
        """Time spent on a stage, or on all: that between runs does not count."""
        spans: dict[tuple[int, str], list[float]] = {}
        run = 0
        for line in self.lines:
            run += line["kind"] == "run"
            if "stage" in line:
                spans.setdefault((run, line["stage"]), []).append(line["at"])
        return sum(max(times) - min(times) for (_, name), times in spans.items() if stage in (None, name))


def same(a: Mapping[str, Any] | None, b: Mapping[str, Any]) -> bool:
    """Are these the same once they have been through JSON?"""
    return a is not None and json.loads(json.dumps(a)) == json.loads(json.dumps(b))
