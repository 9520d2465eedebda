"""Improved clustered attention (Vyas, Katharopoulos and Fleuret 2020, "Fast Transformers with Clustered Attention")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.methods.clustered import CLUSTERING, Clustering, cluster_means, find_clusters, prepare_clustering
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.block_attention import check_dropout
from fastattn.ops.centroid_attention import centroid_attention, topk_keys
from fastattn.ops.cluster_members import members
from fastattn.ops.library import define_op, refuse_gradient
from fastattn.ops.topk_attention import attend_lists


def improved_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_clusters: int = 100,
    topk: int = 32,
    n_bits: int = 63,
    n_iterations: int = 10,
    is_causal: bool = False,
    detach_mass: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    planes: Tensor | None = None,
    initial_centroids: Tensor | None = None,
    clusters: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> Tensor:
    """Clustered attention in which the keys that matter most to a cluster are weighted anew for each of its queries.

    Queries are clustered as for :func:`fastattn.clustered_attention`. The mean of a cluster weighs all keys, by a
    softmax A; on its ``topk`` largest keys T, whose weights are A's mass together, each query of the cluster spreads
    this mass by a softmax of its own, and on all others it takes A as it is (section 3.3):

        out_i = mass * sum_T softmax_T(scale q_i . k_s) v_s + sum_not_T A_s v_s

    Weights sum up to 1, are never further from dense attention's than those of clustered attention are, in the sum of
    absolute differences (theorem 2), and are exactly dense attention's with ``topk`` = S, whatever the clusters.

    Time is that of clustered attention and O(N * topk * (D + Dv)), extra memory O(N * (D + Dv) + C * S / 16).

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv) in q's dtype. H is a multiple of Hkv; fewer key heads give what keys
            and values repeated for each group of query heads would. S need not be N.
        n_clusters: C. Where fewer queries take part, only as many clusters are used.
        topk: keys of a cluster's list; where an example has fewer, all of them.
        n_bits: of a code, 1 to 63.
        n_iterations: assignments of Lloyd's algorithm, at least 1; between them the centroids are updated.
        is_causal: only the first sum, without the mass, and in it no key of a row after the query's own: softmax over
            those of the cluster's list that are left. A query that has none left gives 0. No value and no gradient of a
            later position enters; but the clusters and their lists are made of all queries and keys, so which earlier
            keys a query sees does depend on later ones.
        detach_mass: the mass is a constant for the gradient, as in the original implementation.
        key_mask: (B, S) bool, True for keys that take part.
        query_mask: (B, N) bool, True for queries that take part; the others give 0. None: ``key_mask`` if N == S, else
            all take part.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: the probability of a weight to be dropped; kept ones are divided by 1 - dropout_p. The weights of the
            two sums are dropped apart, a query's own and those that all of its cluster have; the mass is taken before.
        planes: (n_bits, D + 1), the hyperplanes: bit b is [q . planes[b, :D] > planes[b, D]].
        initial_centroids: which queries the clusters start from, (C,) or (B, H, C), int32 or int64, taken as given.
            None: drawn among the queries that take part, without repetition, the same for all heads.
        clusters: (B, H, N), int32 or int64: a given assignment, 0 to C - 1, or -1 for queries that give 0. Nothing is
            hashed then.
        generator: draws what is not given: planes; what clustering draws; and, where dropout_p > 0, two seeds.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        out (B, H, N, Dv) in q's dtype. A query that sees no key has 0.

    Neither the clustering nor the choice of lists is differentiated; the gradient of q comes through the means as well.
    Under autocast q, k and v are cast to its dtype. Exported graphs (``torch.export``) hold the whole method as one
    node, ``fastattn::improved_clustered_attention``, and what it draws as constants.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, impl)
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    checks.check_int("topk", topk, 1)
    checks.check_bool("is_causal", is_causal)
    checks.check_bool("detach_mass", detach_mass)
    check_dropout(dropout_p, 0, q.device)
    if is_causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"is_causal needs as many keys as queries, got {q.shape[2]} queries and {k.shape[2]} keys")
    given = prepare_clustering(
        q,
        n_clusters=n_clusters,
        n_bits=n_bits,
        n_iterations=n_iterations,
        planes=planes,
        initial_centroids=initial_centroids,
        clusters=clusters,
        generator=generator,
    )
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    seed, shared_seed = (common.draw_seed(generator, q.device) if dropout_p > 0 else None for _ in range(2))
    knobs = (n_clusters, n_bits, n_iterations, topk, is_causal, detach_mass, scale, float(dropout_p))
    attend = _OP if torch.compiler.is_exporting() else _attend
    return attend(q, k, v, *given, key_mask, query_mask, *knobs, seed, shared_seed, impl)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor | None,
    initial: Tensor | None,
    draw: Tensor | None,
    clusters: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    topk: int,
    is_causal: bool,
    detach_mass: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    shared_seed: Tensor | None,
    impl: str | None,
) -> Tensor:
    """seed, shared_seed: of what is dropped of a query's own weights and of those that its cluster shares."""
    given = (planes, initial, draw, clusters)
    clusters = find_clusters(q, *given, query_mask, n_clusters, n_bits, n_iterations, impl)
    with no_autocast(q.device.type):
        order, offsets = members(clusters, n_clusters)
        if is_causal:
            with torch.no_grad():
                means, _ = cluster_means(q, clusters, n_clusters, impl=impl)
                lists = topk_keys(means.to(q.dtype), k, topk, key_mask=key_mask, scale=scale, impl=impl)
            mass = rest = None
        else:
            means, _ = cluster_means(q, clusters, n_clusters, impl=impl)
            dropped = (dropout_p, 0 if shared_seed is None else shared_seed)
            lists, mass, rest = _of_clusters(means.to(q.dtype), k, v, key_mask, topk, scale, *dropped, impl)
            if detach_mass:
                mass = mass.detach()
        out, _ = attend_lists(
            q, k, v, order, offsets, lists, mass, rest,
            is_causal=is_causal, scale=scale, dropout_p=dropout_p, seed=0 if seed is None else seed, impl=impl,
        )  # fmt: skip
    return out


