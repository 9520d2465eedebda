"""How far approximate attention is from what it approaches: exact rows in float64, in memory linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations.calibrate_spaces import Sample
from fastattn.methods.reformer import unit_rows

MOST_ROWS = 2048  # of a head: so many, evenly spread, tell the error of any number
_LOGITS = 2**22  # at once, in float64


class Exact:
    """The exact attention of a sample's rows; made once, compared with many approximations.

    is_shared: queries are keys, as in Reformer: keys of unit length, and a row's own key only where there is no other.
    """

    def __init__(self, sample: Sample, is_shared: bool) -> None:
        count = min(sample.length, MOST_ROWS)
        self.rows = torch.arange(count, device=sample.q.device) * sample.length // count
        heads = [
            _head(sample, index, head, self.rows, is_shared)
            for index in range(sample.q.shape[0])
            for head in range(sample.q.shape[1])
        ]
        self.out = torch.stack(heads).unflatten(0, sample.q.shape[:2])  # [B, H, rows, Dv]
        self.taking_part = None if sample.key_mask is None else sample.key_mask[:, None, self.rows, None]
        self.norm = self._norm(self.out)

    def error(self, approximate: Tensor) -> float:
        """Norm of the difference over the norm of the exact rows, of all rows that take part together."""
        return float(self._norm(approximate.index_select(2, self.rows).double() - self.out) / self.norm)

    def _norm(self, rows: Tensor) -> Tensor:
        if self.taking_part is not None:
            rows = rows.masked_fill(~self.taking_part, 0.0)
        return torch.linalg.vector_norm(rows)


def _head(sample: Sample, index: int, head: int, rows: Tensor, is_shared: bool) -> Tensor:
    """[rows, Dv] of one head, float64; a row that meets no key has 0."""
    mask = None if sample.key_mask is None else sample.key_mask[index]
    own = head * sample.k.shape[1] // sample.q.shape[1]
    k = unit_rows(sample.q[index, head].double()) if is_shared else sample.k[index, own].double()
    v = sample.v[index, head * sample.v.shape[1] // sample.q.shape[1]].double()
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None], 0.0) for x in (k, v))
    positions = torch.arange(sample.length, device=rows.device)
    parts = []
    for part in rows.split(max(1, _LOGITS // sample.length)):
        logits = sample.q[index, head, part].double() @ k.T * sample.scale  # [rows, N]
        hidden = torch.zeros_like(logits, dtype=torch.bool) if mask is None else ~mask.expand_as(logits)
        if sample.is_causal:
            hidden = hidden | (positions > part[:, None])
        if is_shared:
            others = hidden | (positions == part[:, None])
            hidden = torch.where(others.all(-1, keepdim=True), hidden, others)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(weights.masked_fill(hidden.all(-1, keepdim=True), 0.0) @ v)
    return torch.cat(parts)
