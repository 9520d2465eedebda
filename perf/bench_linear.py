"""Linear attention with elu + 1, causal too, against torch and fast-transformers: ``python -m perf.bench_linear``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import fastattn
from perf import versus
from perf.report import Row
from perf.versus import FORWARD, Method, Rival

SECONDS = {1024: 4.0, 4096: 8.0, 16384: 40.0}  # of timing, by length
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
    (versus.dense({}, is_causal=True), Rival("fast-transformers' causal linear", CAUSAL_GOALS, agrees=True)),
)


def rows(
    lengths: Sequence[int] = versus.LENGTHS, seconds: Mapping[int, float] = SECONDS, *, with_peers: bool = False
) -> Iterator[Row]:
    for method in (METHOD, CAUSAL):
        yield from versus.rows(method, lengths, seconds, with_peers=with_peers)


if __name__ == "__main__":
    from perf.__main__ import main

    main(["linear"])
