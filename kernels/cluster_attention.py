"""Rows to clusters and back: the sums over the members of each cluster, and each member's copy of its cluster's row.

Clusters may be of any sizes, so rows are not sorted by them: a program sums a chunk of rows for all clusters. On a CPU
it adds row by row to memory that it alone writes; on a GPU the sums are a product with a one-hot matrix. The chunks are
added up in their order, so that the same rows give the same bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .config import Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, run_planned, unit_stride
from .tiles import head_of, load_rows, store_rows


@triton.jit
def sums_kernel(
    x_ptr, clusters_ptr, sums_ptr, counts_ptr, x_stride_b, x_stride_h, x_stride_n,
    n_heads, length, n_clusters, n_chunks, chunk,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    # one program = one chunk of rows of one head, for all clusters (SCATTER) or for BLOCK_C of them
    if SCATTER:
        part = tl.program_id(0).to(tl.int64)
    else:
        c_tiles = tl.cdiv(n_clusters, BLOCK_C)
        part = (tl.program_id(0) // c_tiles).to(tl.int64)
    row = part // n_chunks
    begin = (part % n_chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, length)
    x_ptr = head_of(x_ptr, row, n_heads, 1, x_stride_b, x_stride_h)
    clusters_ptr += row * length
    # what follows the last cluster takes the rows of none
    sums_ptr += part * (n_clusters + 1) * DIM
    counts_ptr += part * (n_clusters + 1)
    columns = tl.arange(0, BLOCK_D)
    if SCATTER:
        inside, zero = columns < DIM, tl.zeros([], tl.int64)
        for c in range(0, n_clusters + 1):
            tl.store(sums_ptr + (c + zero) * DIM + columns, tl.zeros([BLOCK_D], tl.float32), mask=inside)
            tl.store(counts_ptr + c, 0)
        for n in range(begin, end):
            cluster = tl.load(clusters_ptr + n)
            cluster = tl.where(cluster < 0, n_clusters, cluster)
            x = tl.load(x_ptr + (n + zero) * x_stride_n + columns, mask=inside, other=0.0)  # [BLOCK_D]
            at = sums_ptr + cluster.to(tl.int64) * DIM + columns
            tl.store(at, tl.load(at, mask=inside, other=0.0) + x.to(tl.float32), mask=inside)
            tl.store(counts_ptr + cluster, tl.load(counts_ptr + cluster) + 1)
    else:
        numbers = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
        count = tl.zeros([BLOCK_C], tl.int32)
        for start in range(begin, end, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            clusters = tl.load(clusters_ptr + rows, mask=rows < end, other=-1)  # [BLOCK_N]
            # rows of no cluster may hold anything: they are not read
            x = load_rows(x_ptr, tl.where(clusters < 0, -1, rows), x_stride_n, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            member = numbers[:, None] == clusters[None, :]  # [BLOCK_C, BLOCK_N]
            total = tl.dot(member.to(x.dtype), x, total, input_precision="ieee")
            count += tl.sum(member.to(tl.int32), 1)
        numbers = tl.where(numbers < n_clusters, numbers, -1)
        store_rows(sums_ptr, numbers, DIM, total, DIM, BLOCK_D)
        tl.store(counts_ptr + numbers, count, mask=numbers >= 0)


@triton.jit
def broadcast_kernel(
    values_ptr, clusters_ptr, out_ptr, length, n_clusters,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_N rows of one head
    n_tiles = tl.cdiv(length, BLOCK_N)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.where(rows < length, rows, -1)  # [BLOCK_N]
    clusters = tl.load(clusters_ptr + row * length + rows, mask=rows >= 0, other=-1)
    values = load_rows(values_ptr + row * n_clusters * DIM, clusters, DIM, DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    store_rows(out_ptr + row * length * DIM, rows, DIM, values, DIM, BLOCK_D)


TUNING: dict[str, TuningSpace] = {
    "cluster_attention_sums": TuningSpace(
        {"BLOCK_N": (16, 32, 64, 128), "BLOCK_C": (16, 32, 64, 128), "SCATTER": (0, 1)},
        num_warps=(4, 8), num_stages=(1, 2, 3),
    ),
    "cluster_attention_broadcast": TuningSpace(
        {"BLOCK_N": (16, 32, 64, 128, 256)}, num_warps=(4, 8), num_stages=(1,)
    ),
}  # fmt: skip
KERNELS = {"cluster_attention_sums": sums_kernel, "cluster_attention_broadcast": broadcast_kernel}


def cost(
    kernel: str, *, batch: int, heads: int, length: int, n_clusters: int, dim: int, element_size: int = 4,
    config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one launch of ``kernel`` (a key of :data:`TUNING`)."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows, blocks = batch * heads * length, dict(config.blocks) if config else {}
    own = rows * (dim * element_size + 4)
    if kernel == "cluster_attention_broadcast":
        work = Cost(0, own + batch * heads * n_clusters * dim * 4, 0)
        if not blocks:
            return work
        n = blocks["BLOCK_N"]
        steps = batch * heads * cdiv(length, n)
        return replace(
            work, pointwise=steps * n * padded(dim), steps=steps, held=4 * n * padded(dim), loaded=own + rows * dim * 4
        )
    scatter = blocks.get("SCATTER", 1)
    n_chunks, chunk = chunks(length, "cpu" if scatter else "cuda")
    parts = batch * heads * n_chunks
    sums = parts * (n_clusters + scatter) * (dim + 1) * 4
    work = Cost(rows * dim, own + sums, 0, rate="float32" if scatter else None)
    if not blocks:
        return work
    if scatter:
        # row by row: the sum of its cluster is read, changed and written
        steps = rows + parts * (n_clusters + 1)
        loaded = own + rows * (dim + 1) * 8 + sums
        return replace(work, tile_flops=rows * padded(dim), pointwise=rows * padded(dim), steps=steps, loaded=loaded)
    n, c = blocks["BLOCK_N"], blocks["BLOCK_C"]
    c_tiles = cdiv(n_clusters, c)
    full, rest = divmod(length, chunk)
    steps = batch * heads * c_tiles * (full * cdiv(chunk, n) + cdiv(rest, n))
    return replace(
        work, **products(steps, (c, padded(dim), n)), pointwise=steps * 2 * n * c, steps=steps,
        loaded=own * c_tiles + sums,
    )  # fmt: skip


def heuristic(kernel: str, device_type: str, n_clusters: int = 100, dim: int = 64, element_size: int = 4) -> Config:
    """The configuration where nothing was tuned. device_type: as in block attention's."""
    block_c = min(32, max(16, next_power_of_2(n_clusters)))
    if kernel == "cluster_attention_sums":
        if device_type == "cpu":
            return Config({"BLOCK_N": 16, "BLOCK_C": 16, "SCATTER": 1})
        # exact fp32 products run on the plain ALUs, with their operands in registers
        rows = 32 if element_size == 2 or dim <= 64 else 16
        most = (4096 if element_size == 2 else 2048) // next_power_of_2(dim)
        tile = {"BLOCK_N": rows, "BLOCK_C": max(16, min(block_c, most)), "SCATTER": 0}
        return Config(tile, num_stages=2 if element_size == 2 else 1)
    if kernel == "cluster_attention_broadcast":
        return Config({"BLOCK_N": 32 if device_type == "cpu" or dim > 64 else 64}, num_stages=1)
    raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")


