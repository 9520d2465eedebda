"""One long synthetic sequence: SMYRF against torch's dense attention, in time and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from fastattn.autotune.measure import take_turns
from fastattn.cli.memory import extra_memory
from fastattn.methods.smyrf import smyrf_attention

LENGTHS = (1024, 4096, 16384)
HEADS, HEAD_DIM = 8, 64
N_HASHES, CLUSTER = 4, 64
SECONDS = 1.0  # of timing at each length; a first turn is finished however long it takes
STEPS = 2 * len(LENGTHS)


@dataclass(frozen=True)
class Row:
    """length: tokens. Seconds of one forward, medians of turns; extra bytes at its peak, None if unknown."""

    length: int
    dense_seconds: float
    smyrf_seconds: float
    dense_memory: int | None
    smyrf_memory: int | None


@torch.inference_mode()
def compare(length: int, on_step: Callable[[], object]) -> Row:
    """B=1, H=8, D=64, fp32, random normal q, k and v. The runs that measure memory are the timed runs' warm-up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))
    projections = torch.randn(HEAD_DIM + 2, N_HASHES, generator=generator)
    calls = {
        "dense": lambda: scaled_dot_product_attention(q, k, v),
        "smyrf": lambda: smyrf_attention(q, k, v, n_hashes=N_HASHES, q_cluster_size=CLUSTER, projections=projections),
    }
    calls["smyrf"]()  # builds or loads its kernel, which is no memory that it needs
    seconds: dict[str, float] = {}

    def timed(name: str) -> torch.Tensor:
        start = time.perf_counter()
        out = calls[name]()
        seconds[name] = time.perf_counter() - start
        return out

    memory = {name: extra_memory(partial(timed, name)) for name in calls}
    on_step()
    short = {name: call for name, call in calls.items() if seconds[name] < SECONDS}
    times = take_turns(short, time.monotonic() + SECONDS, give_up=math.inf)
    seconds |= {name: timing.median_us * 1e-6 for name, timing in times.items()}
    on_step()
    return Row(length, seconds["dense"], seconds["smyrf"], memory["dense"], memory["smyrf"])
