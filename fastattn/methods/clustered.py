"""Clustered attention (Vyas, Katharopoulos and Fleuret 2020, "Fast Transformers with Clustered Attention")."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.rows import check_rows
from fastattn.methods import common
from fastattn.ops import checks
from fastattn.ops.block_attention import check_dropout
from fastattn.ops.centroid_attention import centroid_attention
from fastattn.ops.cluster_attention import cluster_broadcast, cluster_sums
from fastattn.ops.hamming_kmeans import check_initial, check_n_bits, cluster_codes
from fastattn.ops.hash_bits import check_planes, encode
from fastattn.ops.library import define_op, refuse_gradient


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    n_clusters: int = 100,
    n_bits: int = 63,
    n_iterations: int = 10,
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
    """Attention of cluster means: queries are clustered, and all queries of a cluster get the attention of their mean.

    Each head's queries are hashed to ``n_bits`` signs of random projections, clustered by Lloyd's algorithm on these
    codes, and averaged; the C means attend to all keys, and each query gets its mean's result (section 3.2). Two
    queries at a distance of e get results whose attention would differ by at most scale * e * |K| (theorem 1, the
    spectral norm of the keys): so a query's error is bounded by its distance from its mean, and with as many clusters
    as there are distinct queries there is none.

    Time is O(N * (n_bits * D + n_iterations * C) + C * S * (D + Dv)), extra memory O((N + C * S / 2048) * (D + Dv)).

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides.
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv) in q's dtype. H is a multiple of Hkv; fewer key heads give what keys
            and values repeated for each group of query heads would. S need not be N.
        n_clusters: C. Where fewer queries take part, only as many clusters are used.
        n_bits: of a code, 1 to 63.
        n_iterations: assignments of Lloyd's algorithm, at least 1; between them the centroids are updated.
        key_mask: (B, S) bool, True for keys that take part.
        query_mask: (B, N) bool, True for queries that take part; the others give 0. None: ``key_mask`` if N == S, else
            all take part.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: which part of the means' attention probabilities is dropped, the others being scaled by
            1 / (1 - dropout_p): queries of one cluster lose the same keys.
        planes: (n_bits, D + 1), the hyperplanes: bit b is [q . planes[b, :D] > planes[b, D]].
        initial_centroids: which queries the clusters start from, (C,) or (B, H, C), int32 or int64, taken as given.
            None: drawn among the queries that take part, without repetition, the same for all heads.
        clusters: (B, H, N), int32 or int64: a given assignment, 0 to C - 1, or -1 for queries that give 0. Nothing is
            hashed then.
        generator: draws what is not given: planes, standard normal; first centroids; the bits of centroids that have
            lost all their members; what dropout drops.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.

    Returns:
        out (B, H, N, Dv) in q's dtype. A query that sees no key has 0.

    The gradient of q comes through the means; the clustering is not differentiated. There is no causal form: means mix
    queries of all positions. Under autocast q, k and v are cast to its dtype. Exported graphs (``torch.export``) hold
    the whole method as one node, ``fastattn::clustered_attention``, and what it draws as constants.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, impl)
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    check_dropout(dropout_p, 0, q.device)
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
    seed = common.draw_seed(generator, q.device) if dropout_p else None
    attend = _OP if torch.compiler.is_exporting() else _attend
    knobs = (n_clusters, n_bits, n_iterations, scale, float(dropout_p), seed, impl)
    return attend(q, k, v, *given, key_mask, query_mask, *knobs)


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
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    impl: str | None,
) -> Tensor:
    given = (planes, initial, draw, clusters)
    clusters = find_clusters(q, *given, query_mask, n_clusters, n_bits, n_iterations, impl)
    means, _ = cluster_means(q, clusters, n_clusters, impl=impl)
    dropout: dict[str, Any] = {"dropout_p": dropout_p, "seed": 0 if seed is None else seed}
    out, _, _ = centroid_attention(means.to(q.dtype), k, v, key_mask=key_mask, scale=scale, impl=impl, **dropout)
    return cluster_broadcast(out, clusters, dtype=q.dtype, impl=impl)


class Clustering(NamedTuple):
    """What queries are clustered by: hyperplanes, first centroids (None: to be drawn by the seed) and a seed; or the
    clusters themselves, and nothing else."""

    planes: Tensor | None
    initial: Tensor | None
    seed: Tensor | None
    clusters: Tensor | None


