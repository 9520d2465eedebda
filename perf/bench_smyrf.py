"""SMYRF, 4 rounds of 64, against torch's dense attention: ``python -m perf smyrf``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import fastattn
from perf import versus
from perf.versus import BOTH, FORWARD, HEAD_DIM, Bench, Method

ROUNDS, CLUSTER = 4, 64
GOALS = {FORWARD: {1024: 1.3, 4096: 6.0, 16384: 25.0}, BOTH: {1024: 1.3, 4096: 5.0, 16384: 20.0}}
MEMORY_GOALS = {BOTH: {16384: 400.0}}  # MB


def _build(length: int) -> versus.Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        return fastattn.smyrf_attention(
            q, k, v, n_hashes=ROUNDS, q_cluster_size=CLUSTER, projections=_projections(q.device), impl=impl
        )

    return attention


@cache
def _projections(device: torch.device) -> Tensor:
    return torch.randn(HEAD_DIM + 2, ROUNDS, generator=torch.Generator().manual_seed(4)).to(device)


METHOD = Method(f"SMYRF, {ROUNDS} rounds of {CLUSTER}", _build, (versus.dense(GOALS),), MEMORY_GOALS)
BENCH = Bench((METHOD,), {1024: 8.0, 4096: 12.0, 16384: 60.0})
