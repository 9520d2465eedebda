"""SMYRF, 4 rounds of 64, against torch's dense attention: ``python -m perf.bench_smyrf``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

import fastattn
from perf import versus
from perf.report import Row
from perf.versus import BOTH, FORWARD, HEAD_DIM, Method

ROUNDS, CLUSTER = 4, 64
SECONDS = {1024: 8.0, 4096: 12.0, 16384: 60.0}  # of timing, by length
GOALS = {FORWARD: {1024: 1.3, 4096: 6.0, 16384: 25.0}, BOTH: {1024: 1.3, 4096: 5.0, 16384: 20.0}}
MEMORY_GOALS = {BOTH: {16384: 400.0}}  # MB


def _build(length: int) -> versus.Attention:
    projections = torch.randn(HEAD_DIM + 2, ROUNDS, generator=torch.Generator().manual_seed(4))
    return partial(fastattn.smyrf_attention, n_hashes=ROUNDS, q_cluster_size=CLUSTER, projections=projections)


METHOD = Method(f"SMYRF, {ROUNDS} rounds of {CLUSTER}", _build, (versus.dense(GOALS),), MEMORY_GOALS)


def rows(
    lengths: Sequence[int] = versus.LENGTHS, seconds: Mapping[int, float] = SECONDS, *, with_peers: bool = False
) -> Iterator[Row]:
    return versus.rows(METHOD, lengths, seconds, with_peers=with_peers)


if __name__ == "__main__":
    from perf.__main__ import main

    main(["smyrf"])
