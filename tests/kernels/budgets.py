"""What every kernel may cost on every GPU, as it comes: ``make budgets``, and ``--record`` after a change on purpose.

A budget is a line of budgets.csv: a kernel, a target, how many instructions its fp16 binary has, and which of those it
has that it is fast by: tensor cores, and copies to shared memory that run beside the work.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fastattn.autotune.source import ROOMS
from fastattn.kernels.ahead import compile_launch, shared_memory_limit
from fastattn.kernels.block_attention import Pattern

TABLE = Path(__file__).with_name("budgets.csv")
NVIDIA = ("cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120")
TARGETS = (*NVIDIA, "hip:gfx942")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIM = 64
# Other sizes, and block attention as Reformer has it, have no budget of instructions, and are compiled in the type that
# takes the most registers, for one GPU of each kind of tensor core.
SIZES: list[dict[str, Any]] = [{"head_dim": 128}, {"head_dim": 40}]
MORE_SIZES: dict[str, list[dict[str, Any]]] = {
    "block_attention": [{"c_q": 128, "c_k": 128}, {"pattern": "reformer", "n_used_blocks": True}],
    "topk_attention": [{"top_k": 64}],
}
PATTERNS = {"reformer": Pattern(is_causal=True, exclude_self=True, last_resort=True)}
ONE_OF_EACH = ("cuda:90", "cuda:120", "hip:gfx942")
SLACK = 1.25  # of the instructions: what bf16, another release of Triton or a small change may add
ROUNDING = 1.4  # the same where bf16 is rounded to without an instruction for it, as on gfx942: several for each value
_ASYNCHRONOUS = ("LDGSTS", "UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Case:
    kernel: str
    target: str
    dtype: torch.dtype
    sizes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        sizes = "".join(f"-{name}={size}" for name, size in self.sizes)
        return f"{self.kernel}-{self.target}-{dtype_name(self.dtype)}{sizes}"


@dataclass(frozen=True)
class Cost:
    """Of a kernel's binary. uses: tensor-core instructions and asynchronous copies that it has. shared_limit: bytes of
    shared memory that a thread block may have there. has_dot: one that tensor cores can do."""

    instructions: int
    uses: tuple[str, ...]
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int
    shared_limit: int
    has_dot: bool
    has_tf32: bool
    on_tensor_cores: bool


@dataclass(frozen=True)
class Budget:
    instructions: int
    uses: tuple[str, ...]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernels() -> dict[str, str]:
    """Every kernel of ours, with its room."""
    return {name: room for room in ROOMS for name in import_module(f"fastattn.kernels.{room}").KERNELS}


def cases(kernel: str) -> list[Case]:
    """A kernel on every GPU in every dtype, and other sizes of it."""
    found = [Case(kernel, target, dtype) for target in TARGETS for dtype in DTYPES]
    for sizes in SIZES + MORE_SIZES.get(kernels()[kernel], []):
        found += [Case(kernel, target, torch.bfloat16, tuple(sizes.items())) for target in ONE_OF_EACH]
    return found


def measure(case: Case) -> Cost:
    """Compiles a kernel with the configuration that its heuristic chooses."""
    room = import_module(f"fastattn.kernels.{kernels()[case.kernel]}")
    sizes = {"head_dim": HEAD_DIM} | dict(case.sizes)
    if "pattern" in sizes:
        sizes["pattern"] = PATTERNS[sizes["pattern"]]
    launch = room.example_launch(case.kernel, case.dtype, device_type=case.target, **sizes)
    compiled = compile_launch(launch, case.target)
    tensor_cores = compiled.tensor_core_instructions
    uses = [name.split("_f")[0] if name.startswith("v_") else name for name in tensor_cores]
    return Cost(
        instructions=compiled.instructions.total(),
        uses=tuple(sorted({*uses, *(name for name in _ASYNCHRONOUS if compiled.instructions[name])})),
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        shared_limit=shared_memory_limit(case.target),
        has_dot=any(_is_for_tensor_cores(line) for line in compiled.asm["ttir"].splitlines()),
        # three products in TF32 make one that is exact enough for fp32
        has_tf32="tf32" in compiled.asm.get("ptx", "") and "tf32x3" not in compiled.asm["ttir"],
        on_tensor_cores=bool(tensor_cores),
    )


def _is_for_tensor_cores(line: str) -> bool:
    """Whether a line of Triton's IR is a product that they can do: not one of fp32 as it is."""
    return "tt.dot " in line and ("xf32> *" not in line or "tf32x3" in line)


