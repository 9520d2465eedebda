"""What single calls take, for watching them from version to version: ``pytest perf`` (pytest-benchmark).

Comparisons with other libraries are not made from these: see ``python -m perf``, where both sides take turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn.autotune.choice import lookup, stamp
from fastattn.kernels.cpu.build import find_compiler
from fastattn.ops.argsort import stable_argsort
from fastattn.ops.block_attention import attend_blocks

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="the references' speed is not watched")


def _inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 8, length, 64, generator=generator) for _ in range(3)]


@torch.inference_mode()
def test_the_overhead_of_a_launch(benchmark: Any) -> None:
    x = torch.randn(1, 1, 16, 16)
    index = torch.arange(16, dtype=torch.int32).view(1, 1, 1, 1, 16)
    out, _ = benchmark(attend_blocks, x, x, x, index, index)
    dense = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1024, 4096])
def test_smyrf_forward(benchmark: Any, length: int) -> None:
    projections = torch.randn(66, 4)
    out = benchmark(fastattn.smyrf_attention, *_inputs(length), projections=projections, impl="triton")
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [1024, 4096])
def test_smyrf_backward(benchmark: Any, length: int) -> None:
    leaves = [x.requires_grad_() for x in _inputs(length)]
    out = fastattn.smyrf_attention(*leaves, projections=torch.randn(66, 4), impl="triton")
    gradients = benchmark(torch.autograd.grad, out, leaves, torch.ones_like(out), retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_sorting_the_hashes_of_four_rounds(benchmark: Any) -> None:
    keys = torch.randn(1, 8, 4, 16384)
    order = benchmark(stable_argsort, keys)
    assert torch.equal(keys.gather(-1, order.long()), keys.sort(-1).values)


def test_a_lookup_of_a_tuned_configuration(benchmark: Any) -> None:
    from fastattn.kernels.block_attention import Pattern

    shape = {"batch": 1, "heads": 8, "rounds": 4, "n_blocks": 64, "c_q": 64, "c_k": 64, "head_dim": 64, "value_dim": 64}
    call = ("block_attention_forward", torch.device("cpu"), torch.float32, shape, vars(Pattern()))
    assert benchmark(lookup, *call) == lookup(*call)


def test_whether_answers_of_lookups_still_hold(benchmark: Any) -> None:
    """What every call of an op asks, and the lookup itself only where it does not know the call."""
    assert benchmark(stamp) == stamp()
