"""Extra memory grows linearly with N in every method, forward and backward."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.cli.memory import extra_memory

HEADS, HEAD_DIM = 2, 32
SHORT, LONG = 8192, 32768
RESULT_BYTES = HEADS * HEAD_DIM * 4 * SHORT

METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "smyrf": lambda q, k, v: fastattn.smyrf_attention(q, k, v, q_cluster_size=32, projections=draws(HEAD_DIM + 2, 4)),
    "smyrf-causal-corrected-local": lambda q, k, v: fastattn.smyrf_attention(
        q,
        k,
        v,
        q_cluster_size=32,
        projections=draws(HEAD_DIM + 2, 4),
        is_causal=True,
        correct_duplicates=True,
        local_window=32,
    ),
    "lsh": lambda q, k, v: fastattn.lsh_attention(q, v, n_hashes=2, bucket_size=32, generator=fixed()),
    "lsh-causal": lambda q, k, v: fastattn.lsh_attention(
        q, v, n_hashes=2, bucket_size=32, is_causal=True, generator=fixed()
    ),
    "clustered": lambda q, k, v: fastattn.clustered_attention(
        q, k, v, n_clusters=16, n_iterations=2, generator=fixed()
    ),
    "improved-clustered": lambda q, k, v: fastattn.improved_clustered_attention(
        q, k, v, n_clusters=16, topk=8, n_iterations=2, generator=fixed()
    ),
    "improved-clustered-causal": lambda q, k, v: fastattn.improved_clustered_attention(
        q, k, v, n_clusters=16, topk=8, n_iterations=2, is_causal=True, generator=fixed()
    ),
    "linear": lambda q, k, v: fastattn.linear_attention(q, k, v),
    "linear-causal": lambda q, k, v: fastattn.linear_attention(q, k, v, is_causal=True),
}


def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def draws(*shape: int) -> Tensor:
    return torch.randn(shape, generator=fixed())


def forward(method: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> Callable[[], object]:
    q, k, v = draws(3, 1, HEADS, length, HEAD_DIM)
    return torch.inference_mode()(lambda: method(q, k, v))


def backward(method: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> Callable[[], object]:
    leaves = [x.requires_grad_() for x in draws(3, 1, HEADS, length, HEAD_DIM)]
    dout = draws(1, HEADS, length, HEAD_DIM)
    return lambda: torch.autograd.grad(method(*leaves), leaves, dout, allow_unused=True)


def seen(call: Callable[[], object]) -> int | None:
    """The extra memory of a call. What earlier tests left free in the heap would hide some of it."""
    gc.collect()
    with suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return extra_memory(call)


@pytest.mark.parametrize("which", [forward, backward], ids=lambda which: which.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_extra_memory_grows_linearly(name: str, which: Callable[..., Callable[[], object]]) -> None:
    short, long = (which(METHODS[name], length) for length in (SHORT, LONG))
    short()  # builds or loads kernels
    used_by_short, again, used_by_long = (seen(call) for call in (short, short, long))
    if used_by_short is None or again is None or used_by_long is None:
        pytest.skip("this system does not tell a process's peak memory")
    used_by_short = max(used_by_short, again)
    assert used_by_short > RESULT_BYTES / 2, "no memory was seen at all"
    # a tenth of the short call's memory being of quadratic growth would make it 5.2 times
    assert used_by_long <= 5 * used_by_short + RESULT_BYTES / 2
