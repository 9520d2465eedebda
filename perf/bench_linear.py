"""Linear attention with elu + 1, causal too, against torch and fast-transformers: ``python -m perf linear``."""

from __future__ import annotations

from functools import partial

import fastattn
from perf import versus
from perf.versus import FORWARD, Bench, Method, Rival

GOALS = {FORWARD: {1024: 6.0, 4096: 6.0, 16384: 8.0}}
CAUSAL_GOALS = {FORWARD: {1024: 6.0, 4096: 6.0, 16384: 6.0}}

METHOD = Method(
    "linear",
    lambda length: fastattn.linear_attention,
    (versus.dense({}), Rival("fast-transformers' linear", GOALS, agrees=True)),
)
CAUSAL = Method(
    "causal linear",
    lambda length: partial(fastattn.linear_attention, is_causal=True),
    (
        versus.dense({}, is_causal=True),
        Rival("fast-transformers' causal linear", CAUSAL_GOALS, agrees=True),
        Rival("flash-linear-attention's causal linear", agrees=True),
    ),
)
BENCH = Bench((METHOD, CAUSAL), {1024: 4.0, 4096: 8.0, 16384: 40.0})
