"""The local round of hashing methods: blocks of consecutive positions."""

from __future__ import annotations

import torch
from torch import Tensor


def local_blocks(window: int, q: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """q_index and k_index, each (B, H, 1, nb, w) int32: blocks of ``window`` consecutive positions, the last one
    shorter, for q (B, H, N, D) and as many keys.

    Positions are counted over the rows that take part as a query or as a key, so that padding, wherever it stands, does
    not move them. The places of rows that take no part hold -1.
    """
    batch, heads, n, _ = q.shape
    window = min(window, n)
    n_blocks = -(-n // window)
    rows = torch.arange(n, dtype=torch.int32, device=q.device).expand(batch, n)
    if query_mask is not None and key_mask is not None:
        taking_part = query_mask if query_mask is key_mask else query_mask | key_mask
        rows = torch.sort(~taking_part, dim=-1, stable=True).indices.to(torch.int32)

    def blocks(mask: Tensor | None) -> Tensor:
        kept = rows if mask is None else torch.where(mask.gather(1, rows.long()), rows, -1)
        kept = torch.nn.functional.pad(kept, (0, n_blocks * window - n), value=-1)
        return kept.view(batch, 1, 1, n_blocks, window).expand(-1, heads, -1, -1, -1)

    q_index = blocks(query_mask)
    return q_index, q_index if query_mask is key_mask else blocks(key_mask)
