"""Decoding with Reformer's LSH attention, token by token, with the buckets of earlier tokens kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.methods.reformer import check_lsh_inputs, factors_for, unit_rows
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.block_attention import attend_blocks
from fastattn.ops.hash_argmax import bucket_rows, check_rotations


@dataclass(frozen=True)
class LshState:
    """What is kept of the tokens so far: by :func:`lsh_decoding_state`, and onwards by :func:`lsh_attention_step`.

    k: (B, H, capacity, D), unit keys. v: (B, H, capacity, Dv). buckets: (B, H, h, capacity) int32, -1 for tokens that
    take no part. rotations, factors: of the hash. length: tokens so far; what stands beyond has no meaning.
    """

    k: Tensor
    v: Tensor
    buckets: Tensor
    rotations: Tensor
    factors: tuple[int, ...]
    length: int

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


@torch.no_grad()
def lsh_decoding_state(
    qk: Tensor,
    v: Tensor,
    *,
    n_hashes: int = 8,
    bucket_size: int = 64,
    n_buckets: int | Sequence[int] | None = None,
    key_mask: Tensor | None = None,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    capacity: int | None = None,
    impl: str | None = None,
) -> LshState:
    """The state after a prefix of tokens, for :func:`lsh_attention_step`.

    Args:
        qk: (B, H, N, D) and v: (B, Hkv, N, Dv), as :func:`fastattn.lsh_attention` takes them.
        n_hashes, n_buckets, rotations, generator: as there. The number of buckets stays what it is here; its default is
            that for ``capacity`` tokens in blocks of ``bucket_size``.
        bucket_size: for the default number of buckets.
        key_mask: (B, N) bool, True for tokens that take part: padding of shorter prefixes is False.
        capacity: tokens that the state has room for at first, at least N; None: N. It doubles when it is full.
        impl: of hashing.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    qk, v = check_lsh_inputs(qk, v, None, impl)
    checks.check_int("n_hashes", n_hashes, 1)
    checks.check_int("bucket_size", bucket_size, 1)
    checks.check_mask("key_mask", key_mask, qk.shape[0], qk.shape[2], qk.device)
    length = qk.shape[2]
    capacity = length if capacity is None else capacity
    checks.check_int("capacity", capacity, length)
    factors = factors_for(n_buckets, rotations, capacity, bucket_size)
    if rotations is None:
        shape = (qk.shape[1], qk.shape[3], n_hashes, sum(factors) // 2)
        rotations = common.draw_normal(shape, generator, qk.device)
    else:
        check_rotations(rotations, qk, factors, n_hashes)
    with no_autocast(qk.device.type):
        buckets = bucket_rows(qk, rotations, factors, impl)
    if key_mask is not None:
        buckets = buckets.masked_fill(~key_mask[:, None, None], -1)
    state = LshState(unit_rows(qk), _per_head(qk, v), buckets, rotations, factors, length)
    return _with_capacity(state, capacity)


@torch.no_grad()
def lsh_attention_step(
    qk: Tensor,
    v: Tensor,
    state: LshState,
    *,
    bucket_size: int = 64,
    look_back: int = 1,
    across_buckets: bool = True,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, LshState]:
    """Attention of one new token to at most n_hashes * bucket_size * (1 + look_back) earlier ones.

    These are the earlier tokens that share its bucket in some round, the most recent ones where there are more; where
    there are fewer, the most recent others fill up, as a block holds neighbours of other buckets too (only with
    ``across_buckets``). They make one softmax, each counted once. The token's own key is the last resort, as in
    :func:`fastattn.lsh_attention`. So a state of no more tokens than that gives causal attention over all of them.

    The rule is that of trax's one-token decoding (Kitaev et al. 2020); it is not the causal form for training, in which
    blocks depend on later tokens. Comparing buckets takes time in proportion to n_hashes * length, attention does not
    grow with the length; the state grows by D + Dv numbers and n_hashes buckets a token and head, and is not bounded.

    Args:
        qk: (B, H, 1, D) and v: (B, Hkv, 1, Dv): the new token, in the dtype of the state.
        state: is written to: go on with the one that is returned, and not with this one.
        bucket_size, look_back, across_buckets, scale, impl: as in :func:`fastattn.lsh_attention`.

    Returns:
        out (B, H, 1, Dv), without a gradient, and the state with the token in it.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    qk, v = check_lsh_inputs(qk, v, scale, impl)
    checks.check_int("bucket_size", bucket_size, 1)
    checks.check_int("look_back", look_back, 0)
    checks.check_bool("across_buckets", across_buckets)
    _check_state(state, qk, v)
    if state.length == state.capacity:
        state = _with_capacity(state, 2 * state.capacity)
    now = state.length
    with no_autocast(qk.device.type):
        bucket = bucket_rows(qk, state.rotations, state.factors, impl)  # [B, H, h, 1]
        state.k[:, :, now] = unit_rows(qk)[:, :, 0]
        state.v[:, :, now] = _per_head(qk, v)[:, :, 0]
        state.buckets[:, :, :, now] = bucket[..., 0]
        most = min(now, state.buckets.shape[2] * bucket_size * (1 + look_back))
        k_index = _candidates(state.buckets[..., :now], bucket, most, across_buckets)
    q_index = torch.zeros(k_index.shape[:2], dtype=torch.int32, device=qk.device)[..., None, None, None]
    out, _ = attend_blocks(
        qk, state.k, state.v, q_index, k_index[:, :, None, None].contiguous(), scale=scale, impl=impl
    )
    return out, replace(state, length=now + 1)


def _candidates(buckets: Tensor, bucket: Tensor, most: int, across_buckets: bool) -> Tensor:
    """The tokens that a new one of ``bucket`` (B, H, h, 1) attends to, of those of ``buckets`` (B, H, h, S) before it:
    (B, H, most + 1) int32, -1 for none. The last place is its own, S, where there is no other."""
    length = buckets.shape[-1]
    shares = (buckets == bucket).any(2)  # [B, H, S]
    rank = torch.arange(length, device=buckets.device) + length * shares
    rank = rank.masked_fill(buckets[:, :, 0] < 0 if across_buckets else ~shares, -1)
    best, rows = rank.topk(most, -1)
    rows = rows.masked_fill(best < 0, -1)
    own = torch.where((best < 0).all(-1, keepdim=True), length, -1)
    return torch.cat([rows, own], -1).to(torch.int32)


def _per_head(qk: Tensor, v: Tensor) -> Tensor:
    return v.repeat_interleave(qk.shape[1] // v.shape[1], 1)


def _with_capacity(state: LshState, capacity: int) -> LshState:
    """A copy with room for ``capacity`` tokens."""

    def grown(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = capacity
        result = x.new_empty(shape)
        result.narrow(dim, 0, state.length).copy_(x.narrow(dim, 0, state.length))
        return result

    return replace(state, k=grown(state.k, 2), v=grown(state.v, 2), buckets=grown(state.buckets, 3))


def _check_state(state: Any, qk: Tensor, v: Tensor) -> None:
    if not isinstance(state, LshState):
        raise TypeError(f"state must come from lsh_decoding_state, got {type(state).__name__}")
    if qk.shape[2] != 1:
        raise ValueError(f"qk must hold one token, got shape {tuple(qk.shape)}")
    wanted = (*state.k.shape[:2], 1, state.k.shape[3])
    if tuple(qk.shape) != wanted or v.shape[3] != state.v.shape[3] or qk.device != state.k.device:
        raise ValueError(
            f"state is for qk of shape {wanted} and v of width {state.v.shape[3]} on {state.k.device}, got qk "
            f"{tuple(qk.shape)} and v {tuple(v.shape)} on {qk.device}"
        )
    if qk.dtype != state.k.dtype:
        raise TypeError(f"state holds {state.k.dtype}, got qk and v of {qk.dtype}")
