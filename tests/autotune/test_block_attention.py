"""Tuning of block attention on the CPU, from candidates to the op that looks the result up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn.autotune import choice
from fastattn.autotune.block_attention import PATTERN, Sizes, candidates, problems
from fastattn.autotune.choice import lookup
from fastattn.autotune.schema import ConfigFields, Row
from fastattn.autotune.tune import Problem, tune
from fastattn.kernels import block_attention as kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from fastattn.reference import block_attention as reference

CPU = torch.device("cpu")
SMALL = Sizes(length=100, cluster_size=16, head_dim=16, value_dim=24, heads=2)

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")


BUILT = Path(os.environ["FASTATTN_CACHE_DIR"], "cpu")  # where all tests keep what the compiler built


@pytest.fixture(autouse=True)
def built_kernels_are_kept(cache_dir: Path) -> None:
    """Rows are each test's own; builds are not."""
    BUILT.mkdir(mode=0o700, parents=True, exist_ok=True)
    (cache_dir / "cpu").symlink_to(BUILT)


def plain_problems(sizes: Sizes, *names: str) -> Iterator[Problem]:
    return problems(sizes, torch.float32, CPU, reference, names, plain=True)


def test_no_candidate_is_larger_than_a_block() -> None:
    for config in candidates("block_attention_forward", "cpu", Sizes(cluster_size=20)):
        assert max(config.blocks.values()) <= 32
    assert candidates("block_attention_forward", "cpu", Sizes(cluster_size=2)) == [
        Config({"BLOCK_M": 16, "BLOCK_N": 16})
    ]


def test_blocks_are_not_longer_than_the_input() -> None:
    with pytest.raises(ValueError, match="cluster_size must not be above length 64, got 65"):
        Sizes(length=64, cluster_size=65)


@needs_compiler
def test_the_op_runs_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.autotune.store import default_store
    from fastattn.ops.block_attention import block_attention

    small = Config({"BLOCK_M": 16, "BLOCK_N": 16})
    sizes = Sizes(length=100, cluster_size=32, head_dim=16, value_dim=16, heads=2)
    asked: dict[str, Config] = {}
    real = kernels.launches_of

    def spy(kernel: str, *args: Any) -> Iterator[Launch]:
        for launch in real(kernel, *args):
            asked[kernel] = launch.config
            yield launch

    # one real row each, and a faster one in its place, so that another tile than the default must be seen to run
    for problem in plain_problems(sizes, *kernels.TUNING):
        outcome = tune(problem, 0.0)
        (row,) = outcome.rows
        assert row.launch_config() != small
        fields = row.model_dump() | {"config": ConfigFields(**small.to_dict()), "time_us": 0.5 * (row.time_us or 1.0)}
        default_store().add(outcome.key, [Row(**fields)])
    choice.forget()
    monkeypatch.setattr(kernels, "launches_of", spy)

    rows = 150  # another length than the tuned one
    q = torch.randn(1, 2, rows, 16, requires_grad=True)
    index = torch.arange(160, dtype=torch.int32).where(torch.arange(160) < rows, -1).int()
    index = index.view(1, 1, 1, 5, 32).expand(1, 2, 1, 5, 32).contiguous()
    out, _ = block_attention(q, q, q, index, index)
    out.sum().backward()
    assert asked == {name: small for name in kernels.TUNING}
    x = q.detach().double()
    exact, _ = reference.block_attention(x, x, x, index, index)
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_tuned_row_serves_nearby_lengths() -> None:
    (problem,) = plain_problems(SMALL, "block_attention_forward")
    outcome = tune(problem, 0.0)
    assert outcome.chosen is not None
    for length in (17, 90, 5000, 1_000_000):
        shape = replace(SMALL, length=length).shape()
        found = lookup("block_attention_forward", CPU, torch.float32, shape, vars(PATTERN))
        assert found == outcome.chosen.launch_config()
