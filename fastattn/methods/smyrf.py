"""SMYRF attention (Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering")."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.ops import checks
from fastattn.ops.argsort import stable_argsort
from fastattn.ops.autocast import no_autocast
from fastattn.ops.block_attention import attend_blocks
from fastattn.ops.library import define_op, refuse_gradient


@overload
def smyrf_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_hashes: int = ..., q_cluster_size: int = ...,
    k_cluster_size: int | None = ..., key_mask: Tensor | None = ..., query_mask: Tensor | None = ...,
    scale: float | None = ..., projections: Tensor | None = ..., generator: torch.Generator | None = ...,
    return_lse: Literal[False] = ..., impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def smyrf_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_hashes: int = ..., q_cluster_size: int = ...,
    k_cluster_size: int | None = ..., key_mask: Tensor | None = ..., query_mask: Tensor | None = ...,
    scale: float | None = ..., projections: Tensor | None = ..., generator: torch.Generator | None = ...,
    return_lse: Literal[True], impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def smyrf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_hashes: int = 4,
    q_cluster_size: int = 64,
    k_cluster_size: int | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    projections: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within balanced clusters of queries and keys with large inner products.

    Queries and keys are mapped onto one sphere, so that the nearest key is the one of largest inner product (section
    3.2: F(q) = [q; 0; sqrt(R2 - |q|^2)], G(k) = [k; sqrt(R2 - |k|^2); 0]), projected on ``n_hashes`` random directions
    and sorted along each; consecutive queries attend to the consecutive keys of the same rank (section 3.3). The rounds
    make one softmax over all keys met, where a key met in several rounds counts several times: with one cluster this is
    dense attention; with more rounds the error falls, though not to zero.

    Time is O(n_hashes * N * (log N + cluster size * (D + Dv))), extra memory O(n_hashes * N + N * (D + Dv)).

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv) in q's dtype. H is a multiple of Hkv; fewer key heads give what keys
            and values repeated for each group of query heads would.
        n_hashes: rounds.
        q_cluster_size: queries of a cluster; there are ceil(N / q_cluster_size) clusters. With fewer keys than that
            there are as many clusters as keys, of more queries.
        k_cluster_size: keys of a cluster; ceil(S / k_cluster_size) must be the number of clusters. None: as many keys
            as it takes.
        key_mask: (B, S) bool, True for keys that take part. What stands in the others, norms included, has no effect.
        query_mask: (B, N) bool, True for queries that take part; the others give 0. None: ``key_mask`` if N == S, else
            all take part.
        scale: factor of q . k; None is 1 / sqrt(D).
        projections: (D + 2, n_hashes), the random directions, in the order [D rows for q or k; that of k's norm; that
            of q's norm]. Used in fp32 (fp64 for fp64 inputs).
        generator: draws the directions, standard normal, where they are not given.
        return_lse: also return the logarithm of the softmax's denominator, (B, H, N), in fp32 (fp64 for fp64); it
            carries no gradient.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, lse). A row that meets no key has out 0 and lse -inf.

    Where queries and keys take part alike (N == S, one mask, one cluster size), clusters are filled one after the
    other, so padding changes nothing. Otherwise the rows that take part are cut at the same quantiles on both sides, so
    that every cluster has keys if at least as many take part as there are clusters.

    Routing is not differentiated. Under autocast q, k and v are cast to its dtype. Exported graphs
    (``torch.export``) hold the whole method as one node, ``fastattn::smyrf_attention``.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, impl)
    checks.check_int("n_hashes", n_hashes, 1)
    checks.check_int("q_cluster_size", q_cluster_size, 1)
    if k_cluster_size is not None:
        checks.check_int("k_cluster_size", k_cluster_size, 1)
    checks.check_bool("return_lse", return_lse)
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    directions = (q.shape[-1] + 2, n_hashes)
    if projections is None:
        projections = common.draw_normal(directions, generator, q.device)
    else:
        common.check_draw("projections", projections, directions, "(head_dim + 2, n_hashes)", q.device)
    if torch.compiler.is_exporting() and impl is None:
        args = (q, k, v, projections, key_mask, None if query_mask is key_mask else query_mask)
        out, lse = _OP(*args, q_cluster_size, k_cluster_size, scale)
    else:
        out, lse = _attend(q, k, v, projections, key_mask, query_mask, q_cluster_size, k_cluster_size, scale, impl)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    q_cluster_size: int,
    k_cluster_size: int | None,
    scale: float,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    is_self_like = q.shape[2] == k.shape[2] and query_mask is key_mask
    clusters = _plan(q.shape[2], k.shape[2], q_cluster_size, k_cluster_size, is_self_like)
    with no_autocast(q.device.type):
        q_index, k_index = _route(q, k, projections, key_mask, query_mask, clusters)
    return attend_blocks(q, k, v, q_index, k_index, scale=scale, impl=impl)


@dataclass(frozen=True)
class _Clusters:
    """n_blocks clusters of at most q_size queries and k_size keys. packed: filled one after the other."""

    n_blocks: int
    q_size: int
    k_size: int
    packed: bool


def _plan(n: int, s: int, q_cluster_size: int, k_cluster_size: int | None, is_self_like: bool) -> _Clusters:
    n_blocks = -(-n // q_cluster_size)
    if k_cluster_size is not None:
        n_key_blocks = -(-s // k_cluster_size)
        if n_key_blocks != n_blocks:
            raise ValueError(
                f"k_cluster_size must make as many clusters as q_cluster_size: {n} queries in clusters of "
                f"q_cluster_size={q_cluster_size} are {n_blocks}, {s} keys in clusters of "
                f"k_cluster_size={k_cluster_size} are {n_key_blocks}"
            )
    if is_self_like and k_cluster_size in (None, q_cluster_size):
        return _Clusters(n_blocks, q_cluster_size, q_cluster_size, packed=True)
    if s < n_blocks:
        return _Clusters(s, -(-n // s), 1, packed=False)
    return _Clusters(n_blocks, q_cluster_size, k_cluster_size or -(-s // n_blocks), packed=False)


@torch.no_grad()
def _route(
    q: Tensor,
    k: Tensor,
    projections: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    clusters: _Clusters,
) -> tuple[Tensor, Tensor]:
    """q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, Ck), int32."""
    q_hash, k_hash = _hashes(q, k, projections, key_mask, query_mask)
    q_index = _cut(_order(q_hash, query_mask), query_mask, clusters.n_blocks, clusters.q_size, clusters.packed)
    k_index = _cut(_order(k_hash, key_mask), key_mask, clusters.n_blocks, clusters.k_size, clusters.packed)
    return q_index, k_index


def _hashes(
    q: Tensor, k: Tensor, projections: Tensor, key_mask: Tensor | None, query_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """F(q) and G(k) on the directions, (B, H, R, N) and (B, H, R, S), without making F(q) and G(k)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, projections = q.to(dtype), k.to(dtype), projections.to(dtype)
    group = q.shape[1] // k.shape[1]
    q_square, q_most = _square_norms(q, query_mask)
    k_square, k_most = _square_norms(k, key_mask)
    if group > 1:
        k_square, k_most = k_square.repeat_interleave(group, 1), k_most.repeat_interleave(group, 1)
    radius = q_most + k_most  # [B, H, 1]
    directions, k_direction, q_direction = projections[:-2], projections[-2], projections[-1]
    q_part, k_part = _project(q, directions), _project(k, directions)
    if group > 1:
        k_part = k_part.repeat_interleave(group, 1)
    q_height = (radius - q_square).clamp_min_(0).sqrt_().unsqueeze(2)  # [B, H, 1, N]
    k_height = (radius - k_square).clamp_min_(0).sqrt_().unsqueeze(2)
    q_hash = torch.addcmul(q_part, q_height, q_direction.unsqueeze(-1))
    k_hash = torch.addcmul(k_part, k_height, k_direction.unsqueeze(-1))
    return q_hash, k_hash


