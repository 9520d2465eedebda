"""Codes of random hyperplanes, and Lloyd's algorithm on them by Hamming distance.

A code is up to 63 bits in an int64. Where there are tensor cores, the distance of two codes is read off the dot product
of their signs, 8-bit integers, and a cluster's bits are counted by the product of a one-hot matrix with theirs; on a
CPU the distance is a population count, and bits are counted row by row in memory that one program owns. Both are exact.
An iteration is three launches: rows to clusters, clusters to counts by chunks of rows, counts to centroids.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .config import Config, Cost, TuningSpace, cdiv, next_power_of_2, products
from .launch import Launch, Lookup, device_kind, exact_precision, is_interpreted, run_planned, unit_stride
from .tiles import head_of


@triton.jit
def hash_kernel(
    x_ptr, planes_ptr, codes_ptr, x_stride_b, x_stride_h, x_stride_n, n_heads, length, n_bits,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M rows of one head; planes are [DIM + 1, n_bits], thresholds last
    n_tiles = tl.cdiv(length, BLOCK_M)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    x_ptr = head_of(x_ptr, row, n_heads, 1, x_stride_b, x_stride_h)
    place = tl.program_id(0) % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.where(place < length, place, -1)  # [BLOCK_M]
    bits = tl.arange(0, 64)
    side = tl.zeros([BLOCK_M, 64], tl.float32)
    for start in range(0, DIM, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        at = rows.to(tl.int64)[:, None] * x_stride_n + columns[None, :]
        x = tl.load(x_ptr + at, mask=(rows >= 0)[:, None] & (columns < DIM)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        at = columns[:, None] * n_bits + bits[None, :]
        planes = tl.load(planes_ptr + at, mask=(columns < DIM)[:, None] & (bits < n_bits)[None, :], other=0.0)
        side = tl.dot(x.to(tl.float32), planes, side, input_precision=PRECISION)  # planes: [BLOCK_K, 64]
    # no sum is above the threshold of a bit that there is not
    threshold = tl.load(planes_ptr + DIM * n_bits + bits, mask=bits < n_bits, other=float("inf"))  # [64]
    above = side > threshold[None, :]
    code = tl.sum(above.to(tl.int64) << bits.to(tl.int64)[None, :], 1)  # [BLOCK_M]
    tl.store(codes_ptr + row * length + place, code, mask=place < length)


@triton.jit
def signs(codes, n_bits):
    """Bits as 1 and -1, [len(codes), 64] int8; 0 where there is no bit, so that a dot product counts the others."""
    bits = tl.arange(0, 64)
    bit = (codes[:, None] >> bits.to(tl.int64)[None, :]).to(tl.int32) & 1
    return tl.where((bits < n_bits)[None, :], 2 * bit - 1, 0).to(tl.int8)


@triton.jit
def assign_kernel(
    codes_ptr, centroids_ptr, ranks_ptr, mask_ptr, clusters_ptr, n_heads, length, n_clusters, n_bits,
    HAS_MASK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, POPCOUNT: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_N rows of one head against all of its centroids
    n_tiles = tl.cdiv(length, BLOCK_N)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    rows = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    codes = tl.load(codes_ptr + row * length + rows, mask=rows < length, other=0)  # [BLOCK_N]
    centroids_ptr += row * 2 * n_clusters
    ranks_ptr += row * n_clusters
    if not POPCOUNT:
        own = signs(codes, n_bits)  # [BLOCK_N, 64]
    # the distance, or twice that, and below it the centroid's number: the least is the nearest, and of equals the first
    best = tl.full([BLOCK_N], 0x7FFFFFFF, tl.int32)
    for start in range(0, n_clusters, BLOCK_C):
        numbers = start + tl.arange(0, BLOCK_C)
        low = tl.load(centroids_ptr + numbers, mask=numbers < n_clusters, other=0)  # [BLOCK_C]
        high = tl.load(centroids_ptr + n_clusters + numbers, mask=numbers < n_clusters, other=0)
        # what does not exist is farther away than anything, whatever its bits
        rank = tl.load(ranks_ptr + numbers, mask=numbers < n_clusters, other=127 << 24)
        if POPCOUNT:
            low_distance = libdevice.popc(codes.to(tl.int32)[:, None] ^ low[None, :])  # [BLOCK_N, BLOCK_C]
            high_distance = libdevice.popc((codes >> 32).to(tl.int32)[:, None] ^ high[None, :])
            distance = low_distance + high_distance  # pyright: ignore[reportOperatorIssue]
        else:
            centroids = (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)
            agreement = tl.dot(own, tl.trans(signs(centroids, n_bits)), out_dtype=tl.int32)  # [BLOCK_N, BLOCK_C]
            distance = n_bits - agreement
        best = tl.minimum(best, tl.min((distance << 24) | rank[None, :], 1))
    cluster = best & 0xFFFFFF
    if HAS_MASK:
        takes_part = tl.load(mask_ptr + row // n_heads * length + rows, mask=rows < length, other=False)
        cluster = tl.where(takes_part, cluster, -1)
    tl.store(clusters_ptr + row * length + rows, cluster, mask=rows < length)


@triton.jit
def count_kernel(
    codes_ptr, clusters_ptr, counts_ptr, length, n_clusters, n_chunks, chunk,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    # one program = one chunk of rows of one head: how many members of each cluster (SCATTER), or of BLOCK_C clusters,
    # have each bit; bit 63 is set in all, which counts the members
    if SCATTER:
        part = tl.program_id(0).to(tl.int64)
    else:
        c_tiles = tl.cdiv(n_clusters, BLOCK_C)
        part = (tl.program_id(0) // c_tiles).to(tl.int64)
    row = part // n_chunks
    begin = (part % n_chunks).to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, length)
    codes_ptr += row * length
    clusters_ptr += row * length
    counts_ptr += part * (n_clusters + 1) * 64  # what follows the last cluster takes rows of none
    if SCATTER:
        lane = tl.arange(0, 32)
        for c in range(0, n_clusters + 1):
            tl.store(counts_ptr + c * 64 + lane, tl.zeros([32], tl.int32))
            tl.store(counts_ptr + c * 64 + 32 + lane, tl.zeros([32], tl.int32))
        for n in range(begin, end):
            code = tl.load(codes_ptr + n)
            cluster = tl.load(clusters_ptr + n)
            low = counts_ptr + tl.where(cluster < 0, n_clusters, cluster) * 64 + lane
            tl.store(low, tl.load(low) + ((code.to(tl.int32) >> lane) & 1))
            high = (code >> 32).to(tl.int32) | -0x80000000
            tl.store(low + 32, tl.load(low + 32) + ((high >> lane) & 1))
    else:
        bits = tl.arange(0, 64)
        numbers = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C, 64], tl.int32)
        for start in range(begin, end, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            codes = tl.load(codes_ptr + rows, mask=rows < end, other=0)  # [BLOCK_N]
            clusters = tl.load(clusters_ptr + rows, mask=rows < end, other=-1)  # [BLOCK_N]
            member = (numbers[:, None] == clusters[None, :]).to(tl.int8)  # [BLOCK_C, BLOCK_N]
            bit = (codes[:, None] >> bits.to(tl.int64)[None, :]) & 1
            bit = tl.where((bits == 63)[None, :], 1, bit).to(tl.int8)  # [BLOCK_N, 64]
            total = tl.dot(member, bit, total, out_dtype=tl.int32)
        at = counts_ptr + numbers[:, None] * 64 + bits[None, :]
        tl.store(at, total, mask=(numbers < n_clusters)[:, None])


@triton.jit(do_not_specialize=["iteration"])
def update_kernel(
    counts_ptr, seed_ptr, centroids_ptr, n_clusters, n_chunks, n_bits, iteration, BLOCK_C: tl.constexpr
):  # fmt: skip
    # one program = BLOCK_C centroids of one head
    c_tiles = tl.cdiv(n_clusters, BLOCK_C)
    row = (tl.program_id(0) // c_tiles).to(tl.int64)
    numbers = tl.program_id(0) % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    bits = tl.arange(0, 64)
    counts_ptr += row * n_chunks * (n_clusters + 1) * 64
    total, zero = tl.zeros([BLOCK_C, 64], tl.int32), tl.zeros([], tl.int64)
    for part in range(0, n_chunks):
        at = counts_ptr + ((part + zero) * (n_clusters + 1) + numbers)[:, None] * 64 + bits[None, :]
        total += tl.load(at, mask=(numbers < n_clusters)[:, None], other=0)  # [BLOCK_C, 64]
    members = tl.sum(tl.where((bits == 63)[None, :], total, 0), 1)  # [BLOCK_C]
    is_one = 2 * total > members[:, None]  # pyright: ignore[reportArgumentType]
    one = (is_one & (bits < n_bits)[None, :]).to(tl.int32) << (bits & 31)[None, :]
    every = (tl.full([], 1, tl.int64) << n_bits) - 1
    drawn_low, drawn_high, _, _ = tl.randint4x(tl.load(seed_ptr), iteration * n_clusters + numbers)
    drawn_low = drawn_low.to(tl.int32) & every.to(tl.int32)
    drawn_high = drawn_high.to(tl.int32) & (every >> 32).to(tl.int32)
    low = tl.sum(tl.where((bits < 32)[None, :], one, 0), 1)  # [BLOCK_C]
    high = tl.sum(tl.where((bits < 32)[None, :], 0, one), 1)
    centroids_ptr += row * 2 * n_clusters + numbers
    is_inside = numbers < n_clusters
    tl.store(centroids_ptr, tl.where(members == 0, drawn_low, low), mask=is_inside)
    tl.store(centroids_ptr + n_clusters, tl.where(members == 0, drawn_high, high), mask=is_inside)


_NOT_THERE = 127 << 24  # above any distance
_ROWS = (16, 32, 64, 128, 256)
_COLUMNS = (16, 32, 64, 128)
TUNING: dict[str, TuningSpace] = {
    "hamming_hash": TuningSpace({"BLOCK_M": _ROWS[:-1], "BLOCK_K": _COLUMNS}, num_warps=(4, 8), num_stages=(1, 2)),
    "hamming_assign": TuningSpace(
        {"BLOCK_N": _ROWS, "BLOCK_C": _COLUMNS, "POPCOUNT": (0, 1)}, num_warps=(4, 8), num_stages=(1, 2)
    ),
    "hamming_count": TuningSpace(
        {"BLOCK_N": _ROWS[1:], "BLOCK_C": _COLUMNS, "SCATTER": (0, 1)}, num_warps=(4, 8), num_stages=(1, 2, 3)
    ),
    "hamming_update": TuningSpace({"BLOCK_C": _COLUMNS}, num_warps=(4, 8), num_stages=(1, 2)),
}
KERNELS = {
    "hamming_hash": hash_kernel,
    "hamming_assign": assign_kernel,
    "hamming_count": count_kernel,
    "hamming_update": update_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, length: int, n_clusters: int, n_bits: int = 63, head_dim: int = 64,
    element_size: int = 4, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one launch of ``kernel`` (a key of :data:`TUNING`), a dot product's operation for each bit compared."""
    rows, blocks = batch * heads * length, dict(config.blocks) if config else {}
    if kernel == "hamming_hash":
        own, planes = rows * (head_dim * element_size + 8), (head_dim + 1) * n_bits * 4
        work = Cost(2 * rows * n_bits * head_dim, own + planes, 0, rate="tf32x3")
        if not blocks:
            return work
        m, k = blocks["BLOCK_M"], blocks["BLOCK_K"]
        programs = batch * heads * cdiv(length, m)
        steps = programs * cdiv(head_dim, k)
        return replace(
            work, **products(steps, (m, 64, k)), pointwise=programs * 4 * m * 64, steps=steps,
            loaded=own + programs * planes,
        )  # fmt: skip
    if kernel == "hamming_assign":
        centroids = batch * heads * n_clusters * 12
        by_count = blocks.get("POPCOUNT", 0)
        work = Cost(
            2 * rows * n_clusters * n_bits, rows * 12 + centroids, 0, rate="popcount" if by_count else "int8"
        )  # fmt: skip
        if not blocks:
            return work
        n, c = blocks["BLOCK_N"], blocks["BLOCK_C"]
        tiles = cdiv(length, n)
        steps = batch * heads * tiles * cdiv(n_clusters, c)
        # three operations leave the nearest; bits to signs take as many
        pointwise = steps * (3 * n * c + (0 if by_count else 3 * 64 * c))
        return replace(
            work, **products(steps, (n, c, 64)), pointwise=pointwise, steps=steps, loaded=rows * 12 + centroids * tiles
        )  # fmt: skip
    scatter = blocks.get("SCATTER", 1)
    n_chunks, chunk = chunks(length, "cpu" if scatter else "cuda")
    parts = batch * heads * n_chunks
    counts = parts * (n_clusters + scatter) * 256
    if kernel == "hamming_count":
        work = Cost(2 * rows * 64, rows * 12 + counts, 0, rate="float32" if scatter else "int8")
        if not blocks:
            return work
        if scatter:
            # row by row: 64 counters are read, changed and written
            steps = rows + parts * (n_clusters + 1)
            return replace(
                work, tile_flops=2 * rows * 64, pointwise=rows * 128, steps=steps, loaded=rows * 524 + counts
            )  # fmt: skip
        n, c = blocks["BLOCK_N"], blocks["BLOCK_C"]
        c_tiles = cdiv(n_clusters, c)
        steps = batch * heads * c_tiles * _tiles_of_chunks(length, chunk, n)
        return replace(
            work, **products(steps, (c, 64, n)), pointwise=steps * (n * c + 3 * 64 * n), steps=steps,
            loaded=rows * 12 * c_tiles + counts,
        )  # fmt: skip
    if kernel == "hamming_update":
        n_chunks, _ = chunks(length, "cuda")
        numbers = batch * heads * n_clusters * 64 * n_chunks
        work = Cost(numbers, numbers * 4 + batch * heads * n_clusters * 8, 0, rate="float32")
        if not blocks:
            return work
        c = blocks["BLOCK_C"]
        tiles = batch * heads * cdiv(n_clusters, c)
        return replace(
            work, tile_flops=tiles * c * 64 * n_chunks, pointwise=tiles * c * 64 * 6, steps=tiles * n_chunks,
            held=4 * c * 64, loaded=work.bytes,
        )  # fmt: skip
    raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")


