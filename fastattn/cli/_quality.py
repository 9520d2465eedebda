"""How well approximate attention serves a sentence encoder that never saw it: embeddings against the dense ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.cli._minilm import Halves

BATCH = 4  # texts at once; more is no faster on a CPU
COSINE_TEXTS = 8  # first halves that the cosine is averaged over; a few seeds tell more than a few texts


@dataclass
class Score:
    """One way of attending.

    cosine: mean cosine of the embeddings of ``COSINE_TEXTS`` first halves to the dense ones, one figure a seed. recall:
    share of all first halves whose nearest second half is their own, for the first seed. batch_seconds: of the whole
    model, a figure for each full batch.
    """

    cosine: list[float] = field(default_factory=list)
    recall: float = 0.0
    batch_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.batch_seconds) / BATCH


def judge(
    model: nn.Module, texts: Halves, score: Score, dense: Tensor | None, on_batch: Callable[[], object]
) -> Tensor:
    """Run ``model`` as it attends now on ``texts`` and add to ``score``; returns the first halves' embeddings.

    dense: what they are with dense attention, None if that is what ``model`` has. All texts and their second halves are
    embedded when ``score`` is new: a recall of a few texts gains less from more seeds than it costs.
    """
    is_new = not score.cosine
    first = _embed(model, texts.first if is_new else texts.first[:COSINE_TEXTS], score, on_batch)
    target = first if dense is None else dense
    score.cosine.append(mean_cosine(first[:COSINE_TEXTS], target[:COSINE_TEXTS]))
    if is_new:
        score.recall = recall_at_1(first, _embed(model, texts.second, score, on_batch))
    return first


def _embed(model: nn.Module, ids: Tensor, score: Score, on_batch: Callable[[], object]) -> Tensor:
    rows = []
    for batch in ids.split(BATCH):
        start = time.perf_counter()
        rows.append(embed_batch(model, batch))
        if len(batch) == BATCH:
            score.batch_seconds.append(time.perf_counter() - start)
        on_batch()
    return torch.cat(rows)


@torch.inference_mode()
def embed_batch(model: nn.Module, ids: Tensor) -> Tensor:
    """ids (T, N) without padding -> (T, width): mean of the hidden states, at length 1, as the model's card says."""
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return nn.functional.normalize(hidden.mean(dim=1), dim=-1)


def steps(texts: Halves, seeds: int) -> int:
    """How often ``on_batch`` is called while one way of attending is judged with ``seeds`` seeds."""
    count = len(texts.names)
    return 2 * -(-count // BATCH) + (seeds - 1) * -(-min(count, COSINE_TEXTS) // BATCH)


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """a, b (T, width), rows of unit length."""
    return (a * b).sum(-1).mean().item()


def recall_at_1(queries: Tensor, targets: Tensor) -> float:
    """queries, targets (T, width), row i of one belonging to row i of the other -> share that find their own."""
    nearest = (queries @ targets.T).argmax(dim=1)
    return (nearest == torch.arange(len(queries))).float().mean().item()


@contextmanager
def uniform_attention(model: Any) -> Iterator[None]:
    """Inside the block every token attends to all tokens alike: what is left of the model without real attention."""
    from transformers import AttentionInterface

    AttentionInterface.register("uniform", _uniform)
    before = model.config._attn_implementation
    model.set_attn_implementation("uniform")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _uniform(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query (B, H, N, D), value (B, H, S, D) -> (B, N, H, D). Only for full rows: a mask has no place here."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("uniform attention is for texts without padding")
    mean = value.mean(dim=2, keepdim=True)  # [B, H, 1, D]
    return mean.expand(-1, -1, query.shape[2], -1).transpose(1, 2).contiguous(), None