def chunks(length: int, device_type: str) -> tuple[int, int]:
    """(how many, of how many rows): the parts of a head's rows that are summed apart."""
    most, least = (16, 1024) if device_type == "cpu" else (64, 256)
    size = cdiv(max(least, cdiv(length, most)), 64) * 64
    return cdiv(length, size), size


def sums_launch(tensors: Mapping[str, torch.Tensor], device_type: str, config: Config | None = None) -> Launch:
    """On x (B, H, N, F), clusters (B, H, N), and, written, sums (B, H, chunks, C + 1, F), fp32, and counts, the same
    but for F, int32. What stands at C is no cluster's, and undefined."""
    x, sums = tensors["x"], tensors["sums"]
    batch, heads, length, dim = x.shape
    n_clusters = sums.shape[3] - 1
    n_chunks, chunk = chunks(length, device_type)
    config = config or heuristic("cluster_attention_sums", device_type, n_clusters, dim, x.element_size())
    args: dict[str, Any] = {f"{name}_ptr": tensors[name] for name in ("x", "clusters", "sums", "counts")}
    args |= dict(zip(("x_stride_b", "x_stride_h", "x_stride_n"), x.stride(), strict=False))
    args |= {"n_heads": heads, "length": length, "n_clusters": n_clusters, "n_chunks": n_chunks, "chunk": chunk}
    args |= {"DIM": dim, "BLOCK_D": max(16, next_power_of_2(dim))}  # 16: the least that tl.dot takes
    tiles = 1 if config.blocks["SCATTER"] else cdiv(n_clusters, config.blocks["BLOCK_C"])
    return Launch(sums_kernel, (batch * heads * n_chunks * tiles,), args, config)


