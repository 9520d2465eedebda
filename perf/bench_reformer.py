"""Reformer's LSH attention, causal, 4 rounds of 64, against torch's dense attention: ``python -m perf reformer``.

Hashing and sorting are part of what is timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fastattn
from perf import versus
from perf.versus import BOTH, FORWARD, Bench, Method, Rival

ROUNDS, BUCKET = 4, 64
GOALS = {FORWARD: {4096: 2.0, 16384: 7.0}}
PEER_GOALS = {FORWARD: {1024: 8.0, 4096: 8.0, 16384: 8.0}}
MEMORY_GOALS = {BOTH: {16384: 400.0}}  # MB


def _build(length: int) -> versus.Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
        """k is left out: keys are the queries."""
        generator = torch.Generator(q.device).manual_seed(4)  # the same rotations in each call
        return fastattn.lsh_attention(
            q, v, n_hashes=ROUNDS, bucket_size=BUCKET, is_causal=True, generator=generator, impl=impl
        )

    return attention


METHOD = Method(
    f"Reformer causal, {ROUNDS} rounds of {BUCKET}",
    _build,
    (
        versus.dense(GOALS, is_causal=True),
        Rival("reformer-pytorch", PEER_GOALS),
        Rival("transformers' LSH attention"),
    ),
    MEMORY_GOALS,
)
BENCH = Bench((METHOD,), {1024: 8.0, 4096: 15.0, 16384: 70.0})
