"""What the benchmarks hand over, and how it is written: rows beside their goals, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.measure import Timing
from fastattn.autotune.problem import deviation
from fastattn.cli.doctor import compiler, engine_problem, installed
from fastattn.kernels.cpu import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """One call of a comparison: its name, which pass, tokens, time, and bytes of extra memory (None: not known)."""

    call: str
    which: str
    length: int
    timing: Timing
    memory: int | None


@dataclass(frozen=True)
class Row:
    """One figure beside its goal.

    what: in words. length: tokens, N. unit: "x" (times faster), "%" (of a rate), "us" or "MB". value: the figure, NaN
    where nothing could be measured; low, high: where its inputs' quartiles would put it. goal: None where there is
    none. detail: the times behind it, or why there are none. smaller: is a smaller value the better one? behind: the
    calls that the row is about, for plots.
    """

    what: str
    length: int
    unit: str
    value: float
    low: float
    high: float
    goal: float | None
    detail: str
    smaller: bool = False
    behind: tuple[Measured, ...] = ()

    @property
    def figure(self) -> str:
        if math.isnan(self.value):
            return ""
        spread = f" ({_number(self.low)}-{_number(self.high)})" if self.low != self.high else ""
        return f"{_number(self.value)} {self.unit}{spread}"

    @property
    def verdict(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        if self.goal is None:
            return ""
        if self.smaller:
            return "reached" if self.value <= self.goal else "missed"
        if self.value >= self.goal:
            return "reached"
        return "half reached" if self.value >= self.goal / 2 else "below half"


def ratio_row(what: str, length: int, slow: Timing | Measured, fast: Timing | Measured, goal: float | None) -> Row:
    """How many times faster ``fast`` is than ``slow``; both from one run."""
    behind = tuple(x for x in (slow, fast) if isinstance(x, Measured))
    slow, fast = (x.timing if isinstance(x, Measured) else x for x in (slow, fast))
    return Row(
        what, length, "x", slow.median_us / fast.median_us, slow.low_us / fast.high_us, slow.high_us / fast.low_us,
        goal, f"{_time(slow)} against {_time(fast)}", behind=behind,
    )  # fmt: skip


def missing_row(what: str, length: int, goal: float | None, why: str) -> Row:
    """Stands where a comparison could not be made."""
    return Row(what, length, "x", math.nan, math.nan, math.nan, goal, why)


def rate_row(
    what: str, length: int, flops: float, took: Timing, mm_flops: float, mm: Timing, goal: float | None
) -> Row:
    """The rate of ``took``, which did ``flops``, in percent of that of ``mm``; both from one run."""

    def percent(own_us: float, mm_us: float) -> float:
        return 100 * (flops / own_us) / (mm_flops / mm_us)

    return Row(
        what, length, "%", percent(took.median_us, mm.median_us), percent(took.high_us, mm.low_us),
        percent(took.low_us, mm.high_us), goal,
        f"{_time(took)}, {flops / took.median_us / 1e3:.0f} GFLOP/s; mm {mm_flops / mm.median_us / 1e3:.0f} GFLOP/s",
    )  # fmt: skip


def refuse_if_off(what: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raises RuntimeError where a result is off by far more than rounding: in fp32 by over 1e-4 of the largest value,
    in fp16 and bf16 by over 32 eps of it."""
    eps = torch.finfo(got[0].dtype).eps
    off = max(deviation(a, b) for a, b in zip(got, wanted, strict=True))
    if not off <= max(1e-4, 32 * eps if eps > 1e-4 else 0.0):
        raise RuntimeError(f"{what} is wrong on this machine, by {off:.1e} of the largest value: nothing was measured")


def machine_facts() -> dict[str, str]:
    problem = engine_problem()
    return {
        "CPU": machine.model_name(),
        "vectors": machine.supported_levels()[0].name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": installed("triton") or "none",
        "compiler": compiler(),
        "kernels": "CPU engine" if problem is None else f"references, for {problem}",
        "load at the start": f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "not known",
        "date": date.today().isoformat(),
    }


def markdown(bench: str, rows: Sequence[Row], facts: dict[str, str]) -> str:
    lines = [
        f"# Benchmarks: {bench.replace('_', ' ')}",
        "",
        "B=1, H=8, D=64, fp32. Medians of one run in which the compared calls take turns; in brackets where the "
        "quartiles would put the figure. Made by `make bench`.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| | N | measured | goal | | behind it |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"{'below ' if row.smaller else ''}{row.goal:g} {row.unit}"
        lines.append(f"| {row.what} | {row.length} | {row.figure} | {goal} | {row.verdict} | {row.detail} |")
    return "\n".join([*lines, ""])


def write(bench: str, rows: Sequence[Row], facts: dict[str, str], folder: Path = RESULTS) -> Path:
    """Writes ``folder``/<machine>/<bench>.md and .json, which no other bench touches; returns the former's path."""
    kind = "-".join([facts["CPU"], facts["vectors"], facts["threads"], "threads"])
    path = folder / slug(kind) / f"{bench}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(markdown(bench, rows, facts))
    figures = [fields_of(row) for row in rows]
    path.with_suffix(".json").write_text(json.dumps({"machine": facts, "rows": figures}, indent=1) + "\n")
    return path


def slug(name: str) -> str:
    """A name for a folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fields_of(row: Row) -> dict[str, Any]:
    """A row for JSON, which has no NaN: None stands there instead."""
    fields = {**asdict(row), "figure": row.figure, "verdict": row.verdict}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def _time(timing: Timing) -> str:
    return f"{timing.median_us / 1e3:.1f} ms (of {timing.runs})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.2g}" if value < 1 else f"{value:.1f}"
