"""SMYRF's hash by definition (Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering", 3.2).

F(q) = [q ; 0 ; sqrt(R2 - |q|^2)] and G(k) = [k ; sqrt(R2 - |k|^2) ; 0] on directions, R2 = max |q|^2 + max |k|^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.reference.hash_argmax import highest_precision


def smyrf_hash(
    q: Tensor, k: Tensor, projections: Tensor, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(q_hash (B, H, R, N), k_hash (B, H, R, S)) of q (B, H, N, D) and k (B, Hkv, S, D); see
    :func:`fastattn.ops.smyrf_hash.smyrf_hash`.

    fp16 and bf16 are computed in fp32, fp32 exactly whatever torch's matmul precision is, and fp64 stays. Neither F(q)
    nor G(k), of D + 2 columns, is made.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, projections = q.to(dtype), k.to(dtype), projections.to(dtype)
    q_height, k_height = heights(q, k, query_mask, key_mask)
    directions, k_direction, q_direction = projections[..., :-2, :], projections[..., -2, :], projections[..., -1, :]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    with highest_precision():
        q_product, k_product = directions.mT @ q.mT, directions.mT @ k.mT  # rows last, as sorting wants them
    q_hash = torch.addcmul(q_product, q_height.unsqueeze(2), q_direction.unsqueeze(-1))
    k_hash = torch.addcmul(k_product, k_height.unsqueeze(2), k_direction.unsqueeze(-1))
    return q_hash, k_hash


def heights(q: Tensor, k: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The coordinates sqrt(R2 - |x|^2) that F and G add: (B, H, N) and (B, H, S), in q's dtype."""
    q_square, q_most = _square_norms(q, query_mask)
    k_square, k_most = _square_norms(k, key_mask)
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k_square, k_most = k_square.repeat_interleave(group, 1), k_most.repeat_interleave(group, 1)
    radius = q_most + k_most  # [B, H, 1]
    return (radius - q_square).clamp_min_(0).sqrt_(), (radius - k_square).clamp_min_(0).sqrt_()


def _square_norms(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """|x_i|^2 (B, H, N) and the largest over the rows that take part (B, H, 1)."""
    # vector_norm makes no copy of x, which x.square() would
    square = torch.linalg.vector_norm(x, dim=-1).square_()
    real = square if mask is None else square.masked_fill(~mask.unsqueeze(1), 0.0)
    return square, real.amax(-1, keepdim=True)
