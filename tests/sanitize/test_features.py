"""Small kernels with what the engine offers beyond the kernels of ours: none of it touches more than its mask says."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.cpu.machine import Level
from fastattn.kernels.launch import Launch
from tests.sanitize.sanitized import LEVELS, WIDTHS, check, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
FAR = 1 << 40  # elements: no address so far away is ever the test's own


@triton.jit
def edge_kernel(a, b, c, d, a_out, b_out, c_out, d_out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(a_out + i, tl.load(a + i, mask=i < n, other=1), mask=i < n)
    tl.store(b_out + i, tl.load(b + i, mask=i < n), mask=i < n)
    tl.store(c_out + i, tl.load(c + i, mask=i < n, other=0), mask=i < n)
    # from the last element down to the first
    tl.store(d_out + (n - 1 - i), tl.load(d + (n - 1 - i), mask=i < n, other=-2), mask=i < n)


TYPES = [
    (torch.int8, torch.int32, torch.int64, torch.float32),
    (torch.bool, torch.int16, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("level", WIDTHS, ids=attrgetter("name"))
@pytest.mark.parametrize("dtypes", TYPES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
@pytest.mark.parametrize("n", [1, 16, 37])
def test_a_mask_that_ends_inside_of_a_vector(dtypes: tuple[torch.dtype, ...], n: int, level: Level, folder: Path):
    args = {name: torch.arange(3, n + 3).to(dtype) for name, dtype in zip("abcd", dtypes, strict=True)}
    args |= {f"{name}_out": torch.zeros_like(x) for name, x in args.items()}
    check([Launch(edge_kernel, (triton.cdiv(n, 16),), args | {"n": n, "BLOCK": 16}, Config())], level, folder)


@triton.jit
def gather_kernel(x, index, y, rows, columns, stride, far, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = tl.load(index + i, mask=i < rows, other=-1)  # [M]
    # what is masked is far away: masked rows by a whole row of lanes, masked columns by each lane
    base = tl.where(at >= 0, at.to(tl.int64) * stride, far)
    keep = (at >= 0)[:, None] & (j < columns)[None, :]
    across = tl.load(x + base[:, None] + tl.where(j < columns, j, far)[None, :], mask=keep, other=0.0)  # [M, N]
    plain = tl.load(x + base[:, None] + j[None, :], mask=keep, other=0.0)
    down = tl.load(x + base[None, :] + j[:, None], mask=(at >= 0)[None, :] & (j < columns)[:, None], other=0.0)
    total = tl.sum(across, 1) + tl.max(plain, 1) + tl.sum(down, 0)  # [M]
    tl.store(y + tl.where(at >= 0, at, far), total, mask=at >= 0)
    tl.store(y + rows, tl.sum(total, 0))


@pytest.mark.parametrize("level", WIDTHS, ids=attrgetter("name"))
def test_masked_rows_and_lanes_may_point_anywhere(level: Level, folder: Path):
    rows, columns, stride = 13, 11, 12
    x = torch.randn((rows - 1) * stride + columns, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).int()
    index[5] = -1
    args = {"x": x, "index": index, "y": torch.zeros(rows + 1), "rows": rows, "columns": columns, "stride": stride}
    check([Launch(gather_kernel, (1,), args | {"far": FAR, "M": 16, "N": 16}, Config())], level, folder)


@triton.jit
def walk_kernel(x, y, n, M: tl.constexpr, N: tl.constexpr):
    # a loop that carries pointers and tiles, folds both ways and branches; its last step is masked
    i, j = tl.arange(0, M), tl.arange(0, N)
    rows, best = tl.zeros([M], tl.float32), tl.full([N], float("-inf"), tl.float32)
    acc, last = tl.zeros([M, N], tl.float32), 0.0
    for start in range(0, n, N):
        keep = (start + j < n)[None, :]
        tile = tl.load(x + i[:, None] * n + start + j[None, :], mask=keep, other=0.0)  # [M, N]
        rows += tl.sum(tile, 1)
        best = tl.maximum(best, tl.max(tl.where(keep, tile, float("-inf")), 0))
        acc = tl.dot(tile, tl.trans(tile), acc, input_precision="ieee")
        if start + N >= n:
            last = tl.load(x + n - 1)
    tl.store(y + i, rows + tl.sum(acc, 1) + last)
    tl.store(y + M + j, best)


@pytest.mark.parametrize("level", WIDTHS, ids=attrgetter("name"))
@pytest.mark.parametrize("n", [0, 5, 41])
def test_a_loop_over_tiles_that_ends_inside_of_one(n: int, level: Level, folder: Path):
    x = torch.randn(16 * n, generator=torch.Generator().manual_seed(n))
    args = {"x": x, "y": torch.zeros(32), "n": n, "M": 16, "N": 16}
    check([Launch(walk_kernel, (1,), args, Config())], level, folder)


@triton.jit
def product_kernel(a, b, y, m, n, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, x = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + i[:, None] * k + x[None, :], mask=(i < m)[:, None] & (x < k)[None, :], other=0)  # [M, K]
    right = tl.load(b + x[:, None] * n + j[None, :], mask=(x < k)[:, None] & (j < n)[None, :], other=0)  # [K, N]
    across = tl.load(b + j[:, None] * k + x[None, :], mask=(j < n)[:, None] & (x < k)[None, :], other=0)  # [N, K]
    down = tl.load(a + x[:, None] * m + i[None, :], mask=(x < k)[:, None] & (i < m)[None, :], other=0)  # [K, M]
    acc = tl.dot(left, right, input_precision="ieee") + tl.dot(tl.trans(down), tl.trans(across), input_precision="ieee")
    tl.store(y + i[:, None] * n + j[None, :], acc, mask=(i < m)[:, None] & (j < n)[None, :])


@pytest.mark.parametrize("level", LEVELS, ids=attrgetter("name"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_a_product_of_operands_that_fill_no_tile(dtype: torch.dtype, level: Level, folder: Path):
    m, n, k = 13, 29, 21
    a, b = (torch.arange(size).remainder(7).to(dtype) - 3 for size in (m * k, k * n))
    y = torch.zeros(m * n, dtype=torch.float32 if dtype.is_floating_point else torch.int32)
    args = {"a": a, "b": b, "y": y, "m": m, "n": n, "k": k, "M": 16, "N": 32, "K": 32}
    check([Launch(product_kernel, (1,), args, Config())], level, folder)
