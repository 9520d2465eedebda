"""Gathered block attention by definition: each block of queries attends to its block of keys, in several rounds.

All rounds together are one softmax: a row's output is the softmax-weighted mean of the values of every key that it met,
and a key met twice counts twice. The rounds are folded one by one into a running (numerator, denominator, maximum), so
that memory is O(N * C) a round; under autograd it is O(R * N * C).

:func:`block_attention` is differentiable by plain autograd, any number of times. :func:`block_attention_backward` is
the same gradient written out from (out, lse) alone, as in FlashAttention-2 (Dao 2023, section 3.1), with nothing kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .dropout import kept


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) of block attention; see :func:`fastattn.ops.block_attention.block_attention` for the arguments.

    fp16 and bf16 are computed in fp32. out (B, H, N, Dv) has q's dtype; lse (B, H, N) is fp32 (fp64 for fp64) and, here
    alone, differentiable. A row that meets no key has out 0, lse -inf and zero gradients.
    """
    blocks = _Blocks.of(q, k, q_index, k_index, **options)
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_queries, _ = q.shape
    x, y, z = (_with_empty_row(tensor.to(dtype)) for tensor in (q, k, v))
    maximum = x.new_full((len(x),), -math.inf)
    total = x.new_zeros((len(x), v.shape[-1] + 1))  # the last column is the denominator
    for pairs in blocks.rounds():
        s = _scores(x[pairs.q_rows], y[pairs.k_rows], pairs.keep, blocks.scale)  # [B, H, nb, Cq, K]
        # a softmax does not depend on what is subtracted, so no gradient passes through the maximum
        block_maximum = s.detach().amax(-1)
        p = torch.exp(s - _finite(block_maximum).unsqueeze(-1))
        weighted = torch.cat([p * pairs.weight @ z[pairs.k_rows], p.sum(-1, keepdim=True)], -1)
        round_maximum = torch.full_like(maximum, -math.inf).scatter(0, pairs.q_rows.flatten(), block_maximum.flatten())
        new_maximum = torch.maximum(maximum, round_maximum)
        keep_old = torch.exp(maximum - _finite(new_maximum)).unsqueeze(-1)
        keep_new = torch.exp(round_maximum - _finite(new_maximum)).unsqueeze(-1)
        total = total * keep_old + _sum_rows(weighted, pairs.q_rows, len(x)) * keep_new
        maximum = new_maximum
    total, maximum = total[:-1].view(batch, heads, n_queries, -1), maximum[:-1].view(batch, heads, n_queries)
    met = total[..., -1] != 0  # also where it is NaN
    denominator = total[..., -1].masked_fill(~met, 1.0)
    out = total[..., :-1] / denominator.unsqueeze(-1)
    lse = (_finite(maximum) + torch.log(denominator)).masked_fill(~met, -math.inf)
    if blocks.self_mode == "last_resort":
        own = blocks.own_keys(~met)
        s = (x[own.q_rows] * y[own.k_rows]).sum(-1) * blocks.scale
        out = torch.where(own.keep.unsqueeze(-1), z[own.k_rows], out)
        lse = torch.where(own.keep, s, lse)
    return out.to(q.dtype), lse


