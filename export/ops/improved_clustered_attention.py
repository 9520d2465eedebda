"""``fastattn::ImprovedClusteredAttention`` in standard ops: clustered attention in which each query weighs the largest
keys of its cluster itself. The definition is in :func:`fastattn.improved_clustered_attention`."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.centroid_attention import CentroidAttention, TopkKeys
from fastattn.export.ops.clustered_attention import (
    CLUSTERING,
    DRAWS,
    AssignClusters,
    ClusterMeans,
    draws_of,
    of_queries,
    refuse,
)
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import FLOAT, INT, ExportedOp, node
from fastattn.export.ops.topk_attention import TopkAttention
from fastattn.methods import improved_clustered as _defines_the_torch_op  # noqa: F401

BOOL, INT32 = TensorProto.BOOL, TensorProto.INT32
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def ImprovedAttendClusters(q, k, v, clusters, key_mask, n_clusters: int, topk: int, is_causal: int, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) T, clusters (B, H, N) int32, 0 to n_clusters - 1, or -1 for
    queries of none, key_mask (B, S) bool or (1, 1) for "all" -> out (B, H, N, Dv) T: improved clustered attention, or
    its causal form, with these clusters; 0 for queries of none."""
    zero = op.Constant(value_float=0.0)
    means = ClusterMeans(q, clusters, n_clusters=n_clusters)
    of_lists = op.Shape(means, start=0, end=3)
    ones = op.Expand(zero + 1.0, of_lists)
    nothing = op.Expand(zero, op.Concat(of_lists, op.Shape(v, start=3), axis=0))
    if op.Cast(op.Constant(value_int=is_causal), to=BOOL):
        lists = TopkKeys(means, k, key_mask, top_k=topk, scale=scale)
        mass = op.Identity(ones)
        rest = op.Identity(nothing)
    else:
        coarse, lse, lists = CentroidAttention(means, k, v, key_mask, top_k=topk, scale=scale)
        # what the mean's own list has of this: each mean as a cluster for itself
        number = op.Range(op.Constant(value_int=0), op.Constant(value_int=n_clusters), op.Constant(value_int=1))
        alone = op.Cast(op.Expand(number, of_lists), to=INT32)
        fine, fine_lse = TopkAttention(means, k, v, alone, lists, ones, nothing, is_causal=0, scale=scale)
        mass = op.Exp(fine_lse - op.Where(op.IsInf(fine_lse), zero, lse))  # without keys 0, and not NaN
        rest = coarse - op.Unsqueeze(mass, [3]) * op.Cast(fine, to=TensorProto.FLOAT)
    out, _lse = TopkAttention(q, k, v, clusters, lists, mass, rest, is_causal=is_causal, scale=scale)
    return out


@script(DOMAIN, default_opset=op)
def ImprovedClusteredAttention(
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
    topk: int,
    is_causal: int,
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
    return ImprovedAttendClusters(
        q, k, v, clusters, key_mask, n_clusters=n_clusters, topk=topk, is_causal=is_causal, scale=scale
    )


_ATTENDING = {"topk": INT, "is_causal": INT, "scale": FLOAT}
_NODE = node(
    "ImprovedClusteredAttention", f"q k v {DRAWS} key_mask:bool query_mask:bool", "out", {**CLUSTERING, **_ATTENDING}
)
_OF_GIVEN_CLUSTERS = node(
    "ImprovedAttendClusters", "q k v clusters:int32 key_mask:bool", "out", {"n_clusters": INT, **_ATTENDING}
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
    topk: int,
    is_causal: bool,
    detach_mass: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Any = None,
    shared_seed: Any = None,
    impl: str | None = None,
) -> Any:
    refuse("improved_clustered_attention", q, k, key_mask, query_mask, dropout_p)
    attending = {"topk": topk, "is_causal": int(is_causal), "scale": scale}
    if clusters is not None:
        clusters = of_queries(clusters, query_mask)
        return _OF_GIVEN_CLUSTERS(q, k, v, clusters, or_all(key_mask), n_clusters=n_clusters, **attending)
    draws, drawn = draws_of(planes, initial, draw)
    masks = (or_all(key_mask), or_all(query_mask))
    knobs = {"n_clusters": n_clusters, "n_bits": n_bits, "n_iterations": n_iterations, "draws_initial": drawn}
    return _NODE(q, k, v, *draws, *masks, **knobs, **attending)


OP = ExportedOp(
    functions=(ImprovedClusteredAttention, ImprovedAttendClusters),
    translations={torch.ops.fastattn.improved_clustered_attention.default: _translate},
)
