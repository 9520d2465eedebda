"""A cache of each test's own, and keys and rows to put into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fastattn.autotune import choice, store
from fastattn.autotune.key import Key
from fastattn.autotune.schema import ConfigFields, Row


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_shipped: None) -> Iterator[Path]:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    choice.forget()
    store._warned.clear()
    yield tmp_path
    choice.forget()


@pytest.fixture
def make_key() -> Callable[..., Key]:
    def make(**changes: Any) -> Key:
        fields: dict[str, Any] = {
            "kernel": "block_attention_forward", "source": "0123456789abcdef", "arch": "x86_64-avx512",
            "device": "Some CPU", "threads": 2, "dtype": "float32", "shape": {"c_q": 64, "n_blocks": 64},
            "flags": {"wrap": True}, "triton": "3.9.0", "compiler": "g++ 12", "fp_fusion": True,
        }  # fmt: skip
        return Key(**(fields | changes))

    return make


@pytest.fixture
def make_row() -> Callable[..., Row]:
    def make(tile: int, time_us: float | None = 100.0, *, minute: int = 0, **changes: Any) -> Row:
        config = ConfigFields(blocks={"BLOCK_M": tile}, num_warps=4, num_stages=2, num_ctas=1)
        written = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)
        fields: dict[str, Any] = {"config": config, "label": "measured", "time_us": time_us, "written": written}
        return Row(**(fields | changes))

    return make
