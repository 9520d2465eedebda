"""What a GPU does between launches is what the CPU and PyTorch do there; the same kernels, run without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton

from fastattn.export.ort import cuda_kernels
from fastattn.kernels.block_attention import FAR
from fastattn.kernels.block_attention import block_numbers as reference_block_numbers
from fastattn.kernels.launch import Launch, run

BLOCK = cuda_kernels.CONFIG.blocks["BLOCK"]


def launch(name: str, n: int, **args: Any) -> None:
    run([Launch(cuda_kernels.KERNELS[name], (triton.cdiv(n, BLOCK),), args | {"n": n}, cuda_kernels.CONFIG)])


def test_narrowing_rounds_to_the_nearest_and_keeps_what_is_no_number() -> None:
    x = torch.randn(3 * BLOCK + 5, generator=torch.Generator().manual_seed(0)) * 2**12
    x[:6] = torch.tensor([math.inf, -math.inf, math.nan, 65519.0, 65520.0, 2**-25])
    result = torch.full((len(x) + 1,), 7.0, dtype=torch.float16)
    launch("narrow", len(x), source_ptr=x, result_ptr=result)
    torch.testing.assert_close(result[:-1], x.half(), rtol=0, atol=0, equal_nan=True)
    assert result[-1] == 7


def test_turned_matrices_are_transposed() -> None:
    x = torch.randn(3, 37, 29, generator=torch.Generator().manual_seed(0))
    result = torch.full((x.numel() + 1,), 7.0)
    launch("turn", x.numel(), source_ptr=x, result_ptr=result, rows=37, columns=29)
    assert torch.equal(result[:-1].view(3, 29, 37), x.mT) and result[-1] == 7


@pytest.mark.parametrize("value", [torch.tensor([True]), torch.tensor([-5], dtype=torch.int32), torch.tensor([2**40])])
def test_a_repeated_number_is_everywhere(value: torch.Tensor) -> None:
    result = torch.zeros(BLOCK + 4, dtype=value.dtype)
    launch("repeat", BLOCK + 3, source_ptr=value, result_ptr=result)
    assert torch.equal(result, torch.cat([value.expand(BLOCK + 3), torch.zeros(1, dtype=value.dtype)]))


def test_numbers_of_blocks_are_those_of_the_op() -> None:
    batch, heads, rounds, blocks, size, length = 2, 3, 2, 30, 20, 577
    index = torch.full((batch, heads, rounds, blocks * size), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for rows in index.flatten(0, 2):
        rows[torch.randperm(blocks * size, generator=generator)[: length - 9]] = torch.randperm(
            length, generator=generator
        )[: length - 9].int()
    index = index.unflatten(3, (blocks, size))
    numbers = torch.full((batch, heads, rounds, length), FAR, dtype=torch.int32)
    launch(
        "block_numbers", index.numel(), index_ptr=index, numbers_ptr=numbers, n_blocks=blocks, block_size=size,
        length=length,
    )  # fmt: skip
    assert torch.equal(numbers, reference_block_numbers("q_index", index, length))


# the CPU engine has no assertions; Triton's interpreter has
ASSERTIONS = """
import torch
from triton.runtime import interpreter
from fastattn.export.ort.cuda_kernels import assert_range_kernel

interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
for place, value in [(None, 0), (0, -2), (1024, 8), (1026, -2**31), (1027, 99)]:  # the last is beyond the end
    values = torch.arange(1028, dtype=torch.int32) % 9 - 1  # -1 .. 7
    if place is not None:
        values[place] = value
    try:
        assert_range_kernel[(2,)](values, 1027, -1, 7, BLOCK=1024)
        print("fine")
    except Exception as error:
        print("out of range" if "an index or a count is out of range" in str(error) else repr(error))
"""


def test_a_value_out_of_range_fails_an_assertion() -> None:
    assert cuda_kernels.assert_range_kernel.debug  # else it has none on a GPU
    said = subprocess.run(
        [sys.executable, "-c", ASSERTIONS], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert said.stdout.split("\n")[:-1] == ["fine", *["out of range"] * 3, "fine"]
