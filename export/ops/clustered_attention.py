"""``fastattn::ClusteredAttention`` in standard ops: cluster the queries, attend by the clusters' means. The definition
is in :func:`fastattn.clustered_attention`; its parts are functions, each of which a library may replace."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.centroid_attention import CentroidAttention
from fastattn.export.ops.cluster_attention import ClusterBroadcast, ClusterSums
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.hamming_kmeans import FirstRows, HammingKmeans
from fastattn.export.ops.hash_bits import HashBits
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import FLOAT, INT, ExportedOp, NotExportable, as_fp32, node
from fastattn.methods import clustered as _defines_the_torch_op  # noqa: F401

BOOL, INT32 = TensorProto.BOOL, TensorProto.INT32
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def AssignClusters(q, planes, initial, seed, mask, n_clusters: int, n_bits: int, n_iterations: int, draws_initial: int):
    """q (B, H, N, D) T, planes (n_bits, D + 1) fp32, initial (B, H, C) or (1, 1, C) int32, seed () int64 from 0, mask
    (B, N) or (1, 1) bool -> clusters (B, H, N) int32, -1 for queries that the mask does not have.

    draws_initial=1: the first centroids are drawn by the seed, and ``initial`` is not looked at; 0: they are the codes
    of the rows ``initial``, where one that there is not is a cluster that is never used (see HammingKmeans)."""
    codes = HashBits(q, planes)
    if op.Cast(op.Constant(value_int=draws_initial), to=BOOL):
        first = FirstRows(codes, mask, seed, n_clusters=n_clusters)
    else:
        wanted = op.Reshape(op.Constant(value_int=n_clusters), [1])
        first = op.Expand(initial, op.Concat(op.Shape(q, start=0, end=2), wanted, axis=0))
    return HammingKmeans(codes, first, mask, seed, n_bits=n_bits, n_iterations=n_iterations)


@script(DOMAIN, default_opset=op)
def ClusterMeans(x, clusters, n_clusters: int):
    """x (B, H, N, F) T, clusters (B, H, N) int32 -> (B, H, n_clusters, F) T: the mean of each cluster's rows, made in
    fp32; 0 for an empty one."""
    sums, counts = ClusterSums(x, clusters, n_clusters=n_clusters)
    counts = op.Max(op.Cast(counts, to=TensorProto.FLOAT), op.Constant(value_float=1.0))
    return op.CastLike(sums / op.Unsqueeze(counts, [3]), x)


@script(DOMAIN, default_opset=op)
def AttendClusters(q, k, v, clusters, key_mask, n_clusters: int, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) T, clusters (B, H, N) int32, 0 to n_clusters - 1, or -1 for
    queries of none, key_mask (B, S) bool or (1, 1) for "all" -> out (B, H, N, Dv) T: for each query the attention of
    its cluster's mean to all keys; 0 for queries of none."""
    means = ClusterMeans(q, clusters, n_clusters=n_clusters)
    out, _lse, _index = CentroidAttention(means, k, v, key_mask, top_k=0, scale=scale)
    return ClusterBroadcast(op.CastLike(out, q), clusters)


@script(DOMAIN, default_opset=op)
def ClusteredAttention(
    q,
    k,
    v,
    planes,
    initial,
    seed,
    key_mask,
    query_mask,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    draws_initial: int,
    scale: float,
):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) T, planes, initial and seed as for AssignClusters, key_mask
    (B, S) and query_mask (B, N) bool, each (1, 1) for "all" -> out (B, H, N, Dv) T."""
    clusters = AssignClusters(
        q,
        planes,
        initial,
        seed,
        query_mask,
        n_clusters=n_clusters,
        n_bits=n_bits,
        n_iterations=n_iterations,
        draws_initial=draws_initial,
    )
    return AttendClusters(q, k, v, clusters, key_mask, n_clusters=n_clusters, scale=scale)


CLUSTERING = {"n_clusters": INT, "n_bits": INT, "n_iterations": INT, "draws_initial": INT}
DRAWS = "planes:float initial:int32 seed:int64"
_NODE = node(
    "ClusteredAttention", f"q k v {DRAWS} key_mask:bool query_mask:bool", "out", {**CLUSTERING, "scale": FLOAT}
)
_OF_GIVEN_CLUSTERS = node(
    "AttendClusters", "q k v clusters:int32 key_mask:bool", "out", {"n_clusters": INT, "scale": FLOAT}
)


def _translate(
    q: Any,
    k: Any,
    v: Any,
    planes: Any,
    initial: Any,
    draw: Any,
    clusters: Any,
    key_mask: Any,
    query_mask: Any,
    n_clusters: int,
    n_bits: int,
    n_iterations: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Any = None,
    impl: str | None = None,
) -> Any:
    refuse("clustered_attention", q, k, key_mask, query_mask, dropout_p)
    if clusters is not None:
        clusters = of_queries(clusters, query_mask)
        return _OF_GIVEN_CLUSTERS(q, k, v, clusters, or_all(key_mask), n_clusters=n_clusters, scale=scale)
    draws, drawn = draws_of(planes, initial, draw)
    masks = (or_all(key_mask), or_all(query_mask))
    knobs = {"n_clusters": n_clusters, "n_bits": n_bits, "n_iterations": n_iterations, "draws_initial": drawn}
    return _NODE(q, k, v, *draws, *masks, **knobs, scale=scale)


def refuse(name: str, q: Any, k: Any, key_mask: Any, query_mask: Any, dropout_p: float) -> None:
    """Raises NotExportable for what no node of a clustered method stands for."""
    if dropout_p:
        raise NotExportable(f"{name} can't be exported to ONNX with dropout_p={dropout_p}: a file is for inference")
    sizes = (q.shape[2], k.shape[2])
    if key_mask is not None and query_mask is None and not all(isinstance(size, int) for size in sizes):
        raise NotExportable(
            f"can't tell at export whether {sizes[0]} queries and {sizes[1]} keys are always different tokens: give a "
            "query_mask"
        )


def of_queries(clusters: Any, query_mask: Any) -> Any:
    """Given clusters as our nodes take them: -1 for queries that the mask does not have."""
    clusters = op.Cast(clusters, to=INT32)
    if query_mask is None:
        return clusters
    none = op.Cast(op.Constant(value_int=-1), to=INT32)
    return op.Where(op.Unsqueeze(query_mask, op.Constant(value_ints=[1])), clusters, none)


def draws_of(planes: Any, initial: Any, draw: Any) -> tuple[tuple[Any, Any, Any], int]:
    """(planes, initial, seed) as our nodes take them, and whether the first centroids are to be drawn."""
    planes = as_fp32(planes)
    if initial is None:
        none = op.Cast(op.Constant(value_ints=[-1]), to=INT32)
        return (planes, op.Unsqueeze(none, op.Constant(value_ints=[0, 1])), draw), 1
    is_shared = len(initial.shape) == 1  # by all heads
    initial = op.Cast(initial, to=INT32)
    return (planes, op.Unsqueeze(initial, op.Constant(value_ints=[0, 1])) if is_shared else initial, draw), 0


OP = ExportedOp(
    functions=(ClusteredAttention, AssignClusters, AttendClusters, ClusterMeans),
    translations={torch.ops.fastattn.clustered_attention.default: _translate},
)
