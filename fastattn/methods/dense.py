"""Exact attention with the arguments of the approximate methods: torch's own ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.methods import common
from fastattn.ops import checks
from fastattn.ops.block_attention import check_dropout


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v, in time O(N * S); with both a mask and is_causal, in memory O(N * S) too.

    Args:
        q: (B, H, N, D), k: (B, Hkv, S, D), v: (B, Hkv, S, Dv), as :func:`fastattn.smyrf_attention` has them; fp64 too.
        key_mask: (B, S) bool, True for keys that take part. What stands in the others has no effect.
        query_mask: (B, N) bool, True for queries that take part; the others give 0. None: ``key_mask`` if N == S.
        is_causal: query i meets keys 0 to i.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: as torch has it, from torch's own random state.

    Returns:
        out (B, H, N, Dv) in q's dtype; 0 where a row meets no key.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, "reference")
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    checks.check_bool("is_causal", is_causal)
    check_dropout(dropout_p, 0, q.device)
    mask, alone = None, None  # alone: rows that meet no key
    if query_mask is not None:
        alone = ~query_mask.unsqueeze(1)  # [B, 1, N]
        q = q.masked_fill(alone.unsqueeze(-1), 0.0)
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
        mask = key_mask[:, None, None]
        if is_causal:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        without_keys = ~mask.any(-1)  # [B, 1, 1 or N]
        # they shall meet all keys, of which nothing is kept: some of torch's kernels make NaN of a row without keys
        mask = mask | without_keys.unsqueeze(-1)
        alone = without_keys if alone is None else alone | without_keys
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out if alone is None else out.masked_fill(alone.unsqueeze(-1), 0.0)
