"""``python -m perf [smyrf] [block_attention] [launch]``: measure, print, and write the table to ``perf/results/``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from perf import bench_block_attention, bench_launch, bench_smyrf, report

BENCHES = {"smyrf": bench_smyrf.rows, "block_attention": bench_block_attention.rows, "launch": bench_launch.rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf", description="Speed and memory against torch, beside goals.")
    parser.add_argument("bench", nargs="*", choices=[[], *BENCHES], help="which (default: all)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2, which the goals are for)")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="folder of the tables")
    chosen = parser.parse_args(arguments)

    torch.set_num_threads(chosen.threads)
    facts = report.machine_facts()
    for name, value in facts.items():
        print(f"{name}: {value}", file=sys.stderr)
    rows = []
    for name in chosen.bench or BENCHES:
        for row in BENCHES[name]():
            rows.append(row)
            print(
                f"  {row.what}, N={row.length}: {row.value:.3g} {row.unit} {row.verdict}", file=sys.stderr, flush=True
            )
    path = report.write(rows, facts, chosen.results)
    print(report.markdown(rows, facts))
    print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
