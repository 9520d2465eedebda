"""Error against attended keys on a real model, with and without what makes rounds go further: ``make front``.

all-MiniLM-L6-v2, dense when it was trained, embeds texts of 512 tokens with SMYRF in every layer; the error is one
minus the mean cosine to the embeddings with dense attention. Attended keys are rounds times cluster size, and the local
window where there is one: the work of a query, and of its gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.cli._minilm import load, long_texts
from fastattn.cli._quality import COSINE_TEXTS, Score, judge
from perf.report import RESULTS

SETTINGS = ((2, 32), (4, 32), (8, 32), (2, 64), (4, 64), (2, 128), (4, 128))  # (rounds, cluster size)
SEEDS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "duplicates counted once": {"correct_duplicates": True},
    "... and a local round": {"correct_duplicates": True, "local_window": None},  # of a cluster's size
    "principal directions": {"directions": "principal"},
    "all three": {"correct_duplicates": True, "local_window": None, "directions": "principal"},
}


@dataclass(frozen=True)
class Point:
    """One setting. keys: attended by a query. cosine: to the dense embeddings, mean over seeds, and its deviation."""

    variant: str
    rounds: int
    size: int
    keys: int
    cosine: float
    deviation: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.front", description="Error against attended keys.")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"draws a setting is averaged over (default: {SEEDS})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of front.md and front.svg")
    chosen = parser.parse_args(arguments)
    points = []
    for point in measure(chosen.seeds, SETTINGS):
        points.append(point)
        print(f"{point.variant}, {point.rounds} x {point.size}: {point.cosine:.3f}", flush=True)
    path = chosen.results / "front.md"
    path.write_text(markdown(points, chosen.seeds))
    draw(points, path.with_suffix(".svg"))
    print(f"written to {path} and .svg")


@torch.inference_mode()
def measure(seeds: int, settings: Sequence[tuple[int, int]]) -> Iterator[Point]:
    model, tokenizer = load()
    texts = long_texts(tokenizer)
    dense = judge(model, texts, _fresh(), None, lambda: None)
    for variant, knobs in VARIANTS.items():
        # principal directions are no draw
        draws = 1 if knobs.get("directions") == "principal" else seeds
        for rounds, size in settings:
            window = size if "local_window" in knobs else 0
            score = _fresh()
            for seed in range(draws):
                how = {**knobs, "local_window": window, "n_hashes": rounds, "q_cluster_size": size}
                with fastattn.patched(model, "smyrf", min_length=0, seed=seed, **how):
                    judge(model, texts, score, dense, lambda: None)
            cosines = score.cosine[1:]
            spread = statistics.stdev(cosines) if len(cosines) > 1 else 0.0
            yield Point(variant, rounds, size, rounds * size + window, statistics.mean(cosines), spread)


def _fresh() -> Score:
    """A score that is not new, so that texts enough for the cosine are embedded and no more."""
    return Score(cosine=[1.0])


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other point beats with as many keys or fewer, by keys."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.keys, -point.cosine)):
        if not best or point.cosine > best[-1].cosine:
            best.append(point)
    return best


def markdown(points: Sequence[Point], seeds: int) -> str:
    lines = [
        "# Error against attended keys",
        "",
        f"all-MiniLM-L6-v2, not retrained: mean cosine of the embeddings of {COSINE_TEXTS} texts of 512 tokens to "
        f"those with dense attention, ± standard deviation over {seeds} seeds (principal directions are no draw). "
        "Keys: rounds times cluster size, and the local round's. Made by `make front`.",
        "",
        "| SMYRF | rounds x size | keys | cosine |",
        "|---|---:|---:|---:|",
    ]
    for point in points:
        spread = f" ± {point.deviation:.3f}" if point.deviation else ""
        lines.append(f"| {point.variant} | {point.rounds} x {point.size} | {point.keys} | {point.cosine:.3f}{spread} |")
    return "\n".join([*lines, "", "![error against keys](front.svg)", ""])


def draw(points: Sequence[Point], path: Path) -> None:
    """1 - cosine over attended keys, both axes logarithmic, with a line along the front of each variant."""
    from perf.plot import pyplot

    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7, 5))
    for index, variant in enumerate(dict.fromkeys(point.variant for point in points)):
        own = [point for point in points if point.variant == variant]
        best = front(own)
        panel.scatter([p.keys for p in own], [1 - p.cosine for p in own], color=f"C{index}", s=14)
        panel.plot([p.keys for p in best], [1 - p.cosine for p in best], color=f"C{index}", label=variant)
    panel.set(xscale="log", yscale="log", xlabel="attended keys of 512", ylabel="1 - cosine to dense")
    keys = sorted({2 ** (p.keys.bit_length() - 1) for p in points})
    panel.set_xticks(keys, [str(n) for n in keys])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
