"""What ``fastattn export`` exports: a model, and the inputs that it is traced and compared with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.cli.calibrate import MINILM

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = {"fp32": "float32", "fp16": "float16"}
ALLOWED = f"a folder of a Hugging Face model, {MINILM!r}, or module:function"


@dataclass
class Exported:
    """model: in evaluation mode. sample: of its inputs, where its function gives one. shapes: the sizes of the sample
    that are free, as :func:`fastattn.export.to_onnx` takes them."""

    model: nn.Module
    sample: dict[str, Tensor] | None = None
    shapes: dict[str, Any] | None = None


def load(target: str, dtype: str | None = None) -> Exported:
    """What ``target`` names; dtype: of model and sample, None for their own. Of a model with an encoder and a decoder
    it is the encoder, which alone attends both ways."""
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    loaded = _load(target)
    loaded.model.eval()
    if dtype is not None:
        to = getattr(torch, DTYPES[dtype])
        loaded.model.to(to)
        if loaded.sample is not None:
            for name, value in loaded.sample.items():
                loaded.sample[name] = value.to(to) if value.is_floating_point() else value
    return loaded


def sample(model: Any, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random inputs of a Hugging Face model: token sequences of ``length``, or as many as it has positions, all but the
    first padded; images; or log-mel features."""
    import torch

    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.randn(batch, config.num_channels, height, width, generator=generator).to(dtype)}
    if main == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # as Whisper's convolutions have it
        return {main: torch.randn(batch, config.num_mel_bins, frames, generator=generator).to(dtype)}
    if main != "input_ids" or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"samples are made of text, images and log-mel features, and {type(model).__name__} takes {main}: let "
            "module:function return the model and a sample"
        )
    # some models keep a few positions for themselves
    length = min(length, getattr(config, "max_position_embeddings", length) - 8)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length * row // batch :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def free_sizes(sample: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Of what :func:`sample` makes: log-mel features have a second dimension that is no length."""
    import torch

    return {"input_features": {0: torch.export.Dim.DYNAMIC}} if "input_features" in sample else None


def _load(target: str) -> Exported:
    from fastattn.cli import _minilm

    if target == MINILM:
        return Exported(_minilm.load()[0])
    if Path(target).is_dir():
        return Exported(_encoder(_from_folder(Path(target))))
    if ":" in target:
        return _from_function(target)
    raise ValueError(f"MODEL must be {ALLOWED}; got {target!r}, which is no folder")


def _from_folder(folder: Path) -> Any:
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install fastattn[transformers]") from error
    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't load a model from {folder}: {error}") from error


def _encoder(model: Any) -> Any:
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _from_function(target: str) -> Exported:
    from torch import nn

    module_name, _, name = target.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as with python -m
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # of what the module itself imports
        raise ValueError(f"MODEL must be {ALLOWED}; there is no module {module_name!r} here") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {name!r}")
    made = function()
    model, *inputs = made if isinstance(made, tuple) else (made,)
    if not isinstance(model, nn.Module) or len(inputs) > 2 or not all(isinstance(part, Mapping) for part in inputs):
        raise TypeError(
            f"{target} must return a torch.nn.Module, or one with a mapping of input names to tensors, and a second "
            f"mapping of input names to free sizes where it likes, got {type(made).__name__}"
        )
    return Exported(model, *map(dict, inputs))
