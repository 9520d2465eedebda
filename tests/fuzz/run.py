"""Fuzzes the CPU engine: ``python -m tests.fuzz --programs 2000 --seed 1``."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial

from .check import Report, check, keep, shrunk
from .compare import EXEMPTIONS
from .generate import FEATURES
from .interpreter import Interpreter
from .required import REQUIRED
from .workers import in_processes

BATCH = 10
ENOUGH = 2000  # programs after which every operation must have been met
_interpreter = Interpreter()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Random Triton kernels on the CPU engine."
    )
    parser.add_argument("--programs", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=1, help="of the first program; the next ones count up (1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--without", default="", help=f"features to leave out, with commas: {', '.join(FEATURES)}")
    parser.add_argument("--no-interpreter", action="store_true", help="compare with the evaluation alone")
    parser.add_argument("--shrink", type=float, default=120.0, help="seconds to shrink a failure; 0 doesn't (120)")
    parser.add_argument("--most-failures", type=int, default=5, help="failures to shrink and print in full (5)")
    parser.add_argument("--keep", action="store_true", help="write shrunk failures to tests/fuzz/regressions")
    options = parser.parse_args()
    left_out = {x for x in options.without.split(",") if x}
    if unknown := left_out - set(FEATURES):
        parser.error(f"unknown features: {', '.join(sorted(unknown))}")
    features = [x for x in FEATURES if x not in left_out]

    total = _run(options, features)
    print(
        f"{total.checked} programs checked, {total.interpreted} of them by the interpreter, {total.through_the_door}"
        f" through launch.run; {total.dropped} dropped, for they hang on a value that is not known exactly"
    )
    for why, count in total.exempt.most_common():
        print(f"  {count} not asked of the interpreter: it {EXEMPTIONS[why]}")
    never = [name for name in REQUIRED if name not in total.met]
    print(f"{len(total.met)} operations and types met; of the {len(REQUIRED)} required ones {len(never)} were not")
    for name in never:
        print(f"  never met: {name}")
    for failure in total.failures[: options.most_failures]:
        if options.shrink and failure.where == "engine":
            failure = shrunk(failure, options.shrink)
            if options.keep:
                print(f"kept as {keep(failure)}")
        print(failure)
    seeds = sorted({failure.program.seed for failure in total.failures})
    print(f"{len(total.failures)} failures{f', of seeds {seeds}' if seeds else ''}")
    for lost in total.died:
        print(f"a process died: see python -m tests.fuzz --seed {lost[0]} --programs {len(lost)}")
    too_many = total.dropped * 10 > total.checked + total.dropped
    missing = bool(never) and options.programs >= ENOUGH and not left_out
    return 1 if total.failures or total.died or too_many or missing else 0


def _run(options: argparse.Namespace, features: list[str]) -> Report:
    end = options.seed + options.programs
    batches = [range(at, min(at + BATCH, end)) for at in range(options.seed, end, BATCH)]
    total, started = Report(), time.monotonic()
    work = partial(_batch, features=features, interpret=not options.no_interpreter)
    for done, (seeds, report) in enumerate(in_processes(work, batches, options.jobs, _prepare), 1):
        if report is None:
            total.died.append(seeds)
            print(f"the process of seeds {seeds[0]} to {seeds[-1]} died", flush=True)
            continue
        total.add(report)
        for failure in report.failures:
            print(f"seed {failure.program.seed}, {failure.where}: {failure.reason.splitlines()[0][:300]}", flush=True)
        if done % 10 == 0 or done == len(batches):
            rate = total.checked / (time.monotonic() - started)
            print(f"{total.checked} programs, {rate:.1f} a second, {len(total.failures)} failures", flush=True)
    return total


def _prepare() -> None:
    import torch

    torch.set_num_threads(1)


def _batch(seeds: range, features: list[str], interpret: bool) -> Report:
    return check(seeds, _interpreter if interpret else None, features)
