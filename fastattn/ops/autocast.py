"""What autocast means for attention: q, k and v in autocast's dtype, as ``scaled_dot_product_attention`` has it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in autocast's dtype where autocast is on; fp64 and what is not floating stay as they are."""
    device_type = tensors[0].device.type
    if not is_autocast(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Around code that has chosen its precision itself."""
    return torch.autocast(device_type, enabled=False) if is_autocast(device_type) else nullcontext()
