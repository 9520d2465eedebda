"""SMYRF, 4 rounds of 64, against torch's dense attention: ``python -m perf.bench_smyrf``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn.autotune.measure import take_turns
from fastattn.cli.memory import extra_memory
from perf.report import Row, ratio_row, refuse_if_off

HEADS, HEAD_DIM = 8, 64
ROUNDS, CLUSTER = 4, 64
SECONDS = {1024: 10.0, 4096: 15.0, 16384: 70.0}  # of timing, by length
FORWARD_GOALS = {1024: 1.3, 4096: 6.0, 16384: 25.0}
BOTH_GOALS = {1024: 1.3, 4096: 5.0, 16384: 20.0}
MEMORY_GOAL_MB = 400.0  # forward and backward at the longest length


def rows(lengths: tuple[int, ...] = (1024, 4096, 16384), seconds: dict[int, float] = SECONDS) -> Iterator[Row]:
    _check()
    for length in lengths:
        calls, memory = _calls(length), {}
        for name, call in calls.items():
            call()  # builds or loads kernels
            memory[name] = extra_memory(call)
        times = take_turns(calls, time.monotonic() + seconds[length], give_up=math.inf)
        what = f"SMYRF, {ROUNDS} rounds of {CLUSTER}"
        yield ratio_row(
            f"{what}, forward, against SDPA", length,
            times["SDPA forward"], times["SMYRF forward"], FORWARD_GOALS.get(length),
        )  # fmt: skip
        yield ratio_row(
            f"{what}, forward + backward, against SDPA", length,
            times["SDPA both"], times["SMYRF both"], BOTH_GOALS.get(length),
        )  # fmt: skip
        for name in ("forward", "both"):
            used = memory[f"SMYRF {name}"]
            if used is None:
                continue
            dense = memory[f"SDPA {name}"] or 0
            goal = MEMORY_GOAL_MB if (name, length) == ("both", 16384) else None
            passes = "forward + backward" if name == "both" else "forward"
            detail = f"results included; SDPA {dense / 1e6:.0f} MB"
            yield Row(
                f"{what}, {passes}, extra peak memory", length, "MB", used / 1e6, used / 1e6, used / 1e6,
                goal, detail, smaller=True,
            )  # fmt: skip


def _check() -> None:
    """No speed is reported of a kernel that is wrong: it must agree with the definition, forward and backward."""
    q, k, v, dout = (torch.randn(1, 2, 320, HEAD_DIM, generator=torch.Generator().manual_seed(i)) for i in range(4))
    projections = torch.randn(HEAD_DIM + 2, ROUNDS, generator=torch.Generator().manual_seed(4))
    results = []
    for impl in (None, "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fastattn.smyrf_attention(*leaves, q_cluster_size=CLUSTER, projections=projections, impl=impl)
        assert isinstance(out, Tensor)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    refuse_if_off("SMYRF", *results)


def _calls(length: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in range(4))
    projections = torch.randn(HEAD_DIM + 2, ROUNDS, generator=generator)

    def smyrf(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fastattn.smyrf_attention(q, k, v, n_hashes=ROUNDS, q_cluster_size=CLUSTER, projections=projections)
        assert isinstance(out, Tensor)
        return out

    def forward(attention: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.inference_mode()(lambda: attention(q, k, v))

    def both(attention: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def call() -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(attention(*leaves), leaves, dout)

        return call

    return {
        "SDPA forward": forward(scaled_dot_product_attention),
        "SMYRF forward": forward(smyrf),
        "SDPA both": both(scaled_dot_product_attention),
        "SMYRF both": both(smyrf),
    }


if __name__ == "__main__":
    from perf.__main__ import main

    main(["smyrf"])
