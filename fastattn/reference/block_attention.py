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

import torch
from torch import Tensor


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    look_back: int = 0,
    look_ahead: int = 0,
    wrap: bool = True,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    self_mode: str = "attend",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of block attention; see :func:`fastattn.ops.block_attention.block_attention` for the arguments.

    fp16 and bf16 are computed in fp32. out (B, H, N, Dv) has q's dtype; lse (B, H, N) is fp32 (fp64 for fp64) and, here
    alone, differentiable. A row that meets no key has out 0, lse -inf and zero gradients.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if key_mask is not None:
        k_index = fold_key_mask(k_index, key_mask)
    batch, heads, n_queries, _ = q.shape
    # a column of ones among the values sums the weights, which is the softmax's denominator
    values = torch.cat([v.to(dtype), v.new_ones((*v.shape[:3], 1), dtype=dtype)], -1)
    x, y, z = _with_empty_row(q.to(dtype)), _with_empty_row(k.to(dtype)), _with_empty_row(values)
    maximum = x.new_full((len(x),), -math.inf)
    total = x.new_zeros((len(x), values.shape[-1]))
    for q_rows, k_rows, keep in _rounds(q, k, q_index, k_index, look_back, look_ahead, wrap, is_causal, self_mode):
        s = _scores(x[q_rows], y[k_rows], keep, scale)  # [B, H, nb, Cq, K]
        # a softmax does not depend on what is subtracted, so no gradient passes through the maximum
        block_maximum = s.detach().amax(-1)
        weighted = torch.exp(s - _finite(block_maximum).unsqueeze(-1)) @ z[k_rows]  # [B, H, nb, Cq, Dv + 1]
        round_maximum = torch.full_like(maximum, -math.inf).scatter(0, q_rows.flatten(), block_maximum.flatten())
        new_maximum = torch.maximum(maximum, round_maximum)
        keep_old = torch.exp(maximum - _finite(new_maximum)).unsqueeze(-1)
        keep_new = torch.exp(round_maximum - _finite(new_maximum)).unsqueeze(-1)
        total = total * keep_old + _sum_rows(weighted, q_rows, len(x)) * keep_new
        maximum = new_maximum
    total, maximum = total[:-1].view(batch, heads, n_queries, -1), maximum[:-1].view(batch, heads, n_queries)
    met = total[..., -1] != 0  # also where it is NaN
    denominator = total[..., -1].masked_fill(~met, 1.0)
    out = total[..., :-1] / denominator.unsqueeze(-1)
    lse = (_finite(maximum) + torch.log(denominator)).masked_fill(~met, -math.inf)
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
    *,
    look_back: int = 0,
    look_ahead: int = 0,
    wrap: bool = True,
    is_causal: bool = False,
    self_mode: str = "attend",
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the inputs' dtypes, from the gradient of out and what :func:`block_attention` returned."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    x, y, z, dout, delta, lse = (_with_empty_row(t.to(dtype)) for t in (q, k, v, dout, delta, lse.unsqueeze(-1)))
    dq, dk, dv = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(z)
    for q_rows, k_rows, keep in _rounds(q, k, q_index, k_index, look_back, look_ahead, wrap, is_causal, self_mode):
        q_block, k_block, v_block, dout_block = x[q_rows], y[k_rows], z[k_rows], dout[q_rows]
        p = torch.exp(_scores(q_block, k_block, keep, scale) - _finite(lse[q_rows]))  # [B, H, nb, Cq, K]
        ds = p * (dout_block @ v_block.mT - delta[q_rows]) * scale
        dq += _sum_rows(ds @ k_block, q_rows, len(x))
        dk += _sum_rows(ds.mT @ q_block, k_rows, len(y))
        dv += _sum_rows(p.mT @ dout_block, k_rows, len(z))
    dq, dk, dv = (gradient[:-1].view(tensor.shape) for gradient, tensor in ((dq, q), (dk, k), (dv, v)))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def fold_key_mask(k_index: Tensor, key_mask: Tensor) -> Tensor:
    """``k_index`` (B, H, R, nb, Ck) with -1 in place of the rows where ``key_mask`` (B, S) is False."""
    rows = k_index.flatten(1).clamp_min(0).long()
    keep = key_mask.gather(1, rows).view_as(k_index)
    return torch.where(keep, k_index, k_index.new_full((), -1))


def _rounds(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    look_back: int,
    look_ahead: int,
    wrap: bool,
    is_causal: bool,
    self_mode: str,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each round: rows of the queries (B, H, nb, Cq) and of the K keys that they meet (B, H, nb, K), as numbers in
    what :func:`_with_empty_row` makes of q and k, and which pairs count (B, H, nb, Cq, K)."""
    n_rounds, n_blocks = q_index.shape[2:4]
    distance = torch.arange(-look_back, look_ahead + 1, device=q.device)
    block = torch.arange(n_blocks, device=q.device).unsqueeze(-1) + distance  # [nb, W]
    all_blocks = k_index.flatten(2, 3)  # [B, H, R * nb, Ck]
    for r in range(n_rounds):
        keys = all_blocks[:, :, (r * n_blocks + block) % (n_rounds * n_blocks)]  # [B, H, nb, W, Ck]
        if not wrap:
            inside = (block >= 0) & (block < n_blocks)
            keys = keys.masked_fill(~inside.unsqueeze(-1), -1)
        queries, keys = q_index[:, :, r], keys.flatten(-2)
        i, j = queries.unsqueeze(-1), keys.unsqueeze(-2)
        keep = (i >= 0) & (j >= 0)
        if is_causal:
            keep &= j <= i
        if self_mode == "exclude":
            keep &= j != i
        yield _flat_rows(queries, q), _flat_rows(keys, k), keep


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