def _square_norms(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """|x_i|^2 (B, H, N) and the largest over the rows that take part (B, H, 1)."""
    # vector_norm makes no copy of x, which x.square() would
    square = torch.linalg.vector_norm(x, dim=-1).square_()
    real = square if mask is None else square.masked_fill(~mask.unsqueeze(1), 0.0)
    return square, real.amax(-1, keepdim=True)


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """x (B, H, N, D) on directions (D, R): (B, H, R, N). Sorting wants N last, and the product is twice as fast so."""
    turned = x.transpose(1, 2)
    if not turned.is_contiguous():
        return directions.mT @ x.mT
    # heads split off a projection, as models have them: one product without a copy
    batch, n, heads, dim = turned.shape
    return (directions.mT @ turned.reshape(-1, dim).mT).view(-1, batch, n, heads).permute(1, 3, 0, 2)


def _order(hashes: Tensor, mask: Tensor | None) -> Tensor:
    """Rows sorted by hash, those that take no part last."""
    if mask is not None:
        hashes = hashes.masked_fill(~mask[:, None, None], math.inf)
    return stable_argsort(hashes)


def _cut(order: Tensor, mask: Tensor | None, n_blocks: int, size: int, packed: bool) -> Tensor:
    """Sorted rows (B, H, R, N) as blocks (B, H, R, nb, C), -1 where there is no row that takes part."""
    batch, heads, rounds, n = order.shape
    if mask is not None:
        count = mask.sum(-1)  # [B]
        rank = torch.arange(n, device=order.device)
        order = torch.where((rank < count.unsqueeze(-1))[:, None, None], order, order.new_full((), -1))
    if packed or (mask is None and n == n_blocks * size):
        if n < n_blocks * size:
            order = torch.nn.functional.pad(order, (0, n_blocks * size - n), value=-1)
        return order.view(batch, heads, rounds, n_blocks, size)
    block = torch.arange(n_blocks + 1, device=order.device)
    edge = block * n // n_blocks if mask is None else block * count.unsqueeze(-1) // n_blocks  # [nb + 1] or [B, nb + 1]
    rank = edge[..., :-1, None] + torch.arange(size, device=order.device)  # [.., nb, C]
    inside = rank < edge[..., 1:, None]
    rank = rank.clamp_max(n - 1).expand(batch, n_blocks, size).flatten(1)[:, None, None]
    blocks = order.gather(-1, rank.expand(batch, heads, rounds, -1)).unflatten(-1, (n_blocks, size))
    inside = inside.expand(batch, n_blocks, size)[:, None, None]
    return torch.where(inside, blocks, blocks.new_full((), -1))


def _op(
    q: Tensor, k: Tensor, v: Tensor, projections: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """rest: as :func:`_attend` takes it, but for impl."""
    if query_mask is None and q.shape[2] == k.shape[2]:
        query_mask = key_mask
    return _attend(q, k, v, projections, key_mask, query_mask, *rest, impl=None)


def _fake_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = q.shape
    return q.new_empty((batch, heads, n, v.shape[3])), q.new_empty((batch, heads, n), dtype=torch.float32)


_OP = define_op(
    "smyrf_attention(Tensor q, Tensor k, Tensor v, Tensor projections, Tensor? key_mask, Tensor? query_mask,"
    " int q_cluster_size, int? k_cluster_size, float scale) -> (Tensor out, Tensor lse)",
    _op,
    fake=_fake_op,
)
refuse_gradient(
    _OP, "fastattn::smyrf_attention is for exported graphs: inference only. Train with fastattn.smyrf_attention"
)
