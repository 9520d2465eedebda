"""``python -m perf [smyrf] [launch] ...``: measure, print, and write a table a bench to ``perf/results/<machine>/``.

``python -m perf methods --peers`` takes the methods alone, with other libraries beside them; ``python -m perf plot``
draws what was measured over the length. ``python -m perf ranking`` holds the tuner's time model against times, and
``python -m perf heuristics`` what kernels run untuned against the best that tuning can find.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from perf import (
    bench_block_attention,
    bench_clustered,
    bench_improved,
    bench_launch,
    bench_linear,
    bench_ort,
    bench_ort_encoder,
    bench_reformer,
    bench_smyrf,
    heuristics,
    plot,
    ranking,
    report,
)
from perf.report import Row

METHODS = {  # each against torch's attention and its peers
    "smyrf": bench_smyrf.BENCH,
    "reformer": bench_reformer.BENCH,
    "clustered": bench_clustered.BENCH,
    "improved": bench_improved.BENCH,
    "linear": bench_linear.BENCH,
}
BENCHES = [*METHODS, "block_attention", "launch", "ort", "ort_encoder"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf", description="Speed and memory against torch, beside goals.")
    parser.add_argument(
        "what",
        nargs="*",
        choices=[[], *BENCHES, "methods", "plot", "ranking", "heuristics"],
        help="benches (default: all), or plot, ranking or heuristics",
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2, which the goals are for)")
    parser.add_argument("--peers", action="store_true", help="other libraries as well: see `make bench-peers`")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="FACTOR", help="of the time for each bench")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the tables")
    chosen = parser.parse_args(arguments)

    if chosen.what == ["plot"]:
        for path in plot.draw_all(chosen.results):
            print(f"written to {path}", file=sys.stderr)
        return
    if chosen.what == ["ranking"]:
        ranking.main(chosen.seconds * ranking.SECONDS, chosen.results)
        return
    if chosen.what == ["heuristics"]:
        print(f"written to {heuristics.main(chosen.seconds * heuristics.SECONDS, chosen.results)}", file=sys.stderr)
        return
    torch.set_num_threads(chosen.threads)
    facts = report.machine_facts()
    for name, value in facts.items():
        print(f"{name}: {value}", file=sys.stderr)
    for bench in METHODS if chosen.what == ["methods"] else chosen.what or BENCHES:
        rows = []
        for row in _rows(bench, chosen.seconds, chosen.peers):
            rows.append(row)
            print(f"  {row.what}, N={row.length}: {row.figure} {row.verdict}", file=sys.stderr, flush=True)
        path = report.write(bench, rows, facts, chosen.results)
        print(report.markdown(bench, rows, facts))
        print(f"written to {path}", file=sys.stderr)


def _rows(bench: str, factor: float, with_peers: bool) -> Iterator[Row]:
    if bench in METHODS:
        it = METHODS[bench]
        return it.rows(seconds=_scaled(it.seconds, factor), with_peers=with_peers)
    if bench == "launch":
        return bench_launch.rows(seconds=factor * bench_launch.SECONDS)
    if bench == "ort":
        return bench_ort.rows(_scaled(bench_ort.SECONDS, factor))
    if bench == "ort_encoder":
        return bench_ort_encoder.rows(_scaled(bench_ort_encoder.SECONDS, factor))
    return bench_block_attention.rows(seconds=_scaled(bench_block_attention.SECONDS, factor))


def _scaled(seconds: Mapping[int, float], factor: float) -> dict[int, float]:
    return {length: factor * budget for length, budget in seconds.items()}


if __name__ == "__main__":
    main()
