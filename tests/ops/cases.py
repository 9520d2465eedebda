"""Inputs of block attention for tests: random tensors, random partitions of rows into blocks, one option set a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.cpu.build import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
Three = tuple[Tensor, Tensor, Tensor]
IMPLS = ["reference", pytest.param("triton", marks=needs_compiler)]


@dataclass(frozen=True)
class Case:
    """Blocks hold rounds * n_blocks * c_q places: more than n_queries leaves -1 among them, fewer leaves rows out."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    n_queries: int = 48
    n_keys: int = 48
    head_dim: int = 16
    value_dim: int = 16
    rounds: int = 2
    n_blocks: int = 3
    c_q: int = 16
    c_k: int = 16
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Three:
        g = torch.Generator().manual_seed(seed)
        q_shape = (self.batch, self.heads, self.n_queries, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.n_keys, self.head_dim)
        v_shape = (*k_shape[:3], self.value_dim)
        q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in (q_shape, k_shape, v_shape))
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def indices(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.heads, self.rounds, self.n_blocks)
        return partition((*shape, self.c_q), self.n_queries, g), partition((*shape, self.c_k), self.n_keys, g)


def partition(shape: tuple[int, ...], length: int, generator: torch.Generator) -> Tensor:
    """(B, H, R, nb, C) int32: in each round the rows 0 .. length - 1 in random places, -1 in those left over."""
    places = shape[-2] * shape[-1]
    rounds = [
        torch.randperm(max(length, places), generator=generator)[:places] for _ in range(torch.Size(shape[:3]).numel())
    ]
    index = torch.stack(rounds).view(shape)
    return index.masked_fill(index >= length, -1).int()


def cut_after(index: Tensor, n_used_blocks: Tensor) -> Tensor:
    """``index`` with -1 in all blocks but the first n_used_blocks[b] of each example's rounds."""
    is_used = torch.arange(index.shape[3]) < n_used_blocks.unsqueeze(-1)  # [B, nb]
    return index.masked_fill(~is_used[:, None, None, :, None], -1)


def gradients(out: Tensor, inputs: Three, dout: Tensor) -> Three:
    dq, dk, dv = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    return dq, dk, dv


def each(change: Callable[[Tensor], Tensor], tensors: Three) -> Three:
    q, k, v = tensors
    return change(q), change(k), change(v)


def leaves(q: Tensor, k: Tensor, v: Tensor) -> Three:
    """Copies that ask for a gradient."""
    copies = (tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    return next(copies), next(copies), next(copies)
