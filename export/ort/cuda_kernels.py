"""What a GPU has to do between any op's launches: there PyTorch has operations of its own, and the CPU plain loops.

They are in every library with cubins; what single ops need beside is in ``cuda_steps.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch

CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)
MANY = 2**33 + 1  # more than 32 bits count, and odd: what is compiled for it takes any number


@triton.jit
def places(n, BLOCK: tl.constexpr):
    """(the elements of a program, which of them there are)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def narrow_kernel(source_ptr, result_ptr, n, BLOCK: tl.constexpr):
    at, is_there = places(n, BLOCK)
    x = tl.load(source_ptr + at, mask=is_there)  # [BLOCK]
    tl.store(result_ptr + at, x.to(tl.float16), mask=is_there)


@triton.jit
def turn_kernel(source_ptr, result_ptr, n, rows, columns, BLOCK: tl.constexpr):
    at, is_there = places(n, BLOCK)
    matrix, column, row = at // (rows * columns), at // rows % columns, at % rows
    x = tl.load(source_ptr + (matrix * rows + row) * columns + column, mask=is_there)  # [BLOCK]
    tl.store(result_ptr + at, x, mask=is_there)


@triton.jit
def repeat_kernel(source_ptr, result_ptr, n, BLOCK: tl.constexpr):
    at, is_there = places(n, BLOCK)
    tl.store(result_ptr + at, tl.zeros([BLOCK], source_ptr.dtype.element_ty) + tl.load(source_ptr), mask=is_there)


@triton.jit(debug=True)  # else an assertion is none
def assert_range_kernel(values_ptr, n, least, most, BLOCK: tl.constexpr):
    at, is_there = places(n, BLOCK)
    values = tl.load(values_ptr + at, mask=is_there, other=0)  # [BLOCK]
    tl.device_assert(~is_there | ((values >= least) & (values <= most)), "an index or a count is out of range")


@triton.jit
def block_numbers_kernel(index_ptr, numbers_ptr, n, n_blocks, block_size, length, BLOCK: tl.constexpr):
    # a row stands in one block of an index, so each number has one writer
    at, is_there = places(n, BLOCK)
    rows = tl.load(index_ptr + at, mask=is_there, other=-1)  # [BLOCK]
    block = at // block_size
    numbers = numbers_ptr + block // n_blocks * length + rows
    tl.store(numbers, (block % n_blocks).to(tl.int32), mask=rows >= 0)


KERNELS = {
    "narrow": narrow_kernel,
    "turn": turn_kernel,
    "repeat": repeat_kernel,
    "assert_range": assert_range_kernel,
    "block_numbers": block_numbers_kernel,
}


def examples() -> Iterator[tuple[str, Launch]]:
    """(name, launch) of all that a device runs, on tensors without memory: what an ahead-of-time compiler needs."""
    fp32, fp16, int32, int64, boolean = (
        torch.empty(1, device="meta", dtype=dtype)
        for dtype in (torch.float32, torch.float16, torch.int32, torch.int64, torch.bool)
    )
    yield _launch("narrow", source_ptr=fp32, result_ptr=fp16)
    yield _launch("turn", source_ptr=fp32, result_ptr=fp32, rows=MANY, columns=MANY)
    for x in (boolean, int32, int64):
        yield _launch("repeat", source_ptr=x, result_ptr=x)
    yield _launch("assert_range", values_ptr=int32, least=MANY, most=MANY)
    sizes = {"n_blocks": MANY, "block_size": MANY, "length": MANY}
    yield _launch("block_numbers", index_ptr=int32, numbers_ptr=int32, **sizes)


def _launch(name: str, **args: Any) -> tuple[str, Launch]:
    return name, Launch(KERNELS[name], (1,), args | {"n": MANY}, CONFIG)