def broadcast_launch(tensors: Mapping[str, torch.Tensor], device_type: str, config: Config | None = None) -> Launch:
    """On values (B, H, C, F) and clusters (B, H, N), contiguous, and out (B, H, N, F)."""
    values, out = tensors["values"], tensors["out"]
    batch, heads, length, dim = out.shape
    n_clusters = values.shape[2]
    config = config or heuristic("cluster_attention_broadcast", device_type, n_clusters, dim)
    args: dict[str, Any] = {f"{name}_ptr": tensors[name] for name in ("values", "clusters", "out")}
    args |= {"length": length, "n_clusters": n_clusters, "DIM": dim, "BLOCK_D": next_power_of_2(dim)}
    return Launch(broadcast_kernel, (batch * heads * cdiv(length, config.blocks["BLOCK_N"]),), args, config)


def sums(
    x: torch.Tensor, clusters: torch.Tensor, n_clusters: int, lookup: Lookup | None = None, stamp: Hashable = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums (B, H, C, F), fp32, and counts (B, H, C), int32; see ``fastattn.ops.cluster_attention.cluster_sums``.

    lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.
    """
    batch, heads, length, dim = x.shape
    kind = device_kind(x.device)
    shape = (batch, heads, chunks(length, kind)[0], n_clusters + 1)
    tensors = {"x": unit_stride(x), "clusters": clusters.contiguous()}
    tensors["sums"] = torch.empty((*shape, dim), dtype=torch.float32, device=x.device)
    tensors["counts"] = torch.empty(shape, dtype=torch.int32, device=x.device)

    def launches() -> Iterator[Launch]:
        found = lookup("cluster_attention_sums", x.device, x.dtype, {"clusters": n_clusters, "head_dim": dim}, {}) \
            if lookup else None  # fmt: skip
        yield sums_launch(tensors, kind, found)

    run_planned(("cluster_attention_sums", n_clusters, stamp), tensors, launches, made=2)
    return tensors["sums"][..., :-1, :].sum(2), tensors["counts"][..., :-1].sum(2, dtype=torch.int32)


def broadcast(
    values: torch.Tensor, clusters: torch.Tensor, dtype: torch.dtype, lookup: Lookup | None = None,
    stamp: Hashable = None,
) -> torch.Tensor:  # fmt: skip
    """out (B, H, N, F) in ``dtype``; see ``fastattn.ops.cluster_attention.cluster_broadcast``."""
    out = values.new_empty((*clusters.shape, values.shape[3]), dtype=dtype)
    tensors = {"values": values.contiguous(), "clusters": clusters.contiguous(), "out": out}

    def launches() -> Iterator[Launch]:
        shape = {"clusters": values.shape[2], "head_dim": values.shape[3]}
        found = lookup("cluster_attention_broadcast", values.device, dtype, shape, {}) if lookup else None
        yield broadcast_launch(tensors, device_kind(values.device), found)

    run_planned(("cluster_attention_broadcast", dtype, stamp), tensors, launches, made=1)
    return out


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, n_clusters: int = 100, device_type: str = "cuda",
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    x = torch.empty(1, 2, 256, head_dim, dtype=dtype, device="meta")
    tensors = {"x": x, "out": x, "clusters": torch.empty(1, 2, 256, dtype=torch.int32, device="meta")}
    if kernel == "cluster_attention_sums":
        shape = (1, 2, chunks(256, device_type)[0], n_clusters + 1)
        tensors["sums"] = x.new_empty((*shape, head_dim), dtype=torch.float32)
        tensors["counts"] = x.new_empty(shape, dtype=torch.int32)
        return sums_launch(tensors, device_type, config)
    tensors["values"] = x.new_empty((1, 2, n_clusters, head_dim))
    return broadcast_launch(tensors, device_type, config)
