"""Reformer's attention by definition (Kitaev et al. 2020, "Reformer: The Efficient Transformer", section 2).

Written as what it is, a dense softmax over a multiset: ``count[r, i, j]`` is how often query i meets key j in round r,
and out_i = sum_j count_ij exp(s_ij) v_j / sum_j count_ij exp(s_ij), count summed over the rounds. A row that meets no
key but its own has out_i = v_i. Memory is O(h * N^2) for each head: for tests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    *,
    bucket_size: int = 64,
    look_back: int = 1,
    look_ahead: int = 0,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    across_buckets: bool = True,
    correct_duplicates: bool = False,
    local_window: int = 0,
    merge: str = "lse",
    self_mode: str | None = None,
    wrap: bool | None = None,
    padding: str = "last",
) -> Tensor:
    """out (B, H, N, Dv); the arguments as in :func:`fastattn.lsh_attention`, the buckets (B, H, h, N) of its rows given
    (see :func:`fastattn.reference.hash_argmax.hash_argmax`)."""
    taking_part = torch.ones_like(qk[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    count = meeting_counts(
        buckets, taking_part, bucket_size, look_back=look_back, look_ahead=look_ahead,
        wrap=merge == "lse" if wrap is None else wrap, across_buckets=across_buckets, padding=padding,
    )  # fmt: skip
    if local_window:
        count = torch.cat([count, _local_counts(count[:, :, :1], taking_part, local_window)], 2)
    attend_self = merge == "mean" if self_mode is None else self_mode == "attend"
    if merge == "mean":
        rounds = [_softmax(qk, v, c, taking_part, is_causal, scale, attend_self) for c in count.unbind(2)]
        return torch.stack(rounds).mean(0)
    total = count.sum(2)
    total = total.clamp_max(1) if correct_duplicates else total
    return _softmax(qk, v, total, taking_part, is_causal, scale, attend_self)


def shared_qk_attention(
    qk: Tensor, v: Tensor, *, is_causal: bool = False, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """What LSH attention approximates: every query meets every key once, its own as a last resort."""
    taking_part = torch.ones_like(qk[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    count = (taking_part.unsqueeze(-1) & taking_part.unsqueeze(-2)).unsqueeze(1).expand(-1, qk.shape[1], -1, -1)
    return _softmax(qk, v, count.to(torch.int64), taking_part, is_causal, scale)


def meeting_counts(
    buckets: Tensor,
    taking_part: Tensor,
    bucket_size: int,
    *,
    look_back: int = 1,
    look_ahead: int = 0,
    wrap: bool = True,
    across_buckets: bool = True,
    padding: str = "last",
) -> Tensor:
    """How often query i meets key j in each round, itself too: (B, H, h, N, N) int64, of buckets (B, H, h, N)."""
    batch, heads, rounds, n = buckets.shape
    count = torch.zeros(batch, heads, rounds, n, n, dtype=torch.int64, device=buckets.device)
    for b in range(batch):
        n_cut = int(taking_part[b].sum()) if padding == "last" else n  # rows that are cut into blocks
        n_blocks = max(1, math.ceil(n_cut / bucket_size))
        total = rounds * n_blocks
        for h in range(heads):
            blocks = []
            for r in range(rounds):
                key = buckets[b, h, r].to(torch.int64)
                if padding == "last":
                    key = torch.where(taking_part[b], key, key.max() + 1)
                order = torch.argsort(key, stable=True)
                for block in range(n_blocks):
                    rows = order[block * bucket_size : (block + 1) * bucket_size]
                    blocks.append(rows[taking_part[b, rows]])
            for here in range(total):
                r = here // n_blocks
                for step in range(-look_back, look_ahead + 1):
                    there = here + step
                    if not wrap and there // n_blocks != r:
                        continue
                    there %= total
                    rows, keys = blocks[here].unsqueeze(-1), blocks[there]
                    meets = torch.ones(rows.shape[0], keys.shape[0], dtype=torch.int64, device=buckets.device)
                    if not across_buckets:
                        meets *= buckets[b, h, r, rows] == buckets[b, h, r, keys]
                        meets *= there // n_blocks == r  # buckets of different rounds do not mix
                    count[b, h, r, rows, keys] += meets
    return count


def _local_counts(like: Tensor, taking_part: Tensor, window: int) -> Tensor:
    """Counts of one round whose blocks are ``window`` consecutive rows of those that take part."""
    place = (taking_part.cumsum(-1) - 1) // window  # [B, N]
    share = (place.unsqueeze(-1) == place.unsqueeze(-2)) & taking_part.unsqueeze(-1) & taking_part.unsqueeze(-2)
    return share[:, None, None].expand_as(like).to(like.dtype)


def _softmax(
    qk: Tensor, v: Tensor, count: Tensor, taking_part: Tensor, is_causal: bool, scale: float | None,
    attend_self: bool = False,
) -> Tensor:  # fmt: skip
    scale = 1 / math.sqrt(qk.shape[-1]) if scale is None else scale
    if not attend_self:
        count = count.masked_fill(torch.eye(qk.shape[2], dtype=torch.bool, device=qk.device), 0)
    if is_causal:
        count = count.tril()
    real = taking_part[:, None, :, None]
    qk, v = qk.masked_fill(~real, 0.0), v.masked_fill(~real, 0.0)
    v = v.repeat_interleave(qk.shape[1] // v.shape[1], 1)
    # a row of zeros has itself as its key
    norm = torch.linalg.vector_norm(qk, dim=-1, keepdim=True)
    k = qk / norm.masked_fill(norm == 0, 1.0)
    s = (qk @ k.mT * scale).masked_fill(count == 0, -math.inf)
    met = (count > 0).any(-1, keepdim=True)
    weight = count * torch.exp(s - s.detach().amax(-1, keepdim=True).masked_fill(~met, 0.0))
    out = weight / weight.sum(-1, keepdim=True).masked_fill(~met, 1.0) @ v
    return torch.where(met, out, v)
