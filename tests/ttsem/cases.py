"""What is run under ttsem, and what the engine makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.autotune.source import ROOMS
from fastattn.kernels.launch import Launch, run

CASES: dict[str, dict[str, Callable[[str, torch.dtype], list[Launch]]]] = {
    kernel: cases for room in ROOMS for kernel, cases in import_module(f"tests.sanitize.{room}").CASES.items()
}
QKV = ((2, 20), (1, 20), (1, 12))  # heads and head dims of q, k and v


def tensors(launches: list[Launch]) -> list[dict[str, Tensor]]:
    """Of each launch its tensors by the names of its arguments."""
    return [{name: x for name, x in launch.args.items() if isinstance(x, Tensor)} for launch in launches]


def by_the_engine(kernel: str, case: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The tensors after a case's launches were run by the CPU engine."""
    launches = CASES[kernel][case](kernel, dtype)
    run(launches)
    return tensors(launches)


def _call(
    impl: str, name: str, *, shapes: tuple[tuple[int, int], ...] = QKV, draws: bool = True, **options: Any
) -> list[Tensor]:
    """Calls a method of ``fastattn``; returns its output and the gradients of its inputs.

    shapes: heads and head dims of the inputs. draws: the method draws numbers, which are the same at each call.
    """
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, heads, 41, dim, generator=generator, requires_grad=True) for heads, dim in shapes]
    key_mask = (torch.arange(41) % 7 != 3)[None]
    if draws:
        options["generator"] = generator
    out = getattr(fastattn, name)(*leaves, key_mask=key_mask, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))]


_SMYRF = partial(_call, name="smyrf_attention", n_hashes=2, q_cluster_size=16)
_REFORMER = partial(_call, name="lsh_attention", shapes=((2, 20), (2, 12)), n_hashes=2, bucket_size=8)
_CLUSTERED = {"n_clusters": 5, "n_bits": 31, "n_iterations": 2}
_LINEAR = partial(_call, name="linear_attention", draws=False)
METHODS: dict[str, Callable[[str], list[Tensor]]] = {
    "smyrf": _SMYRF,
    "smyrf-causal": partial(_SMYRF, is_causal=True),
    "reformer": _REFORMER,
    "reformer-causal": partial(_REFORMER, is_causal=True),
    "clustered": partial(_call, name="clustered_attention", **_CLUSTERED),
    "improved": partial(_call, name="improved_clustered_attention", topk=8, **_CLUSTERED),
    "improved-causal": partial(_call, name="improved_clustered_attention", topk=8, is_causal=True, **_CLUSTERED),
    "linear": _LINEAR,
    "linear-causal": partial(_LINEAR, is_causal=True),
}
