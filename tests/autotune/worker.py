"""One of two workers that tune together, as a process of its own: ``python -m tests.autotune.worker``.

Its problems are sleeps, for which nothing is built. It prints what it tried itself and what all came to, as JSON.
Under DIE=1 it ends in the midst of the work.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import torch

from fastattn.autotune.choice import lookup
from fastattn.autotune.problem import Problem
from fastattn.autotune.shard import team, tune_all
from fastattn.autotune.tune import key_of
from fastattn.kernels.config import Config

CPU = torch.device("cpu")
DELAYS_MS = {16: 12, 32: 8, 64: 2, 128: 16}  # by tile
TRIED: list[list[int]] = []


class Sleeps:
    """One problem for each of some counts of blocks."""

    def __init__(self, *counts: int) -> None:
        self.name = "block_attention_forward"
        self._problems = [problem(count) for count in counts]
        self.keys = tuple(key_of(each).identity() for each in self._problems)

    def problems(self, device: torch.device) -> Iterator[Problem]:
        yield from self._problems

    def predictor(self, problem: Problem) -> Callable[[Config], float] | None:
        return None


def problem(n_blocks: int) -> Problem:
    out = torch.zeros(8)

    def run(config: Config) -> None:
        if os.environ.get("DIE") == "1":
            os._exit(1)
        tile = config.blocks["BLOCK_M"]
        if [n_blocks, tile] not in TRIED:
            TRIED.append([n_blocks, tile])
        time.sleep(DELAYS_MS[tile] / 1000)
        out.fill_(1.0)

    truth = torch.ones(8, dtype=torch.float64)
    return Problem(
        kernel="block_attention_forward", device=CPU, dtype=torch.float32, shape={"c_q": 64, "n_blocks": n_blocks},
        flags={}, sizes={"n_blocks": n_blocks}, candidates=[Config({"BLOCK_M": tile}) for tile in DELAYS_MS], run=run,
        outputs=(out,), expected=(truth,), plain=(truth.float(),),
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    said = []
    with team(patience=20) as workers:
        for counts in os.environ["UNITS"].split(";"):
            TRIED.clear()
            units = [Sleeps(int(count)) for count in counts.split(",")]
            tuned = tune_all(units, 1.0, CPU, workers=workers)
            found = lookup("block_attention_forward", CPU, torch.float32, {"c_q": 64, "n_blocks": 8}, {})
            chosen = {
                outcome.rows[0].problem["n_blocks"]: outcome.chosen.config.blocks["BLOCK_M"]
                for outcome in tuned.outcomes
                if outcome.chosen is not None
            }
            said.append({"tried": sorted(TRIED), "chosen": sorted(chosen.items()), "found": found and found.blocks})
    print(json.dumps(said))


if __name__ == "__main__":
    main()
