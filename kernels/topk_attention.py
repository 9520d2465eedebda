"""Attention to the key list of a query's cluster, and its gradient: the fine part of improved clustered attention.

Queries are sorted by cluster, so that a program has a tile of queries of one cluster, and loads the cluster's keys once
for all of them. Which cluster that is, it finds in the clusters' offsets: the host knows no cluster's size, and starts
as many programs as any sizes can need. A key may stand in many lists, so the gradients of keys are summed in two steps:
one sum for each part of a cluster and place in its list, then one over all of those that hold the same key, sorted. So
each row has one writer: no atomics, and the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .config import READS_SHARED, SCORE_OPS, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .topk_attention_triton import backward_dkv_kernel, backward_dq_kernel, forward_kernel, sum_kernel

LOG2_E = math.log2(math.e)

_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
TUNING: dict[str, TuningSpace] = {
    "topk_attention_forward": _SPACE,
    "topk_attention_backward_dq": _SPACE,
    "topk_attention_backward_dkv": _SPACE,
    "topk_attention_sum": TuningSpace(blocks={"BLOCK_M": (8, 16, 32, 64)}, num_warps=(1, 4)),
}
KERNELS = {
    "topk_attention_forward": forward_kernel,
    "topk_attention_backward_dq": backward_dq_kernel,
    "topk_attention_backward_dkv": backward_dkv_kernel,
    "topk_attention_sum": sum_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, n_queries: int, n_clusters: int, top_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one call of ``kernel`` (a key of :data:`TUNING`). Clusters have any size: the last tile of one is half
    full in the mean."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows, dims = batch * heads, head_dim + value_dim
    if kernel == "topk_attention_sum":
        return _sum_cost(rows, n_queries, n_clusters, top_k, head_dim, element_size, config)
    pairs, members = rows * n_queries * top_k, n_queries / n_clusters
    # bytes of a query and of a list with its keys
    of_q, of_list = head_dim * element_size + 8, top_k * (dims * element_size + 4) + 4 * value_dim + 4
    part_size, parts = parts_of(n_queries, n_clusters, top_k)[1], 0
    if kernel == "topk_attention_forward":
        of_q += value_dim * element_size
        flops = 2 * pairs * dims
    elif kernel == "topk_attention_backward_dq":
        of_q += dims * element_size + 8
        flops = 2 * pairs * (2 * head_dim + value_dim)
    else:
        of_q += value_dim * element_size + 8
        flops = 4 * pairs * dims
        parts = rows * n_clusters * _tiles(members, part_size)
    written = parts * (top_k * (dims * 4 + 4) + 4 * value_dim + 8)
    lists = rows * n_clusters * of_list
    work = Cost(flops, rows * n_queries * of_q + lists + written, pairs)
    if config is None:
        return work
    m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    d, dv = padded(head_dim), padded(value_dim)
    m_tiles, n_tiles = _tiles(members, m), cdiv(top_k, n)
    again_q, again_k = 1, m_tiles
    score, weights = (m, n, d), (m, n, dv)
    if kernel == "topk_attention_forward":
        shapes, pointwise, passes = (score, (m, dv, n)), SCORE_OPS * m * n + m * dv, 1
    elif kernel == "topk_attention_backward_dq":
        # where a list is several tiles, these pass twice: a query's delta has to be known before
        passes = 1 if n_tiles == 1 else 2
        shapes, pointwise = (*(score, weights) * passes, (m, d, n)), SCORE_OPS * m * n * passes
        again_k *= passes
    else:
        shapes, pointwise, passes = (score, weights, (n, d, m), (n, dv, m)), SCORE_OPS * m * n, 1
        again_q, again_k = n_tiles, _tiles(members, part_size)
    steps = rows * n_clusters * m_tiles * n_tiles
    return replace(
        work, **products(steps, *shapes), tile_exps=steps * m * n * passes, pointwise=steps * pointwise,
        held=4 * m * n * (1 if kernel.endswith("forward") else 2),  # the scores, and their gradients
        steps=steps * passes, loaded=rows * n_queries * of_q * again_q + lists * again_k + written,
    )  # fmt: skip


def _tiles(members: float, size: int) -> float:
    """Tiles of a cluster, in the mean of clusters of all sizes."""
    return max(1.0, members / size + 0.5)


def _sum_cost(
    rows: int, n_rows: int, n_clusters: int, top_k: int, dim: int, element_size: int, config: Config | None
) -> Cost:
    """Of the sum that makes dk or dv of ``n_rows`` keys, where lists name any keys."""
    part_size = parts_of(n_rows, n_clusters, top_k)[1]
    entries = n_clusters * _tiles(n_rows / n_clusters, part_size) * top_k
    moved = rows * (entries * (4 * dim + 4) + n_rows * (dim * element_size + 4))
    work = Cost(rows * entries * dim, moved, 0, rate="float32")
    if config is None:
        return work
    m = config.blocks["BLOCK_M"]
    steps = rows * cdiv(n_rows, m) * _most_of(m, entries / n_rows)
    size = m * padded(dim)
    return replace(work, tile_flops=steps * size, pointwise=steps * size, steps=steps, held=4 * size, loaded=moved)


def _most_of(rows: int, mean: float) -> float:
    """The entries of that one of ``rows`` rows that has most, in the mean, where each has ``mean`` by chance."""
    if mean > 100:  # nearly normal
        return mean + math.sqrt(2 * mean * math.log(rows))
    most, entries, probability, at_most = 0.0, 0, math.exp(-mean), math.exp(-mean)
    while at_most < 1 - 1e-9 and entries < mean + 100:
        most += 1 - at_most**rows
        entries += 1
        probability *= mean / entries
        at_most += probability
    return max(most, mean)


def heuristic(
    kernel: str, device_type: str, top_k: int, head_dim: int, element_size: int = 4, members: int = 64
) -> Config:
    """The configuration where nothing was tuned: the whole list as one tile, up to what registers (or the cache) hold.

    device_type: as in block attention's. members: queries of a cluster, in the mean. On a GPU these are the largest
    tiles whose binaries spill nothing, on sm_80 to sm_120 and gfx942; fp32 with head dims above 128 spills on NVIDIA
    whatever the tiles are.
    """
    if kernel == "topk_attention_sum":
        return Config({"BLOCK_M": 16}, num_warps=4, num_stages=1)
    warps, stages = 4, 2
    if device_type == "cpu":
        # in what keys' gradients take of queries, 64 at a time took 1.2 times as long as 16
        most = (16 if kernel.endswith("dkv") else 64, 128 if head_dim <= 64 else 64)
    elif device_type.startswith("hip"):
        most, stages = ((64, 64) if element_size * head_dim <= 128 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((16, 32) if kernel.endswith("dkv") else (32, 32)) if head_dim <= 64 else (16, 16)
        stages = 2 if head_dim <= 64 else 1
    elif kernel.endswith("dkv") and head_dim <= 64:
        most, warps = ((64, 64), 8) if device_type in READS_SHARED else ((32, 32), 4)
    elif head_dim <= 128:
        most = (64, 32 if kernel.endswith("dkv") else 64)
        warps = 8 if head_dim > 64 or (top_k > 32 and device_type not in READS_SHARED) else 4
    else:
        most, warps, stages = (32, 32), 8 if kernel.endswith("dkv") else 4, 1
    m, n = (min(limit, max(16, next_power_of_2(size))) for limit, size in zip(most, (members, top_k), strict=True))
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def parts_of(n_queries: int, n_clusters: int, top_k: int) -> tuple[int, int]:
    """(the most parts that clusters can have, queries of a part): what one program of the gradient of keys sums over.

    So long that all parts' gradients of their lists take no more than the queries themselves.
    """
    size = max(256, next_power_of_2(4 * top_k))
    return min(n_queries, n_queries // size + n_clusters), size


def launch_of(
    kernel: str,
    tensors: Mapping[str, torch.Tensor],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    config: Config | None,
) -> Launch:
    """The launch of ``kernel``, other than that of the sum, on ``tensors``, named as the kernel's pointer arguments
    without ``_ptr``; there may be more than it takes."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    n_clusters, top_k = tensors["topk_index"].shape[2:]
    members = cdiv(n_queries, n_clusters)
    chosen = config or heuristic(kernel, device_kind(q.device), top_k, head_dim, q.element_size(), members)
    block_m, block_n = chosen.blocks["BLOCK_M"], chosen.blocks["BLOCK_N"]
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries}
    args |= {"n_clusters": n_clusters, "top_k": top_k, "scale": scale, "scale_log2": scale * LOG2_E}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim)), "BLOCK_C": next_power_of_2(n_clusters + 1)}
    args |= {"drop_below": round(dropout_p * 2**24), "keep_scale": 1 / (1 - dropout_p), "HAS_DROPOUT": dropout_p > 0}
    args |= {"IS_CAUSAL": is_causal, "IS_ONE_TILE": top_k <= block_n, "PRECISION": dot_precision(q.dtype)}
    # full tiles, and one that is not for each cluster and for the queries of none
    args["n_tiles"] = min(n_queries, n_queries // block_m + n_clusters + 1)
    args["n_parts"], args["part_size"] = parts_of(n_queries, n_clusters, top_k)
    programs = args["n_tiles"]
    if kernel == "topk_attention_backward_dkv":
        programs = args["n_parts"] * cdiv(top_k, block_n)
    args = {name: args[name] for name in KERNELS[kernel].arg_names if name in args}
    rows = {"order_ptr": n_queries, "offsets_ptr": n_queries + 1, "topk_index_ptr": n_keys}
    return Launch(KERNELS[kernel], (batch * heads * programs,), args, chosen, rows)


def sum_launch(tensors: Mapping[str, torch.Tensor], config: Config | None) -> Launch:
    """The launch of the sum on tensors parts (heads, entries, F), entries (heads, entries), first (heads, rows + 1) and
    sum (heads, rows, F)."""
    heads, n_rows, dim = tensors["sum"].shape
    n_entries = tensors["entries"].shape[1]
    chosen = config or heuristic("topk_attention_sum", device_kind(tensors["sum"].device), 1, dim)
    n_tiles = cdiv(n_rows, chosen.blocks["BLOCK_M"])
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    args |= {"n_entries": n_entries, "n_rows": n_rows, "n_tiles": n_tiles}
    args |= {"DIM": dim, "BLOCK_DIM": max(16, next_power_of_2(dim))}
    return Launch(sum_kernel, (heads * n_tiles,), args, chosen, {"entries_ptr": n_entries, "first_ptr": n_entries + 1})


def _run(
    kernels: tuple[str, ...], tensors: dict[str, torch.Tensor], made: int, is_causal: bool, scale: float,
    dropout_p: float, lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """One launch of each of ``kernels``; see ``run_planned`` for ``made``."""

    def launches() -> Iterator[Launch]:
        q, (batch, heads, n_clusters, top_k) = tensors["q"], tensors["topk_index"].shape
        shape = {"batch": batch, "heads": heads, "n_queries": q.shape[2], "n_clusters": n_clusters, "top_k": top_k}
        shape |= {"head_dim": q.shape[3], "value_dim": tensors["v"].shape[3]}
        options = {"is_causal": is_causal, "dropout": dropout_p > 0}
        for kernel in kernels:
            config = lookup(kernel, q.device, q.dtype, shape, options) if lookup else None
            yield launch_of(kernel, tensors, is_causal, scale, dropout_p, config)

    run_planned(
        (kernels, is_causal, scale, dropout_p, torch.get_float32_matmul_precision(), stamp),
        tensors,
        launches,
        made=made,
    )


def _sum_by_row(
    parts: torch.Tensor, entries: torch.Tensor, first: torch.Tensor, out: torch.Tensor,
    lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """Writes into ``out`` (heads, rows, F), row by row, the sum of the parts (heads, entries, F) of that row."""
    tensors = {"parts": parts, "entries": entries, "first": first, "sum": out}

    def launches() -> Iterator[Launch]:
        heads, n_rows, dim = out.shape
        shape = {"heads": heads, "n_rows": n_rows, "value_dim": dim}
        yield sum_launch(tensors, lookup("topk_attention_sum", out.device, out.dtype, shape, {}) if lookup else None)

    run_planned(("topk_attention_sum", stamp), tensors, launches)


def _sorted(rows: torch.Tensor, n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(entries, first), int32: the places of rows (heads, entries) sorted by row, and for each of ``n_rows`` rows where
    its places begin and those of the last one end; places of row -1 stand before all."""
    rows, entries = torch.sort(rows, dim=-1, stable=True)
    wanted = torch.arange(n_rows + 1, device=rows.device, dtype=torch.int32).expand(len(rows), -1).contiguous()
    return entries.int(), torch.searchsorted(rows, wanted, out_int32=True)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor,
    topk_index: torch.Tensor, mass: torch.Tensor, rest: torch.Tensor, seed: torch.Tensor, is_causal: bool, scale: float,
    dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of top-k attention; the arguments but for the index values are checked by
    ``fastattn.ops.topk_attention``.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv). order (B, H, N): the queries sorted by cluster; those of
    cluster c are order[offsets[c]] .. order[offsets[c + 1] - 1], those of no cluster stand from offsets[C] on. offsets
    (B, H, C + 1); topk_index (B, H, C, K), -1 for no key; all three int32 and contiguous. mass (B, H, C) and rest
    (B, H, C, Dv), fp32: out = mass * softmax part + rest. seed: int64, without dimensions, of dropout.
    lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.

    Returns out (B, H, N, Dv) in q's dtype and lse (B, H, N) in fp32, of the softmax part alone; a query of no cluster
    has 0 and -inf. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "order": order, "offsets": offsets, "topk_index": topk_index}
    tensors |= {"mass": mass.contiguous(), "rest": rest.contiguous(), "seed": seed, "out": out, "lse": lse}
    _run(("topk_attention_forward",), tensors, 2, is_causal, scale, dropout_p, lookup, stamp)
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, order: torch.Tensor,
    offsets: torch.Tensor, topk_index: torch.Tensor, mass: torch.Tensor, lse: torch.Tensor, seed: torch.Tensor,
    is_causal: bool, scale: float, dropout_p: float = 0.0, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv, dmass, drest) from dout (B, H, N, Dv), dlse (B, H, N) in fp32 and the lse of :func:`forward`; the
    same options."""
    q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), dout.contiguous()
    batch, heads, n_queries, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    n_clusters, top_k = topk_index.shape[2:]
    n_parts, _ = parts_of(n_queries, n_clusters, top_k)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return q.new_empty((batch, heads, *shape), dtype=dtype)

    dq, delta = q.new_empty(q.shape), empty(n_queries)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "order": order, "offsets": offsets, "topk_index": topk_index}
    tensors |= {
        "mass": mass.contiguous(),
        "lse": lse.contiguous(),
        "dlse": dlse.contiguous(),
        "seed": seed,
        "dq": dq,
        "delta": delta,
    }
    parts = {"dk": empty(n_parts, top_k, head_dim), "dv": empty(n_parts, top_k, value_dim)}
    parts |= {"rows": empty(n_parts, top_k, dtype=torch.int32), "drest": empty(n_parts, value_dim)}
    parts |= {"dmass": empty(n_parts), "clusters": empty(n_parts, dtype=torch.int32)}
    kernels = ("topk_attention_backward_dq", "topk_attention_backward_dkv")
    _run(kernels, tensors | parts, 2 + len(parts), is_causal, scale, dropout_p, lookup, stamp)

    # heads that share keys: the parts of all of them are summed at once
    entries, first = _sorted(parts["rows"].view(batch * kv_heads, -1), n_keys)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    for name, out in (("dk", dk), ("dv", dv)):
        part = parts[name].view(*entries.shape, -1)
        _sum_by_row(part, entries, first, out.view(batch * kv_heads, n_keys, -1), lookup, stamp)
    entries, first = _sorted(parts["clusters"].view(batch * heads, n_parts), n_clusters)
    dmass, drest = empty(n_clusters), empty(n_clusters, value_dim)
    for name, out in (("dmass", dmass), ("drest", drest)):
        part = parts[name].view(*entries.shape, -1)
        _sum_by_row(part, entries, first, out.view(batch * heads, n_clusters, -1), lookup, stamp)
    return dq, dk, dv, dmass, drest


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, device_type: str = "cuda", config: Config | None = None,
    top_k: int = 32, n_clusters: int = 100, is_causal: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    config = config or heuristic(kernel, device_type, top_k, head_dim, dtype.itemsize)
    if kernel == "topk_attention_sum":
        entries = meta(1, 64, dtype=torch.int32)
        tensors = {"parts": meta(1, 64, head_dim), "entries": entries, "first": entries}
        return sum_launch(tensors | {"sum": meta(1, 63, head_dim, dtype=dtype)}, config)
    x, row, integers = meta(1, 1, 64, head_dim, dtype=dtype), meta(1, 1, 64), meta(1, 1, 64, dtype=torch.int32)
    tensors = {"dout": x, "q": x, "k": x, "v": x, "order": integers, "offsets": integers, "out": x, "dq": x}
    tensors |= {"topk_index": meta(1, 1, n_clusters, top_k, dtype=torch.int32)}
    tensors |= {"rest": row, "drest": row, "dk": row, "dv": row, "rows": integers, "clusters": integers}
    tensors |= {name: row for name in ("mass", "dmass", "lse", "dlse", "delta")}
    tensors["seed"] = meta(1, dtype=torch.int64)
    return launch_of(kernel, tensors, is_causal, 1.0, 0.0, config)