def prepare_clustering(
    q: Tensor,
    *,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    planes: Tensor | None,
    initial_centroids: Tensor | None,
    clusters: Tensor | None,
    generator: torch.Generator | None,
) -> Clustering:
    """Checks these arguments of :func:`clustered_attention`, but q, and draws what is missing: planes, then a seed."""
    checks.check_int("n_clusters", n_clusters, 1)
    check_n_bits(n_bits)
    checks.check_int("n_iterations", n_iterations, 1)
    if clusters is not None:
        return Clustering(None, None, None, _check_clusters(clusters, q, n_clusters))
    if planes is None:
        planes = common.draw_normal((n_bits, q.shape[-1] + 1), generator, q.device)
    else:
        checks.check_tensors(planes=planes)
        check_planes(planes, q)
        if planes.shape[0] != n_bits:
            raise ValueError(f"planes must have n_bits = {n_bits} rows, got shape {tuple(planes.shape)}")
    if initial_centroids is not None:
        check_initial("initial_centroids", initial_centroids, q[..., 0], n_clusters)
    return Clustering(planes, initial_centroids, common.draw_seed(generator, q.device), None)


def find_clusters(
    q: Tensor,
    planes: Tensor | None,
    initial: Tensor | None,
    seed: Tensor | None,
    clusters: Tensor | None,
    query_mask: Tensor | None,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    impl: str | None = None,
) -> Tensor:
    """The cluster of each query of q (B, H, N, D), by a :class:`Clustering`: (B, H, N), int32, -1 for queries that take
    no part."""
    if clusters is not None:
        return clusters if query_mask is None else clusters.masked_fill(~query_mask.unsqueeze(1), -1)
    assert planes is not None and seed is not None
    return cluster_codes(
        encode(q, planes, impl),
        n_clusters,
        n_bits=n_bits,
        n_iterations=n_iterations,
        mask=query_mask,
        initial=initial,
        seed=seed,
        impl=impl,
    )


def assign_clusters(q: Tensor, query_mask: Tensor | None = None, impl: str | None = None, **knobs: Any) -> Tensor:
    """The cluster of each query of q (B, H, N, D): (B, H, N), int32, -1 for queries that take no part.

    knobs: all that :func:`prepare_clustering` takes. q and query_mask are checked already.
    """
    sizes = (knobs["n_clusters"], knobs["n_bits"], knobs["n_iterations"])
    return find_clusters(q, *prepare_clustering(q, **knobs), query_mask, *sizes, impl)


def _check_clusters(clusters: Tensor, q: Tensor, n_clusters: int) -> Tensor:
    checks.check_tensors(clusters=clusters)
    if clusters.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"clusters must be torch.int32 or torch.int64, got {clusters.dtype}")
    if clusters.shape != q.shape[:3]:
        raise ValueError(
            f"clusters must have shape (batch, heads, length) = {tuple(q.shape[:3])}, got {tuple(clusters.shape)}"
        )
    checks.check_device("clusters", clusters, q.device)
    check_rows("clusters", clusters, n_clusters, "numbers")
    return clusters.to(torch.int32)


def cluster_means(q: Tensor, clusters: Tensor, n_clusters: int, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """Means (B, H, C, D), in fp32 (fp64 for fp64), and counts (B, H, C), int32, of the queries of each cluster.

    An empty cluster has mean 0. Differentiable: each member gets its mean's gradient over their count. Arguments are
    not checked; clusters as :func:`find_clusters` returns them.
    """
    sums, counts = cluster_sums(q, clusters, n_clusters, impl=impl)
    return sums / counts.clamp_min(1).unsqueeze(-1), counts


# what is None: planes, initial and seed where clusters are given, else these; the seed, without dropout
CLUSTERING = "Tensor? planes, Tensor? initial, Tensor? draw, Tensor? clusters"
_OP = define_op(
    f"clustered_attention(Tensor q, Tensor k, Tensor v, {CLUSTERING}, Tensor? key_mask, Tensor? query_mask,"
    " int n_clusters, int n_bits, int n_iterations, float scale, float dropout_p, Tensor? seed, str? impl) -> Tensor",
    _attend,
    fake=lambda q, k, v, *rest: q.new_empty((*q.shape[:3], v.shape[3])),
)
refuse_gradient(
    _OP, "fastattn::clustered_attention is for exported graphs: inference only. Train with fastattn.clustered_attention"
)


def as_node(
    q: Tensor, k: Tensor, v: Tensor, given: Clustering, key_mask: Tensor | None, scale: float,
    *, n_clusters: int, n_bits: int, n_iterations: int, impl: str | None = None,
) -> Tensor:  # fmt: skip
    """The node of an exported graph, for self-attention whose arguments are checked, with a clustering that is not."""
    return _OP(q, k, v, *given, key_mask, key_mask, n_clusters, n_bits, n_iterations, scale, 0.0, None, impl)
