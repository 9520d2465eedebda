"""What tests of memory and of precision watch, or do to torch, while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device import device_type


class LargestTensor(TorchDispatchMode):
    """elements: of the largest tensor that an operation gave meanwhile, by the memory that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@contextmanager
def coarse_products() -> Iterator[None]:
    """Torch's own products are in bf16: by its matmul precision, and by autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
