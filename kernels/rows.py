"""Index tensors hold rows of other tensors, or -1 for none; what reaches outside is refused before it is followed."""

from __future__ import annotations

import torch


def check_rows(name: str, index: torch.Tensor, length: int, what: str = "rows") -> None:
    """Every value of ``index`` must be -1 or a row below ``length``. what: the rows in words, for the message.

    Raises ValueError on the CPU. Elsewhere, and in traced code, looking at the values would make the host wait: there
    the assertion is left to the device.
    """
    _check_values(name, index, -1, length - 1, f"-1 or {what} below {length}")


def check_counts(name: str, counts: torch.Tensor, most: int) -> None:
    """Every value of ``counts`` must be from 1 to ``most``; raised as by :func:`check_rows`."""
    _check_values(name, counts, 1, most, f"numbers from 1 to {most}")


def _check_values(name: str, values: torch.Tensor, least: int, most: int, allowed: str) -> None:
    if torch.compiler.is_exporting():
        low, high = torch.aminmax(values.reshape(-1), dim=0)  # slow in eager, but without a dim ONNX does not know it
    else:
        low, high = torch.aminmax(values)
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(low), int(high)
        if low < least or high > most:
            raise ValueError(f"{name} must hold {allowed}, got values from {low} to {high}")
    else:
        torch.ops.aten._assert_async.msg((low >= least) & (high <= most), f"{name} must hold {allowed}")