def _of_clusters(
    means: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    topk: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | int,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lists (B, H, C, K), mass (B, H, C), rest (B, H, C, Dv)): the keys that each mean weighs most, how much it weighs
    them together, and its weighted sum of the values of all others."""
    coarse, lse, lists = centroid_attention(
        means, k, v, key_mask=key_mask, top_k=topk, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl
    )
    # what the mean's own list has of this: each mean as a cluster for itself
    alone = torch.arange(means.shape[2] + 1, dtype=torch.int32, device=means.device)
    alone = alone.expand(*means.shape[:2], -1)
    fine, fine_lse = attend_lists(
        means, k, v, alone[..., :-1], alone, lists, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl
    )
    share = fine_lse - lse.masked_fill(fine_lse == -math.inf, 0.0)  # without keys 0, and not NaN
    mass = torch.exp(share)
    return lists, mass, coarse - mass.unsqueeze(-1) * fine


_OP = define_op(
    f"improved_clustered_attention(Tensor q, Tensor k, Tensor v, {CLUSTERING}, Tensor? key_mask, Tensor? query_mask,"
    " int n_clusters, int n_bits, int n_iterations, int topk, bool is_causal, bool detach_mass, float scale,"
    " float dropout_p, Tensor? seed, Tensor? shared_seed, str? impl) -> Tensor",
    _attend,
    fake=lambda q, k, v, *rest: q.new_empty((*q.shape[:3], v.shape[3])),
)
refuse_gradient(
    _OP,
    "fastattn::improved_clustered_attention is for exported graphs: inference only. "
    "Train with fastattn.improved_clustered_attention",
)


def as_node(
    q: Tensor, k: Tensor, v: Tensor, given: Clustering, key_mask: Tensor | None, scale: float,
    *, n_clusters: int, n_bits: int, n_iterations: int, topk: int, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The node of an exported graph, as :func:`fastattn.methods.clustered.as_node`."""
    clustering, attending = (n_clusters, n_bits, n_iterations), (topk, False, False, scale, 0.0, None, None)
    return _OP(q, k, v, *given, key_mask, key_mask, *clustering, *attending, impl)