def recorded() -> dict[tuple[str, str], Budget]:
    with TABLE.open(newline="") as file:
        return {
            (row["kernel"], row["target"]): Budget(int(row["instructions"]), tuple(row["uses"].split()))
            for row in csv.DictReader(file)
        }


def problems(case: Case, cost: Cost) -> list[str]:
    """What a kernel costs too much, in words."""
    found = []
    if cost.spill_bytes:
        found.append(f"spills {cost.spill_bytes} bytes a thread")
    if cost.shared_bytes > cost.shared_limit:
        found.append(f"takes {cost.shared_bytes} bytes of shared memory of {cost.shared_limit}")
    if case.dtype == torch.float32:
        return [*found, "computes in TF32, where fp32 is exact by default"] if cost.has_tf32 else found
    if cost.has_dot and not cost.on_tensor_cores:
        found.append("has dots, but no tensor-core instruction")
    if case.sizes:
        return found
    budget = recorded().get((case.kernel, case.target))
    if budget is None:
        return [*found, f"has no line in {TABLE.name}: python -m tests.kernels.budgets --record"]
    is_rounding = case.target == "hip:gfx942" and case.dtype == torch.bfloat16
    most = round((ROUNDING if is_rounding else SLACK) * budget.instructions)
    if cost.instructions > most:
        found.append(f"has {cost.instructions} instructions, more than {most}")
    if lost := {*budget.uses} - {*cost.uses}:
        found.append(f"has no {', '.join(sorted(lost))} any more")
    return found


def record(costs: dict[Case, Cost]) -> None:
    """Writes new lines for the kernels of ``costs``; the others keep theirs."""
    lines = recorded()
    for case, cost in costs.items():
        if _has_budget(case):
            lines[case.kernel, case.target] = Budget(cost.instructions, cost.uses)
    with TABLE.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["kernel", "target", "instructions", "uses"])
        for key in product(kernels(), TARGETS):
            if key in lines:
                table.writerow([*key, lines[key].instructions, " ".join(lines[key].uses)])


def _has_budget(case: Case) -> bool:
    """Whether the budgets are those of this case."""
    return case.dtype == torch.float16 and not case.sizes


def _measured(case: Case) -> Cost | str:
    try:
        return measure(case)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_COLUMNS = "{:<60}{:>8}{:>6}{:>8}  {}"


def _line(case: Case, cost: Cost | str, said: list[str]) -> str:
    if isinstance(cost, str):
        return _COLUMNS.format(str(case), "", "", "", f"<- {cost}")
    shown = " ".join([*cost.uses, *(f"<- {what}" for what in said)])
    return _COLUMNS.format(str(case), cost.instructions, cost.registers or 0, cost.shared_bytes, shown)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.budgets", description="Kernels on GPUs, compiled.")
    parser.add_argument("--kernel", default="", help="only those whose names begin so")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    parser.add_argument("--record", action="store_true", help=f"write what they cost now to {TABLE.name}; fp16 alone")
    options = parser.parse_args()
    print(_COLUMNS.format("kernel-target-dtype", "instr.", "regs", "shared", "uses"))
    count, wrong = 0, []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # of this process and of those that it starts
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            for kernel in filter(lambda name: name.startswith(options.kernel), kernels()):
                chosen = [case for case in cases(kernel) if not options.record or _has_budget(case)]
                costs = dict(zip(chosen, pool.map(_measured, chosen), strict=True))
                compiled = {case: cost for case, cost in costs.items() if isinstance(cost, Cost)}
                if options.record and len(compiled) == len(costs):
                    record(compiled)
                count += len(costs)
                for case, cost in costs.items():
                    line = _line(case, cost, problems(case, cost) if isinstance(cost, Cost) else [])
                    print(line, flush=True)
                    wrong += [line] if "<-" in line else []
    print("\n".join(["", *wrong]))
    print(f"{count} binaries, {len(wrong)} of them not as they should be")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
