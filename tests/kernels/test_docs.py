"""docs/cpu-engine.md is true: its table is the list of what is covered, its C++ is what is emitted."""

from __future__ import annotations

import re
from pathlib import Path

import triton
import triton.language as tl

from fastattn.kernels.cpu.emit import generate
from fastattn.kernels.cpu.frontend import ttir
from fastattn.kernels.cpu.schedule import COVERED

PAGE = Path(__file__).parents[2].joinpath("docs/cpu-engine.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_names_every_operation_that_is_covered_and_no_other():
    table = PAGE.partition("## What is covered")[2].partition("Element types:")[0]
    assert sorted(re.findall(r"`((?:arith|math|scf|tt)\.[\w.]+)`", table)) == sorted([*COVERED, "math.ctpop"])


def test_every_file_of_the_engine_is_introduced():
    folder = Path(__file__).parents[2] / "kernels/cpu"
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.(?:py|h|cc))`", PAGE.partition("## One kernel")[0])) == files


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    at = rows[:, None] * n_columns + columns[None, :]
    x = tl.load(x_ptr + at, mask=(columns < n_columns)[None, :], other=float("-inf"))  # [BLOCK_M, BLOCK_N]
    p = tl.exp(x - tl.max(x, 1)[:, None])
    tl.store(y_ptr + at, p / tl.sum(p, 1)[:, None], mask=(columns < n_columns)[None, :])


def test_the_kernel_that_is_followed_gives_the_code_that_is_shown():
    (source,) = blocks("python")
    assert source.strip() == "@triton.jit\n" + softmax_kernel.src.strip()
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n_columns": "i32", "BLOCK_M": "constexpr", "BLOCK_N": "constexpr"}
    code = generate(ttir(softmax_kernel, types, {"BLOCK_M": 4, "BLOCK_N": 64}), 16)
    (shown,) = blocks("cpp")

    def plain(text):  # names are numbered through
        return re.sub(r"\b([a-z]+)\d+\b", r"\1_", text)

    assert plain(shown) in plain(code)
