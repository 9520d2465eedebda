"""SMYRF, 4 rounds of 64, against torch's dense attention: ``python -m perf.bench_smyrf``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
# The original is no package to install. It once took these times of SDPA's, on two threads of this kind of machine.
ORIGINAL = {1024: 0.101 / 0.0165, 4096: 0.271 / 0.275, 16384: 1.005 / 4.22}
ORIGINAL_GOALS = {1024: 6.0, 4096: 5.0, 16384: 5.0}


def _build(length: int) -> versus.Attention:
    projections = torch.randn(HEAD_DIM + 2, ROUNDS, generator=torch.Generator().manual_seed(4))
    return partial(fastattn.smyrf_attention, n_hashes=ROUNDS, q_cluster_size=CLUSTER, projections=projections)


METHOD = Method(f"SMYRF, {ROUNDS} rounds of {CLUSTER}", _build, (versus.dense(GOALS),), MEMORY_GOALS)


def rows(
    lengths: Sequence[int] = versus.LENGTHS, seconds: Mapping[int, float] = SECONDS, *, with_peers: bool = False
) -> Iterator[Row]:
    for row in versus.rows(METHOD, lengths, seconds, with_peers=with_peers):
        yield row
        if row.length in ORIGINAL and row.what == f"{METHOD.name}, {FORWARD}, against SDPA":
            yield _against_original(row, ORIGINAL[row.length])


def _against_original(row: Row, share: float) -> Row:
    """From the row against SDPA, of which the original took ``share`` times the time."""
    return replace(
        row,
        what=f"{METHOD.name}, {FORWARD}, against the original",
        value=share * row.value,
        low=share * row.low,
        high=share * row.high,
        goal=ORIGINAL_GOALS[row.length],
        detail=f"not run here: taken as {share:.2g} times SDPA, as once measured on such a machine",
    )


if __name__ == "__main__":
    from perf.__main__ import main

    main(["smyrf"])
