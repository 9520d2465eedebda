"""Index tensors hold rows of other tensors, or -1 for none; what reaches outside is refused before it is followed."""

from __future__ import annotations

import torch


def check_rows(name: str, index: torch.Tensor, length: int, what: str = "rows") -> None:
    """Every value of ``index`` must be -1 or a row below ``length``. what: the rows in words, for the message.

    Raises ValueError on the CPU. Elsewhere, and in traced code, looking at the values would make the host wait: there
    the assertion is left to the device.
    """
    low, high = torch.aminmax(index)
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(low), int(high)
        if low < -1 or high >= length:
            raise ValueError(f"{name} must hold -1 or {what} below {length}, got values from {low} to {high}")
    else:
        inside = (low >= -1) & (high < length)
        torch.ops.aten._assert_async.msg(inside, f"{name} must hold -1 or {what} below {length}")
