"""Clustered attention, 100 clusters, against torch's dense attention: ``python -m perf clustered``.

Hashing and Lloyd's algorithm are part of what is timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn
from perf import versus
from perf.versus import BOTH, FORWARD, Bench, Method, Rival

CLUSTERS = 100
GOALS = {FORWARD: {4096: 8.0, 16384: 35.0}}
PEER_GOALS = {FORWARD: {4096: 9.0, 16384: 11.0}}
MEMORY_GOALS = {BOTH: {16384: 400.0}}  # MB


def _build(length: int) -> versus.Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        generator = torch.Generator(q.device).manual_seed(4)  # the same clusters in each call
        return fastattn.clustered_attention(q, k, v, n_clusters=CLUSTERS, generator=generator, impl=impl)

    return attention


METHOD = Method(
    f"clustered, {CLUSTERS} clusters",
    _build,
    (versus.dense(GOALS), Rival("fast-transformers' clustered", PEER_GOALS)),
    MEMORY_GOALS,
)
BENCH = Bench((METHOD,), {1024: 6.0, 4096: 12.0, 16384: 60.0})