def block_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    out: Tensor,
    lse: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the inputs' dtypes, from the gradient of out and what :func:`block_attention` returned."""
    blocks = _Blocks.of(q, k, q_index, k_index, **options)
    dtype = torch.promote_types(q.dtype, torch.float32)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    x, y, z, dout, delta, lse = (_with_empty_row(t.to(dtype)) for t in (q, k, v, dout, delta, lse.unsqueeze(-1)))
    dq, dk, dv = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(z)
    met = torch.zeros_like(delta)
    for pairs in blocks.rounds():
        q_block, k_block, v_block, dout_block = x[pairs.q_rows], y[pairs.k_rows], z[pairs.k_rows], dout[pairs.q_rows]
        s = _scores(q_block, k_block, pairs.keep, blocks.scale)
        p = torch.exp(s - _finite(lse[pairs.q_rows]))  # [B, H, nb, Cq, K]
        ds = p * (dout_block @ v_block.mT * pairs.weight - delta[pairs.q_rows]) * blocks.scale
        dq += _sum_rows(ds @ k_block, pairs.q_rows, len(x))
        dk += _sum_rows(ds.mT @ q_block, pairs.k_rows, len(y))
        dv += _sum_rows((p * pairs.weight).mT @ dout_block, pairs.k_rows, len(z))
        met += _sum_rows(pairs.keep.any(-1, keepdim=True).to(dtype), pairs.q_rows, len(x))
    if blocks.self_mode == "last_resort":
        own = blocks.own_keys(met[:-1].view(q.shape[:3]) == 0)
        dv += _sum_rows(dout[own.q_rows], own.k_rows, len(z))
    dq, dk, dv = (gradient[:-1].view(tensor.shape) for gradient, tensor in ((dq, q), (dk, k), (dv, v)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def fold_key_mask(k_index: Tensor, key_mask: Tensor) -> Tensor:
    """``k_index`` (B, H, R, nb, Ck) with -1 in place of the rows where ``key_mask`` (B, S) is False."""
    # what is no row keeps its place, at the mask's ends, for who checks row numbers afterwards
    ends = torch.nn.functional.pad(key_mask, (1, 1), value=True)
    rows = k_index.flatten(1).long().clamp_(-1, key_mask.shape[1]).add_(1)
    keep = ends.gather(1, rows).view_as(k_index)
    return torch.where(keep, k_index, k_index.new_full((), -1))


@dataclass(frozen=True)
class _Pairs:
    """Blocks of queries and the K keys that they meet. q_rows (B, H, nb, Cq) and k_rows (B, H, nb, K): numbers in what
    :func:`_with_empty_row` makes of q and k. keep (B, H, nb, Cq, K): which pairs count. weight: what dropout multiplies
    their probabilities with, 1.0 where there is none."""

    q_rows: Tensor
    k_rows: Tensor
    keep: Tensor
    weight: Tensor | float = 1.0


@dataclass(frozen=True)
class _Blocks:
    """Who meets whom: the arguments of block attention but for the values, the key mask folded into the indices."""

    q: Tensor
    k: Tensor
    q_index: Tensor
    k_index: Tensor
    scale: float
    look_back: int = 0
    look_ahead: int = 0
    wrap: bool = True
    key_mask: Tensor | None = None
    is_causal: bool = False
    self_mode: str = "attend"
    q_bucket: Tensor | None = None
    k_bucket: Tensor | None = None
    local_index: tuple[Tensor, Tensor] | None = None
    correct_duplicates: bool = False
    dropout_p: float = 0.0
    seed: int = 0
    n_used_blocks: Tensor | None = None

    @staticmethod
    def of(
        q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, *, scale: float | None = None, **options: Any
    ) -> _Blocks:  # fmt: skip
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        blocks = _Blocks(q, k, q_index, k_index, scale, **options)
        key_mask, local_index = blocks.key_mask, blocks.local_index
        if key_mask is None:
            return blocks
        if local_index is not None:
            local_index = (local_index[0], fold_key_mask(local_index[1], key_mask))
        return replace(blocks, k_index=fold_key_mask(k_index, key_mask), local_index=local_index)

    def rounds(self) -> Iterator[_Pairs]:
        heads, n_rounds, n_blocks, size = self.k_index.shape[1:]
        window = torch.arange(1 + self.look_back + self.look_ahead, device=self.q.device)
        block = torch.arange(n_blocks, device=self.q.device).unsqueeze(-1) + window - self.look_back  # [nb, W]
        all_blocks = self.k_index.flatten(2, 3)  # [B, H, R * nb, Ck]
        step = window.repeat_interleave(size)  # [K]
        n_used = self._used()[:, None, None]  # [B or 1, 1, 1]
        for r in range(n_rounds):
            place = (r * n_used + block) % (n_rounds * n_used)  # among the used blocks of all rounds, [B or 1, nb, W]
            k_round = place // n_used
            number = (k_round * n_blocks + place % n_used).flatten(1)[:, None, :, None]
            keys = all_blocks.gather(2, number.expand(len(self.q), heads, -1, size))  # [B, H, nb * W, Ck]
            keys = keys.unflatten(2, block.shape)
            if not self.wrap:
                inside = (block >= 0) & (block < n_used)
                keys = keys.masked_fill(~inside[:, None, ..., None], -1)
            queries, keys = self.q_index[:, :, r], keys.flatten(-2)
            keep = self._may_meet(queries, keys)
            if self.q_bucket is not None:
                here = (k_round == r).repeat_interleave(size, -1)  # [B or 1, nb, K]
                keep &= here[:, None, :, None] & self._share_a_bucket(queries, keys, r)
            yield self._pairs(queries, keys, keep, r, step)
        if self.self_mode == "once":
            queries = torch.arange(self.q.shape[2], dtype=torch.int32, device=self.q.device).expand(self.q.shape[:3])
            takes_part = self._stands_in_a_block() & self._key_takes_part()
            queries = queries.masked_fill(~takes_part, -1).unsqueeze(-1)  # each row is a block of its own
            keep = (queries >= 0).unsqueeze(-1)
            yield self._weighed(queries, queries, keep, n_rounds + (self.local_index is not None))
        if self.local_index is not None:
            queries, keys = (index[:, :, 0] for index in self.local_index)
            keep = self._may_meet(queries, keys)
            yield self._pairs(queries, keys, keep, n_rounds, torch.zeros_like(step[:1]))

    def own_keys(self, alone: Tensor) -> _Pairs:
        """The rows that fall back on their own key, of those that met no key: all rows (B, H, N), as one another's only
        key; the others stand as the empty row."""
        keep = alone & self._stands_in_a_block() & self._key_takes_part()
        rows = torch.arange(self.q.shape[2], device=self.q.device).expand(self.q.shape[:3]).masked_fill(~keep, -1)
        q_rows, k_rows = (_flat_rows(rows.unsqueeze(-1), x).squeeze(-1) for x in (self.q, self.k))
        return _Pairs(q_rows, k_rows, keep)

    def _stands_in_a_block(self) -> Tensor:
        """Which rows of q (B, H, N)."""
        found = self._block_numbers(self.q_index, self.q.shape[2]).amax(2) >= 0
        if self.local_index is not None:
            found |= self._block_numbers(self.local_index[0], self.q.shape[2]).amax(2) >= 0
        return found

    def _key_takes_part(self) -> Tensor:
        """Which rows of k, (B, 1, S)."""
        if self.key_mask is None:
            return torch.ones(1, 1, self.k.shape[2], dtype=torch.bool, device=self.k.device)
        return self.key_mask.unsqueeze(1)

    def _may_meet(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which pairs (B, H, nb, Cq, K) count, whatever blocks and buckets they are in."""
        i, j = queries.unsqueeze(-1), keys.unsqueeze(-2)
        keep = (i >= 0) & (j >= 0)
        if self.is_causal:
            keep &= j <= i
        if self.self_mode != "attend":
            keep &= j != i
        return keep

    def _pairs(self, queries: Tensor, keys: Tensor, keep: Tensor, round_id: int, step: Tensor) -> _Pairs:
        """step: where in the window of its query a key stands, [K]."""
        if self.correct_duplicates:
            keep &= ~self._met_before(queries, keys, round_id, step)
        return self._weighed(queries, keys, keep, round_id)

    def _weighed(self, queries: Tensor, keys: Tensor, keep: Tensor, round_id: int) -> _Pairs:
        rows = _flat_rows(queries, self.q), _flat_rows(keys, self.k)
        if self.dropout_p == 0:
            return _Pairs(*rows, keep)
        batch, heads = self.q.shape[:2]
        head = torch.arange(batch * heads, device=self.q.device).view(batch, heads, 1, 1, 1)
        places = (x.clamp_min(0).long() for x in (queries.unsqueeze(-1), keys.unsqueeze(-2)))
        stays = kept(self.dropout_p, self.seed, head, round_id, *places)
        dtype = torch.promote_types(self.q.dtype, torch.float32)
        return _Pairs(*rows, keep, stays.to(dtype) / (1 - self.dropout_p))

    def _met_before(self, queries: Tensor, keys: Tensor, round_id: int, step: Tensor) -> Tensor:
        """Which pairs also met in an earlier round, or in this one at an earlier step of the query's window."""
        n_rounds, n_used = self.q_index.shape[2], self._used()[:, None, None, None, None]
        window = 1 + self.look_back + self.look_ahead
        q_block = self._block_numbers(self.q_index, self.q.shape[2])
        k_block = self._block_numbers(self.k_index, self.k.shape[2])
        met = torch.zeros((*queries.shape, keys.shape[-1]), dtype=torch.bool, device=self.q.device)
        for r in range(min(round_id + 1, n_rounds)):
            here = _at(q_block[:, :, r], queries).unsqueeze(-1)
            # the key may stand in this round's blocks, or in those of a round that a window reaches into
            for other in range(n_rounds) if self.wrap and self.q_bucket is None else (r,):
                there = _at(k_block[:, :, other], keys).unsqueeze(-2)
                at = (other - r) * n_used + there - here + self.look_back  # the step at which they meet
                at = at % (n_rounds * n_used) if self.wrap else at
                met_here = (here >= 0) & (there >= 0) & (at >= 0) & (at < (step if r == round_id else window))
                met |= met_here if self.q_bucket is None else met_here & self._share_a_bucket(queries, keys, r)
        return met

    def _used(self) -> Tensor:
        """How many blocks of each round an example uses, (B,), or (1,) where all use all."""
        if self.n_used_blocks is None:
            return torch.full((1,), self.q_index.shape[3], device=self.q.device)
        return self.n_used_blocks.long()

    def _share_a_bucket(self, queries: Tensor, keys: Tensor, round_id: int) -> Tensor:
        assert self.q_bucket is not None and self.k_bucket is not None
        here, there = _at(self.q_bucket[:, :, round_id], queries), _at(self.k_bucket[:, :, round_id], keys)
        return here.unsqueeze(-1) == there.unsqueeze(-2)

    @staticmethod
    def _block_numbers(index: Tensor, length: int) -> Tensor:
        """In which block each row stands in each round (B, H, R, length), -1 where in none."""
        n_blocks, size = index.shape[3:]
        number = torch.arange(n_blocks, device=index.device).repeat_interleave(size).expand(index.flatten(3).shape)
        rows = index.flatten(3).long()
        numbers = number.new_full((*rows.shape[:3], length + 1), -1)
        return numbers.scatter(3, rows.masked_fill(rows < 0, length), number)[..., :-1]


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values (B, H, L) at rows (B, H, nb, C); of row 0 where there is none."""
    return values.gather(2, rows.flatten(2).clamp_min(0).long()).view(rows.shape)


def _with_empty_row(x: Tensor) -> Tensor:
    """x (B, H, L, F) as rows (B * H * L + 1, F). The last, of zeros, is what index -1 reads, and what it adds to is
    dropped: so nothing that padding holds, not even NaN, gets into a result or a gradient."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.cat([rows, rows.new_zeros((1, rows.shape[-1]))])


def _flat_rows(rows: Tensor, x: Tensor) -> Tensor:
    """Row numbers (B, H, nb, C) within a head of x (B, Hx, L, F), heads in groups, as numbers over all of x."""
    batch, heads, length, _ = x.shape
    head = torch.arange(rows.shape[1], device=rows.device) // (rows.shape[1] // heads)
    first = (torch.arange(batch, device=rows.device).unsqueeze(-1) * heads + head) * length  # [B, H]
    return torch.where(rows < 0, batch * heads * length, rows + first[..., None, None])


def _sum_rows(blocks: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """The transpose of reading rows: sums blocks (B, H, nb, C, F) into (n_rows, F)."""
    width = blocks.shape[-1]
    return blocks.new_zeros((n_rows, width)).index_add(0, rows.flatten(), blocks.reshape(-1, width))


def _scores(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).masked_fill(~keep, -math.inf)


def _finite(x: Tensor) -> Tensor:
    """-inf as 0: what is subtracted from a row of -inf, so that its exponentials are 0 and not NaN."""
    return x.masked_fill(x == -math.inf, 0.0)
