"""Checks of arguments, shared by ops and methods: each raises an error that names the argument, what came and what is
allowed, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

IMPLS = (None, "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_tensors(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_scale(scale: Any) -> None:
    if scale is None or isinstance(scale, torch.SymFloat):
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # math.isfinite breaks the graph where torch.compile has it change
        raise ValueError(f"scale must be finite, got {scale}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {tensor.device}")


def check_dtype(name: str, tensor: Tensor, impl: str | None) -> None:
    if tensor.dtype == torch.float64 and impl != "reference":
        raise TypeError(f"{name} is torch.float64, which only impl='reference' computes; got impl={impl!r}")
    if tensor.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise TypeError(f"{name} must be torch.float32, torch.float16 or torch.bfloat16, got {tensor.dtype}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, impl: str | None) -> None:
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv): one floating dtype, one device, nothing empty."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, length, head_dim), got {_shape(tensor)}")
        check_device(name, tensor, q.device)
        check_dtype(name, tensor, impl)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, got {_shape(tensor)}")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {_shape(tensor)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's head_dim {q.shape[3]}, got {_shape(k)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides q's {q.shape[1]}, got {_shape(k)}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have as many heads as k, {k.shape[1]}, got {_shape(v)}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"v must have k's length {k.shape[2]}, got {_shape(v)}")


def check_mask(name: str, mask: Any, batch: int, length: int, device: torch.device) -> None:
    """A boolean mask (batch, length), or None; True means that the row takes part."""
    if mask is None:
        return
    check_tensors(**{name: mask})
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be torch.bool (True: takes part), got {mask.dtype}")
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] != length:
        raise ValueError(f"{name} must have shape (batch, length) = ({batch}, {length}), got {_shape(mask)}")
    check_device(name, mask, device)


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
