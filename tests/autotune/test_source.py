"""The hash of a kernel's source."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastattn.autotune import source

FILE = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)
UNUSED = 1


@triton.jit
def helper(x):
    return x * FACTOR


@triton.jit
def kernel(p, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(p + i, helper(tl.load(p + i)))
"""


def digest(folder: Path, text: str) -> str:
    """The hash of ``kernel`` in a file with this text."""
    file = folder / f"file_{len(list(folder.iterdir()))}.py"
    file.write_text(text)
    spec = importlib.util.spec_from_file_location("the_same_module", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return source.hash_of(module.kernel)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    i = tl.arange(0, N)", "    # why\n    i = tl.arange(0,  N)"),
        ("def kernel(p, N: tl.constexpr):", 'def kernel(p, N: tl.constexpr):\n    """What it does."""'),
        ("UNUSED = 1", "UNUSED = 2\n\n\n"),
    ],
    ids=["comment and layout", "docstring and place in the file", "an unrelated constant"],
)
def test_edits_that_change_no_code_keep_the_hash(tmp_path: Path, old: str, new: str) -> None:
    assert old in FILE
    assert digest(tmp_path, FILE) == digest(tmp_path, FILE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.arange(0, N)", "tl.arange(0, N) + 1"),
        ("return x * FACTOR", "return x + FACTOR"),
        ("tl.constexpr(2)", "tl.constexpr(3)"),
    ],
    ids=["the kernel", "a helper", "a constant of a helper"],
)
def test_edits_that_change_code_change_the_hash(tmp_path: Path, old: str, new: str) -> None:
    assert old in FILE
    assert digest(tmp_path, FILE) != digest(tmp_path, FILE.replace(old, new))


def test_kernels_are_found_by_name_and_have_different_hashes() -> None:
    from fastattn.kernels.block_attention import TUNING

    hashes = {source.source_hash(name) for name in TUNING}
    assert len(hashes) == len(TUNING)
    assert all(len(text) == 16 for text in hashes)


@pytest.mark.parametrize("name", ["nothing", "block_attention_sideways"])
def test_an_unknown_kernel_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'"):
        source.kernel_named(name)
