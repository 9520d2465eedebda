"""What a call costs beyond its work, and what a second thread gains: ``python -m perf.bench_launch``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.measure import Timing, take_turns
from fastattn.ops.block_attention import attend_blocks
from fastattn.ops.library import define_op
from perf.report import Row, ratio_row, refuse_if_off

HEADS, HEAD_DIM = 8, 64
ROUNDS, BLOCK = 4, 64
TINY = 16  # rows, one head, one block: a call that has next to nothing to do
CALLS = 100  # a turn of the overhead's: after the first few everything that a call needs is in the caches
SECONDS = 8.0  # for each group of calls
OVERHEAD_GOAL_US = 15.0
THREADS_GOAL = 1.8  # of two
FORWARD = torch.ops.fastattn.block_attention.default
BACKWARD = torch.ops.fastattn.block_attention_backward.default


def rows(length: int = 4096, seconds: float = SECONDS) -> Iterator[Row]:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield from _overhead(seconds)
        if threads > 1:
            yield from _threads(threads, length, seconds)
    finally:
        torch.set_num_threads(threads)


def _overhead(seconds: float) -> Iterator[Row]:
    """One thread. The outputs are allocated and filled within what is counted as ours."""
    calls: dict[str, Callable[[], object]] = {}
    for rounds in (1, ROUNDS):
        q, k, v, q_index, k_index = _inputs(1, TINY, rounds, TINY)
        args = (q, k, v, q_index, k_index, 0.25, True)
        refuse_if_off("a launch", FORWARD(*args), attend_blocks(*args[:5], scale=0.25, impl="reference"))
        calls[f"rounds {rounds}"] = _loop(FORWARD, args)
        calls[f"dispatch {rounds}"] = _loop(_nothing(), args)
    turns = take_turns(calls, time.monotonic() + seconds, give_up=math.inf)
    times = {name: _of_one_call(turn) for name, turn in turns.items()}
    for rounds in (1, ROUNDS):
        what = f"a call beyond torch's dispatch, {rounds} round{'s' if rounds > 1 else ''}"
        yield _difference_row(what, TINY, times[f"rounds {rounds}"], times[f"dispatch {rounds}"], OVERHEAD_GOAL_US)


def _threads(threads: int, length: int, seconds: float) -> Iterator[Row]:
    q, k, v, q_index, k_index = _inputs(HEADS, length, ROUNDS, BLOCK)
    args = (q, k, v, q_index, k_index, 1 / math.sqrt(HEAD_DIM), True)
    out, lse = FORWARD(*args)
    passes = {"forward": (FORWARD, args), "backward": (BACKWARD, (torch.randn_like(q), *args[:5], out, lse, *args[5:]))}

    def call_with(count: int, op: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
        def call() -> Any:
            torch.set_num_threads(count)
            return op(*args)

        return torch.inference_mode()(call)

    for name, (op, given) in passes.items():
        calls = {count: call_with(count, op, given) for count in (1, threads)}
        refuse_if_off(f"{name} on {threads} threads", calls[threads](), calls[1]())
        times = take_turns(calls, time.monotonic() + seconds, give_up=math.inf)
        what = f"block attention, {ROUNDS} rounds of {BLOCK}, {name}, {threads} threads against 1"
        yield ratio_row(what, length, times[1], times[threads], THREADS_GOAL if threads == 2 else None)


def _loop(op: Any, args: tuple[Any, ...]) -> Callable[[], object]:
    def loop() -> None:
        for _ in range(CALLS):
            op(*args)

    return torch.inference_mode()(loop)


def _of_one_call(turn: Timing) -> Timing:
    return Timing(turn.median_us / CALLS, turn.low_us / CALLS, turn.high_us / CALLS, turn.runs)


@lru_cache
def _nothing() -> Any:
    """An op of block attention's signature that returns what it once made."""
    results = (torch.empty(1, 1, TINY, TINY), torch.empty(1, 1, TINY))
    schema = str(FORWARD._schema).removeprefix("fastattn::").replace("block_attention", "do_nothing", 1)
    return define_op(schema, lambda *args: results, fake=lambda *args: results)


def _inputs(heads: int, length: int, rounds: int, block: int) -> tuple[Tensor, ...]:
    """q, k, v and a random partition of the rows into blocks for each head and round."""
    generator = torch.Generator().manual_seed(0)
    dim = HEAD_DIM if length > TINY else TINY
    q, k, v = (torch.randn(1, heads, length, dim, generator=generator) for _ in range(3))

    def index() -> Tensor:
        order = torch.rand(heads * rounds, length, generator=generator).argsort(-1)
        return order.int().view(1, heads, rounds, length // block, block)

    return q, k, v, index(), index()


def _difference_row(what: str, length: int, whole: Timing, part: Timing, goal: float) -> Row:
    return Row(
        what, length, "us", whole.median_us - part.median_us, whole.low_us - part.high_us, whole.high_us - part.low_us,
        goal, f"{whole.median_us:.1f} us (of {whole.runs} turns of {CALLS}), of which dispatch {part.median_us:.1f} us",
        smaller=True,
    )  # fmt: skip


if __name__ == "__main__":
    from perf.__main__ import main

    main(["launch"])