def _tiles_of_chunks(length: int, chunk: int, tile: int) -> int:
    """How many tiles the chunks of one head are cut into; the last chunk may be shorter."""
    full, rest = divmod(length, chunk)
    return full * cdiv(chunk, tile) + cdiv(rest, tile)


def heuristic(kernel: str, device_type: str, n_clusters: int = 100, head_dim: int = 64) -> Config:
    """The configuration where nothing was tuned. device_type: as in block attention's."""
    on_cpu = device_type == "cpu"
    block_c = min(128, max(16, next_power_of_2(n_clusters)))
    if kernel == "hamming_hash":
        columns = max(16, next_power_of_2(head_dim))
        if on_cpu:
            return Config({"BLOCK_M": 64, "BLOCK_K": min(128, columns)})
        # three products of fp32 tiles fill the registers
        return Config({"BLOCK_M": 64, "BLOCK_K": min(32, columns)}, num_stages=2)
    if kernel == "hamming_assign":
        if on_cpu:
            return Config({"BLOCK_N": 64, "BLOCK_C": block_c, "POPCOUNT": 1})
        return Config({"BLOCK_N": 128, "BLOCK_C": min(64, block_c), "POPCOUNT": 0}, num_stages=1)
    if kernel == "hamming_count":
        if on_cpu:
            return Config({"BLOCK_N": 64, "BLOCK_C": 16, "SCATTER": 1})
        return Config({"BLOCK_N": 64, "BLOCK_C": min(64, block_c), "SCATTER": 0}, num_stages=2)
    if kernel == "hamming_update":
        return Config({"BLOCK_C": 16 if on_cpu else 32}, num_stages=1)
    raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")


