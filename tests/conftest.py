"""What holds for every test: threads shared between workers, a cache of the tests' own, no network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Built kernels are kept from one run of the tests to the next, but apart from the user's own caches.
os.environ.setdefault("FASTATTN_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "fastattn"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402  after the environment is set

torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


@pytest.fixture(autouse=True)
def what_was_compiled_is_forgotten() -> Iterator[None]:
    """torch.compile gives up on code that a process compiled for too many cases, wherever these came from."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
