"""The steps of the stages that are no tests: ``python -m perf.gpu_steps STAGE JOURNAL DEADLINE --device cuda``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perf import gpu_model
from perf.__main__ import METHODS
from perf.gpu_journal import Journal
from perf.gpu_take import Do, Options, Steps, take
from perf.report import fields_of
from perf.versus import Place

if TYPE_CHECKING:
    from fastattn.autotune.tune import Outcome

LENGTHS = {"cpu": (1024, 4096), "gpu": (1024, 4096, 16384, 65536)}
QUICK_KERNELS = ("cluster_attention_broadcast", "linear_attention_step")
QUICK_LENGTH = 256
SHARE_OF_TIMING = 0.6  # of a benchmark's time; the rest is for building, checking and measuring memory


def tuning(options: Options) -> Iterator[str]:
    """Every kernel in the dtypes that the device is for; on a GPU half precision first, and a larger head dim last."""
    from fastattn.autotune.rooms import kernel_names

    kernels = QUICK_KERNELS if options.quick else kernel_names()
    kinds = [("fp32", 64)] if options.is_cpu else [("fp16", 64), ("fp32", 64), ("fp16", 128)]
    for dtype, head_dim in kinds:
        for kernel in kernels:
            yield f"{kernel} {dtype} D{head_dim}"


def tune(step: str, seconds: float, options: Options) -> dict[str, Any]:
    """Without the flags of causal attention and other options, for which there is no time."""
    from fastattn.cli.tune import tune_kernels

    kernel, dtype, head_dim = step.split()
    dims = [int(head_dim.removeprefix("D"))]
    tuned = tune_kernels(kernel, seconds, dtypes=[dtype], head_dims=dims, device=options.device, plain=True)
    if kernel in tuned.refused:
        raise RuntimeError(tuned.refused[kernel])
    return {"inputs": [_tuned(outcome) for outcome in tuned.outcomes], "left": tuned.left}


def benches(options: Options) -> Iterator[str]:
    """Short lengths of all methods first."""
    lengths = (QUICK_LENGTH,) if options.quick else LENGTHS["cpu" if options.is_cpu else "gpu"]
    for length in lengths:
        for name in ("linear",) if options.quick else METHODS:
            yield f"{name} N={length}"


def bench(step: str, seconds: float, options: Options) -> dict[str, Any]:
    name, _, length = step.partition(" N=")
    place = Place(torch.device(options.device), torch.float32 if options.is_cpu else torch.float16)
    it = METHODS[name]
    timing = SHARE_OF_TIMING * seconds / len(it.methods)
    rows = it.rows((int(length),), {int(length): timing}, with_peers=True, with_definition=True, place=place)
    return {"rows": [fields_of(row) for row in rows]}


def compared(options: Options) -> Iterator[str]:
    yield from gpu_model.kernels(torch.device(options.device))


def compare(step: str, seconds: float, options: Options) -> dict[str, Any]:
    return {"entries": [asdict(x) for x in gpu_model.compare(step, torch.device(options.device))]}


STAGES: dict[str, tuple[Steps, Do]] = {
    "tune": (tuning, tune),
    "bench": (benches, bench),
    "compare": (compared, compare),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu_steps")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("journal", type=Path)
    parser.add_argument("deadline", type=float, help="seconds since 1970")
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    steps, do = STAGES[chosen.stage]
    take(chosen.stage, steps, do, Journal(chosen.journal), chosen.deadline, Options(chosen.device, chosen.quick))


def _tuned(outcome: Outcome) -> dict[str, Any]:
    default = next((row for row in outcome.rows if row.launch_config() == outcome.default), None)
    chosen = outcome.chosen
    refused = [row for row in outcome.rows if row.verdict != "ok"]
    return {
        "sizes": outcome.rows[0].problem if outcome.rows else outcome.key.shape,
        "flags": outcome.key.flags,
        "tried": len(outcome.rows),
        "left": outcome.left,
        "refused": [{"config": x.config.model_dump(), "verdict": x.verdict, "why": x.reason} for x in refused],
        "first_us": None if default is None else default.time_us,
        "chosen": None if chosen is None else chosen.config.model_dump(),
        "chosen_us": None if chosen is None else chosen.time_us,
    }


if __name__ == "__main__":
    main()