def chunks(length: int, device_type: str) -> tuple[int, int]:
    """(how many, of how many rows): the parts of a head's rows that are counted apart. No results depend on it."""
    most, least = (16, 1024) if device_type == "cpu" else (64, 256)
    size = cdiv(max(least, cdiv(length, most)), 64) * 64
    return cdiv(length, size), size


def hash_launch(tensors: Mapping[str, torch.Tensor], device_type: str, config: Config | None = None) -> Launch:
    """On x (B, H, N, D), planes (D + 1, n_bits), fp32 and contiguous, and codes (B, H, N)."""
    x, planes, codes = tensors["x"], tensors["planes"], tensors["codes"]
    batch, heads, length, head_dim = x.shape
    config = config or heuristic("hamming_hash", device_type, head_dim=head_dim)
    args: dict[str, Any] = {"x_ptr": x, "planes_ptr": planes, "codes_ptr": codes}
    args |= dict(zip(("x_stride_b", "x_stride_h", "x_stride_n"), x.stride(), strict=False))
    args |= {"n_heads": heads, "length": length, "n_bits": planes.shape[1]}
    args |= {"DIM": head_dim, "PRECISION": exact_precision(device_type)}
    return Launch(hash_kernel, (batch * heads * cdiv(length, config.blocks["BLOCK_M"]),), args, config)


