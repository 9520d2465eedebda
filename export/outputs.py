"""A model's outputs as a flat list, by name: how torch and ONNX Runtime are told of the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run(
    model: nn.Module, inputs: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """All output tensors of ``model(**inputs)``: of a mapping by its keys, of a sequence as ``output_0``...

    parameters: by name, to compute with in place of the model's own."""
    with torch.no_grad():
        return dict(_flat("output", torch.func.functional_call(model, dict(parameters or {}), (), dict(inputs))))


def names(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    return list(run(model, inputs))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(str(key), part)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _flat(f"{name}_{index}", part)
    elif value is not None:
        raise TypeError(
            f"a model's outputs must be tensors, sequences or mappings of tensors, got {type(value).__name__}"
        )
