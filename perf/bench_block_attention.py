"""The CPU engine's rate on block attention, in percent of ``torch.mm``'s: ``python -m perf.bench_block_attention``.

A dense flash kernel is block attention with one block that holds every row: the same kernel, its gathers in order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.autotune.measure import take_turns
from fastattn.kernels.block_attention import cost
from fastattn.ops.block_attention import attend_blocks
from perf.report import Row, rate_row, ratio_row, refuse_if_off

HEADS, HEAD_DIM = 8, 64
BACKWARD = ("block_attention_backward_dq", "block_attention_backward_dkv")
MM_SIZE = 2048
SECONDS = {1024: 6.0, 4096: 12.0, 16384: 40.0}
DENSE_GOAL = 80.0
BLOCK_GOALS = {64: 45.0, 128: 55.0, 256: 62.0}
BACKWARD_BLOCK, BACKWARD_GOAL = 128, 45.0
BLOCK_LENGTHS = (4096, 16384)  # goals are for these; a call at 1,024 is over in a fraction of a millisecond


def rows(lengths: tuple[int, ...] = (1024, 4096, 16384), seconds: dict[int, float] = SECONDS) -> Iterator[Row]:
    _check()
    a, b = (torch.randn(MM_SIZE, MM_SIZE) for _ in range(2))
    mm_flops = 2 * MM_SIZE**3
    yield _yardstick(a, b, seconds[lengths[0]] / 3)
    for length in lengths:
        sizes = {"dense": length}
        if length in BLOCK_LENGTHS:
            sizes |= {str(size): size for size in BLOCK_GOALS}
        calls: dict[str, Callable[[], object]] = {"mm": lambda: torch.mm(a, b)}
        calls |= {name: _call(length, size) for name, size in sizes.items()}
        if length in BLOCK_LENGTHS:
            calls["backward"] = _backward_call(length, BACKWARD_BLOCK)
        for call in calls.values():
            call()
        times = take_turns(calls, time.monotonic() + seconds[length], give_up=math.inf)
        for name, size in sizes.items():
            is_dense = name == "dense"
            what = "dense flash kernel" if is_dense else f"block attention, blocks of {size}"
            goal = DENSE_GOAL if is_dense else BLOCK_GOALS[size]
            work = _flops(length, size)
            yield rate_row(
                f"engine: {what}, of torch.mm's rate", length, work, times[name], mm_flops, times["mm"], goal
            )
        if "backward" in times:
            what = f"engine: block attention backward, blocks of {BACKWARD_BLOCK}, of torch.mm's rate"
            work = sum(_flops(length, BACKWARD_BLOCK, kernel) for kernel in BACKWARD)
            yield rate_row(what, length, work, times["backward"], mm_flops, times["mm"], BACKWARD_GOAL)


def _yardstick(a: Tensor, b: Tensor, seconds: float) -> Row:
    """How well ``torch.mm`` itself uses the threads: where it gains little from them, percentages of it flatter us."""
    threads = torch.get_num_threads()

    def mm_with(count: int) -> Callable[[], object]:
        def call() -> Tensor:
            torch.set_num_threads(count)
            return torch.mm(a, b)

        return call

    calls = {count: mm_with(count) for count in (1, threads)}
    try:
        for call in calls.values():
            call()
        times = take_turns(calls, time.monotonic() + seconds, give_up=math.inf)
    finally:
        torch.set_num_threads(threads)
    return ratio_row(f"the yardstick: torch.mm, {threads} threads against 1", MM_SIZE, times[1], times[threads], None)


def _check() -> None:
    """No rate is reported of a kernel that is wrong: one block that holds all rows must be dense attention."""
    q, k, v = (torch.randn(1, 2, 320, HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(3))
    index = torch.arange(320, dtype=torch.int32).expand(1, 2, 1, 1, 320).contiguous()
    out, _ = attend_blocks(q, k, v, index, index)
    refuse_if_off("block attention", (out,), (scaled_dot_product_attention(q, k, v),))


def _call(length: int, block: int) -> Callable[[], object]:
    """One round of blocks of ``block`` rows, in a random order; in their own order where one block holds them all."""
    q, k, v, q_index, k_index = _inputs(length, block)
    return torch.inference_mode()(lambda: attend_blocks(q, k, v, q_index, k_index))


def _backward_call(length: int, block: int) -> Callable[[], object]:
    q, k, v, q_index, k_index = _inputs(length, block)
    for x in (q, k, v):
        x.requires_grad_()
    out, _ = attend_blocks(q, k, v, q_index, k_index)
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def _inputs(length: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(3))

    def index() -> Tensor:
        if block == length:
            rows = torch.arange(length).expand(HEADS, length)
        else:
            rows = torch.stack([torch.randperm(length, generator=generator) for _ in range(HEADS)])
        return rows.int().reshape(1, HEADS, 1, length // block, block).contiguous()

    return q, k, v, index(), index()


def _flops(length: int, block: int, kernel: str = "block_attention_forward") -> float:
    return cost(
        kernel, batch=1, heads=HEADS, rounds=1, n_blocks=length // block, c_q=block, c_k=block,
        head_dim=HEAD_DIM, value_dim=HEAD_DIM,
    ).flops  # fmt: skip


if __name__ == "__main__":
    from perf.__main__ import main

    main(["block_attention"])