def kmeans_launches(
    tensors: Mapping[str, torch.Tensor], n_bits: int, n_iterations: int, device_type: str,
    config: Mapping[str, Config] | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """All launches of Lloyd's algorithm on tensors named as the kernels' arguments without ``_ptr``.

    codes (B, H, N); centroids (B, H, 2, C), int32, set to the first ones' lower and upper halves; ranks (B, H, C), each
    cluster's number, plus 127 << 24 where it does not exist; seed; mask (B, N), or the codes where there is none, in
    whose place they stand unread; counts, of :func:`counts_size`; clusters (B, H, N).
    """
    batch, heads, length = tensors["codes"].shape
    n_clusters = tensors["ranks"].shape[-1]
    n_chunks, chunk = chunks(length, device_type)
    chosen = {name: (config or {}).get(name) or heuristic(name, device_type, n_clusters) for name in KERNELS}
    sizes = {"n_heads": heads, "length": length, "n_clusters": n_clusters, "n_bits": n_bits}
    sizes |= {"n_chunks": n_chunks, "chunk": chunk, "HAS_MASK": tensors["mask"] is not tensors["codes"]}
    args = {f"{name}_ptr": tensor for name, tensor in tensors.items()} | sizes
    count = chosen["hamming_count"].blocks
    heads *= batch
    programs = {
        "hamming_assign": heads * cdiv(length, chosen["hamming_assign"].blocks["BLOCK_N"]),
        "hamming_count": heads * n_chunks * (1 if count["SCATTER"] else cdiv(n_clusters, count["BLOCK_C"])),
        "hamming_update": heads * cdiv(n_clusters, chosen["hamming_update"].blocks["BLOCK_C"]),
    }

    def launch(name: str, **more: int) -> Launch:
        given = args | more
        own = {argument: given[argument] for argument in KERNELS[name].arg_names if argument in given}
        return Launch(KERNELS[name], (programs[name],), own, chosen[name])

    yield launch("hamming_assign")
    for iteration in range(n_iterations - 1):
        yield launch("hamming_count")
        yield launch("hamming_update", iteration=iteration)
        yield launch("hamming_assign")


def counts_size(batch: int, heads: int, length: int, n_clusters: int, device_type: str) -> tuple[int, ...]:
    """What Lloyd's algorithm counts into: for each chunk the members of each cluster, of none, and their bits."""
    return (batch * heads, chunks(length, device_type)[0], n_clusters + 1, 64)


def hash_bits(
    x: torch.Tensor, planes: torch.Tensor, lookup: Lookup | None = None, stamp: Hashable = None
) -> torch.Tensor:
    """Codes (B, H, N), int64, of x (B, H, N, D); planes (n_bits, D + 1) fp32; checked by ``fastattn.ops.hash_bits``.

    lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.
    """
    codes = x.new_empty(x.shape[:3], dtype=torch.int64)
    tensors = {"x": unit_stride(x), "planes": planes.mT.contiguous(), "codes": codes}

    def launches() -> Iterator[Launch]:
        shape = {"head_dim": x.shape[3], "bits": planes.shape[0]}
        config = lookup("hamming_hash", x.device, x.dtype, shape, {}) if lookup else None
        yield hash_launch(tensors, device_kind(x.device), config)

    run_planned(("hamming_hash", stamp), tensors, launches, made=1)
    return codes


def kmeans(
    codes: torch.Tensor, initial: torch.Tensor, mask: torch.Tensor | None, seed: torch.Tensor, n_bits: int,
    n_iterations: int, lookup: Lookup | None = None, stamp: Hashable = None,
) -> torch.Tensor:  # fmt: skip
    """Clusters (B, H, N), int32, of codes (B, H, N); checked by ``fastattn.ops.hamming_kmeans``.

    initial (B, H, C) int32, the rows of the first centroids, -1 for clusters that do not exist. mask (B, N) bool.
    seed: int64 without dimensions. lookup, stamp: as for :func:`hash_bits`.
    """
    batch, heads, length = codes.shape
    n_clusters = initial.shape[-1]
    # the interpreter does not know population counts
    kind = "cuda" if is_interpreted(assign_kernel) else device_kind(codes.device)
    number = torch.arange(n_clusters, dtype=torch.int32, device=codes.device)
    ranks = torch.where(initial < 0, number + _NOT_THERE, number)
    tensors = {"codes": codes.contiguous(), "ranks": ranks, "seed": seed}
    tensors["mask"] = tensors["codes"] if mask is None else mask.contiguous()
    first = codes.gather(-1, initial.clamp_min(0).long()).unsqueeze(-2)  # [B, H, 1, C]
    tensors["centroids"] = torch.cat([first, first >> 32], -2).to(torch.int32)
    tensors["clusters"] = torch.empty_like(codes, dtype=torch.int32, memory_format=torch.contiguous_format)
    size = counts_size(batch, heads, length, n_clusters, kind)
    tensors["counts"] = torch.empty(size, dtype=torch.int32, device=codes.device)

    def launches() -> Iterator[Launch]:
        shape = {"batch": batch, "heads": heads, "clusters": n_clusters}
        found = {name: lookup(name, codes.device, codes.dtype, shape, {}) for name in KERNELS} if lookup else {}
        config = {name: choice for name, choice in found.items() if choice is not None}
        yield from kmeans_launches(tensors, n_bits, n_iterations, kind, config)

    run_planned(("hamming_kmeans", n_bits, n_iterations, stamp), tensors, launches, made=3)
    return tensors["clusters"]


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, n_clusters: int = 100, masked: bool = False,
    device_type: str = "cuda", config: Config | None = None,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see.

    dtype: of what is hashed; the other kernels have none.
    """
    codes = torch.empty(1, 2, 256, dtype=torch.int64, device="meta")
    if kernel == "hamming_hash":
        x = torch.empty(1, 2, 256, head_dim, dtype=dtype, device="meta")
        tensors = {"x": x, "planes": torch.empty(head_dim + 1, 63, device="meta"), "codes": codes}
        return hash_launch(tensors, device_type, config)
    whole = torch.empty(1, 2, n_clusters, dtype=torch.int32, device="meta")
    tensors = {"codes": codes, "clusters": codes.int(), "centroids": torch.stack([whole, whole], 2), "ranks": whole}
    tensors["counts"] = whole.new_empty(counts_size(1, 2, 256, n_clusters, device_type))
    tensors["seed"] = codes.new_empty(())
    tensors["mask"] = torch.empty(1, 256, dtype=torch.bool, device="meta") if masked else codes
    launches = kmeans_launches(tensors, 63, 2, device_type, {kernel: config} if config else {})
    return next(launch for launch in launches if launch.kernel is KERNELS[kernel])
