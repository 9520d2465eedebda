"""SMYRF attention (Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering")."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn.methods import common, smyrf_routing
from fastattn.methods.local import local_blocks
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.block_attention import attend_blocks, check_dropout
from fastattn.ops.library import define_op, refuse_gradient

DIRECTIONS = ("random", "principal")


@overload
def smyrf_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_hashes: int = ..., q_cluster_size: int = ...,
    k_cluster_size: int | None = ..., key_mask: Tensor | None = ..., query_mask: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., dropout_p: float = ..., correct_duplicates: bool = ...,
    local_window: int = ..., directions: str = ..., projections: Tensor | None = ...,
    seed: int | Tensor | None = ..., generator: torch.Generator | None = ...,
    return_lse: Literal[False] = ..., impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def smyrf_attention(
    q: Tensor, k: Tensor, v: Tensor, *, n_hashes: int = ..., q_cluster_size: int = ...,
    k_cluster_size: int | None = ..., key_mask: Tensor | None = ..., query_mask: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., dropout_p: float = ..., correct_duplicates: bool = ...,
    local_window: int = ..., directions: str = ..., projections: Tensor | None = ...,
    seed: int | Tensor | None = ..., generator: torch.Generator | None = ...,
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
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    correct_duplicates: bool = False,
    local_window: int = 0,
    directions: str = "random",
    projections: Tensor | None = None,
    seed: int | Tensor | None = None,
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

    ``correct_duplicates``, ``local_window`` and ``directions="principal"`` are ours, not the paper's: each lowers the
    error at nearly the same work. With duplicates corrected the error falls to zero as rounds grow.

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
        is_causal: a query attends to keys of its own and earlier positions only, and to its own exactly once whatever
            the clusters are. Needs N == S. No value and no gradient of a later position enters a row, but the clusters
            are made of all positions: *which* earlier keys a row meets depends on later tokens, so a prefix does not
            give the first rows of the whole. Clusters are quantiles of all positions, so early rows meet few keys.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: probability, below 1, that a key is dropped after the softmax; the others are scaled by
            1 / (1 - dropout_p). A key met in several rounds is dropped or not in each of them.
        correct_duplicates: a key met in several rounds counts once.
        local_window: w > 0 adds a round whose clusters are w consecutive positions, the same for queries and keys; the
            last one may be shorter. Needs N == S. Positions are counted over the rows that take part (as query or as
            key), so that padding, left, right or between, changes nothing.
        directions: "random", as in the paper, or "principal": for each batch element and head, the ``n_hashes`` (at
            most D + 1) directions along which F(q) varies most. They take no draw.
        projections: (D + 2, n_hashes), the random directions, in the order [D rows for q or k; that of k's norm; that
            of q's norm]. Used in fp32 (fp64 for fp64 inputs).
        seed: of dropout, from 0 to 2^63 - 1, or such a number in an int64 tensor without dimensions. None draws one.
        generator: draws what is needed and not given: the directions, standard normal, then the seed.
        return_lse: also return the logarithm of the softmax's denominator, without dropout, (B, H, N), in fp32 (fp64
            for fp64); it carries no gradient.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, lse). A row that meets no key has out 0 and lse -inf.

    Where queries and keys take part alike (N == S, one mask, one cluster size), clusters are filled one after the
    other, so padding changes nothing. Otherwise the rows that take part are cut at the same quantiles on both sides, so
    that every cluster has keys if at least as many take part as there are clusters.

    Routing is not differentiated. Under autocast q, k and v are cast to its dtype. Exported graphs
    (``torch.export``) hold the whole method as one node, ``fastattn::smyrf_attention``, but for dropout.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, impl)
    checks.check_int("n_hashes", n_hashes, 1)
    checks.check_int("q_cluster_size", q_cluster_size, 1)
    if k_cluster_size is not None:
        checks.check_int("k_cluster_size", k_cluster_size, 1)
    _check_positions(q, k, is_causal, local_window)
    checks.check_bool("correct_duplicates", correct_duplicates)
    checks.check_bool("return_lse", return_lse)
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    projections = _projections(q, n_hashes, directions, projections, generator)
    check_dropout(dropout_p, 0 if seed is None else seed, q.device)
    if dropout_p > 0 and seed is None:
        seed = common.draw_seed(generator, q.device)
    knobs = (q_cluster_size, k_cluster_size, scale, n_hashes, is_causal, correct_duplicates, local_window)
    if torch.compiler.is_exporting() and impl is None and dropout_p == 0:
        args = (q, k, v, projections, key_mask, None if query_mask is key_mask else query_mask)
        out, lse = _OP(*args, *knobs)
    else:
        dropout = {"dropout_p": dropout_p, "seed": 0 if seed is None else seed}
        out, lse = _attend(q, k, v, projections, key_mask, query_mask, *knobs, impl=impl, **dropout)
    return (out, lse) if return_lse else out


def _check_positions(q: Tensor, k: Tensor, is_causal: Any, local_window: Any) -> None:
    checks.check_bool("is_causal", is_causal)
    checks.check_int("local_window", local_window, 0)
    n, s = q.shape[2], k.shape[2]
    if is_causal and n != s:
        raise ValueError(f"is_causal needs as many keys as queries, got {n} queries and {s} keys")
    if local_window and n != s:
        raise ValueError(f"local_window needs as many keys as queries, got {n} queries and {s} keys")


def _projections(q: Tensor, n_hashes: int, directions: Any, projections: Any, generator: Any) -> Tensor | None:
    """The random directions (D + 2, n_hashes), given or drawn; None for principal ones."""
    checks.check_choice("directions", directions, DIRECTIONS)
    if directions == "principal":
        if projections is not None:
            raise ValueError("projections are random directions: they must be None with directions='principal'")
        if n_hashes > q.shape[-1] + 1:
            raise ValueError(
                f"n_hashes must be at most head_dim + 1 = {q.shape[-1] + 1} with directions='principal', got {n_hashes}"
            )
        return None
    n_coordinates = q.shape[-1] + 2
    if projections is None:
        return common.draw_normal((n_coordinates, n_hashes), generator, q.device)
    common.check_draw("projections", projections, (n_coordinates, n_hashes), "(head_dim + 2, n_hashes)", q.device)
    return projections


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    q_cluster_size: int,
    k_cluster_size: int | None,
    scale: float,
    n_hashes: int,
    is_causal: bool = False,
    correct_duplicates: bool = False,
    local_window: int = 0,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """how: dropout_p, seed and impl of block attention."""
    is_self_like = q.shape[2] == k.shape[2] and query_mask is key_mask
    clusters = smyrf_routing.plan(q.shape[2], k.shape[2], q_cluster_size, k_cluster_size, is_self_like)
    with no_autocast(q.device.type):
        rows = smyrf_routing.route(q, k, projections, n_hashes, key_mask, query_mask, clusters, how.get("impl"))
    if local_window > 0:
        how["local_index"] = local_blocks(local_window, q, query_mask, key_mask)
    if is_causal:
        # the indices hold the key mask; only a row's own key, met without them, asks for it
        how |= {"is_causal": True, "self_mode": "once", "key_mask": key_mask}
    return attend_blocks(q, k, v, *rows, scale=scale, correct_duplicates=correct_duplicates, **how)


def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    *knobs: Any,
) -> tuple[Tensor, Tensor]:
    if query_mask is None and q.shape[2] == k.shape[2]:
        query_mask = key_mask
    return _attend(q, k, v, projections, key_mask, query_mask, *knobs)


def _fake_op(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = q.shape
    return q.new_empty((batch, heads, n, v.shape[3])), q.new_empty((batch, heads, n), dtype=torch.float32)


# projections: None for principal directions
_OP = define_op(
    "smyrf_attention(Tensor q, Tensor k, Tensor v, Tensor? projections, Tensor? key_mask, Tensor? query_mask,"
    " int q_cluster_size, int? k_cluster_size, float scale, int n_hashes, bool is_causal=False,"
    " bool correct_duplicates=False, int local_window=0) -> (Tensor out, Tensor lse)",
    _op,
    fake=_fake_op,
)
refuse_gradient(
    _OP, "fastattn::smyrf_attention is for exported graphs: inference only. Train with fastattn.smyrf_attention"
)
