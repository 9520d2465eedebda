"""``fastattn tune`` and ``fastattn cache``."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastattn.autotune import choice
from fastattn.cli.main import app
from fastattn.cli.tune import parse_budget

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")

FAST = ("--length", "128", "--cluster-size", "16", "--head-dim", "16", "--heads", "2", "--budget", "0.1s")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    built = Path(os.environ["FASTATTN_CACHE_DIR"], "cpu")  # kept from test to test
    built.mkdir(mode=0o700, parents=True, exist_ok=True)
    (tmp_path / "cpu").symlink_to(built)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    choice.forget()
    yield tmp_path
    choice.forget()


def fastattn(*words: str, fails: bool = False) -> str:
    """What the command prints."""
    result = CliRunner().invoke(app, words)
    assert (result.exit_code != 0) == fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


@needs_compiler
def test_tune_prints_a_table_and_fills_the_cache_that_list_and_explain_show(cache_dir: Path) -> None:
    empty = fastattn("cache", "list")
    assert "holds no rows" in empty
    table = fastattn("tune", "--kernel", "block_attention_forward", "--plain", *FAST)
    assert "block_attention_forward, float32, length 128, cluster_size 16, head_dim 16" in table
    assert "16 x 16" in table and "default" in table and "chosen" in table
    (file,) = (cache_dir / "tune").rglob("*.json")
    (entry,) = json.loads(file.read_text())["entries"]
    assert entry["rows"][0]["label"] == "measured"

    assert "block_attention_forward" in (listed := fastattn("cache", "list"))
    assert "in use" in listed and "float32" in listed
    where = ("--cluster-size", "16", "--head-dim", "16", "--length", "4096", "--heads", "2", "--rounds", "2")
    explained = fastattn("cache", "explain", "block_attention_forward", *where)
    assert "measured on this device, at other lengths or counts (batch 1, heads 2, n_blocks 8, rounds 2)" in explained
    assert entry["key"]["source"] in explained


@needs_compiler
def test_the_budget_covers_all_kernels_and_shapes() -> None:
    which = ("--kernel", "block_attention_backward,hash", "--plain")
    said = fastattn("tune", *which, *FAST)  # a build that has begun is waited for, so one problem is always tuned
    assert "problems did not get their turn" in said
    fastattn("tune", *which, *FAST[:-1], "20s")
    start = time.monotonic()
    said = fastattn("tune", *which, *FAST[:-1], "3s")
    assert time.monotonic() - start < 8
    for name in ("block_attention_backward_dq", "block_attention_backward_dkv", "hash_argmax_digit"):
        assert name in said


def test_without_a_compiler_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.cpu import engine

    monkeypatch.setenv("CXX", "/nowhere/g++")
    engine.forget()
    try:
        assert "nothing was tuned: no C++ compiler was found" in fastattn("tune", *FAST, fails=True)
    finally:
        engine.forget()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", "0s"), "budget must be a time above zero"),
        (("--budget", "soon"), "got 'soon'"),
        (("--kernel", "attention"), "kernel must be all, one of block_attention_forward"),
        (("--kernel", "hash,linear_x"), "got 'linear_x'"),
        (("--device", "cuda:99"), "nothing was tuned"),
        (("--head-dim", "64,x"), "head_dim must be positive integers"),
        (("--cluster-size", "0"), "cluster_size must be positive integers"),
        (("--cluster-size", "128", "--length", "64"), "cluster_size must not be above length 64, got 128"),
        (("--dtype", "fp8"), "dtype must be some of fp32, fp16, bf16 with commas between them, got 'fp8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_named(words: tuple[str, ...], message: str) -> None:
    assert message in fastattn("tune", *words, fails=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("90", 90.0), ("2m", 120.0), ("1.5h", 5400.0), ("0.5s", 0.5)]
)
def test_budgets_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds
