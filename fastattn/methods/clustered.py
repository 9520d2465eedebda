"""Clustered attention (Vyas, Katharopoulos and Fleuret 2020, "Fast Transformers with Clustered Attention")."""

from __future__ import annotations

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
    queries of all positions. Under autocast q, k and v are cast to its dtype.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, scale, impl)
    query_mask = common.check_masks(q, k, key_mask, query_mask)
    check_dropout(dropout_p, 0, q.device)
    clusters = assign_clusters(
        q,
        n_clusters=n_clusters,
        n_bits=n_bits,
        n_iterations=n_iterations,
        query_mask=query_mask,
        planes=planes,
        initial_centroids=initial_centroids,
        clusters=clusters,
        generator=generator,
        impl=impl,
    )
    means, _ = cluster_means(q, clusters, n_clusters, impl=impl)
    seed = common.draw_seed(generator, q.device) if dropout_p else 0
    out, _, _ = centroid_attention(
        means.to(q.dtype), k, v, key_mask=key_mask, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl
    )
    return cluster_broadcast(out, clusters, dtype=q.dtype, impl=impl)


def assign_clusters(
    q: Tensor,
    *,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    query_mask: Tensor | None,
    planes: Tensor | None,
    initial_centroids: Tensor | None,
    clusters: Tensor | None,
    generator: torch.Generator | None,
    impl: str | None = None,
) -> Tensor:
    """The cluster of each query of q (B, H, N, D): (B, H, N), int32, -1 for queries that take no part.

    Arguments as in :func:`clustered_attention`; q and query_mask are checked already, the others are checked here.
    Draws, in this order, what is not given: planes, then a seed.
    """
    checks.check_int("n_clusters", n_clusters, 1)
    check_n_bits(n_bits)
    checks.check_int("n_iterations", n_iterations, 1)
    if clusters is not None:
        clusters = _check_clusters(clusters, q, n_clusters)
        return clusters if query_mask is None else clusters.masked_fill(~query_mask.unsqueeze(1), -1)
    if planes is None:
        planes = common.draw_normal((n_bits, q.shape[-1] + 1), generator, q.device)
    else:
        checks.check_tensors(planes=planes)
        check_planes(planes, q)
        if planes.shape[0] != n_bits:
            raise ValueError(f"planes must have n_bits = {n_bits} rows, got shape {tuple(planes.shape)}")
    if initial_centroids is not None:
        check_initial("initial_centroids", initial_centroids, q[..., 0], n_clusters)
    seed = common.draw_seed(generator, q.device)
    return cluster_codes(
        encode(q, planes, impl),
        n_clusters,
        n_bits=n_bits,
        n_iterations=n_iterations,
        mask=query_mask,
        initial=initial_centroids,
        seed=seed,
        impl=impl,
    )


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
    not checked; clusters as :func:`assign_clusters` returns them.
    """
    sums, counts = cluster_sums(q, clusters, n_clusters, impl=impl)
    return sums / counts.clamp_min(1).unsqueeze(-1), counts
