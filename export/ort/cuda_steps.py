"""What single ops have to do on a GPU between the launches of their kernels: there PyTorch sums, folds, selects and
sorts, and the CPU has the loops of ``cpu_steps.cc``.

There are no atomics: the same numbers give the same bits. Of equal ones the first is taken, and sorted rows keep their
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastattn.export.ort.cuda_kernels import MANY, places
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch

CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit
def sum_parts_kernel(parts_ptr, total_ptr, n, n_parts, size, part_size, BLOCK: tl.constexpr):
    # parts [rows, n_parts, part_size], of which the first ``size`` numbers count; n of all rows
    at, is_there = places(n, BLOCK)
    parts_ptr += at // size * n_parts * part_size + at % size
    total = tl.zeros([BLOCK], total_ptr.dtype.element_ty)
    for part in range(0, n_parts):
        total += tl.load(parts_ptr + part * part_size, mask=is_there, other=0)
    tl.store(total_ptr + at, total, mask=is_there)


@triton.jit
def fold_kernel(outs_ptr, lses_ptr, out_ptr, lse_ptr, n, n_parts, n_queries, dim, BLOCK: tl.constexpr):
    # outs [rows, n_parts, n_queries, dim], lses the same but for dim; n numbers of out [rows, n_queries, dim]
    at, is_there = places(n, BLOCK)
    query, column = at // dim, at % dim  # of all rows
    first = query // n_queries * n_parts * n_queries + query % n_queries
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(0, n_parts):
        most = tl.maximum(most, tl.load(lses_ptr + first + part * n_queries, mask=is_there, other=float("-inf")))
    shift = tl.where(most == float("-inf"), 0.0, most)  # without keys: exp(-inf - 0) is 0, not NaN
    total, acc = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for part in range(0, n_parts):
        place = first + part * n_queries
        weight = tl.exp(tl.load(lses_ptr + place, mask=is_there, other=float("-inf")) - shift)
        total += weight
        acc += weight * tl.load(outs_ptr + place * dim + column, mask=is_there, other=0.0)
    met = total != 0.0  # also where it is NaN
    total = tl.where(met, total, 1.0)
    tl.store(out_ptr + at, acc / total, mask=is_there)
    lse = tl.where(met, most + tl.log(total), float("-inf"))
    tl.store(lse_ptr + query, lse, mask=is_there & (column == 0))


@triton.jit
def load_ordered(numbers_ptr, at, n):
    """int32 in the order of the numbers; NaN is as -inf, -0 as 0, and what stands beyond the last below all."""
    x = tl.load(numbers_ptr + at, mask=at < n, other=0.0)  # [BLOCK]
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(at < n, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)


@triton.jit
def largest_kernel(numbers_ptr, places_ptr, n, k, BLOCK: tl.constexpr):
    # one program = one row of n numbers: the places of its k largest, in their order
    row = tl.program_id(0).to(tl.int64)
    numbers_ptr += row * n
    places_ptr += row * k
    lane = tl.arange(0, BLOCK)
    # the k-th largest, from its highest bit on: a bit is set if k numbers are still no smaller
    least = tl.full([], -0x80000000, tl.int32)
    for step in range(0, 32):
        tried = least ^ (1 << (31 - step))
        reaches = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            reaches += (load_ordered(numbers_ptr, start + lane, n) >= tried).to(tl.int32)
        least = tl.where(tl.sum(reaches) >= k, tried, least)
    larger = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        larger += (load_ordered(numbers_ptr, start + lane, n) > least).to(tl.int32)
    n_equal = k - tl.sum(larger)  # of those that equal it the first are taken
    taken, equal = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + lane
        numbers = load_ordered(numbers_ptr, at, n)  # [BLOCK]
        is_equal = (numbers == least).to(tl.int32)
        is_taken = (numbers > least) | ((is_equal > 0) & (equal + tl.cumsum(is_equal, 0) <= n_equal))
        tl.store(places_ptr + taken + tl.cumsum(is_taken.to(tl.int32), 0) - 1, at, mask=is_taken)
        taken += tl.sum(is_taken.to(tl.int32))
        equal += tl.sum(is_equal)


@triton.jit
def listed_keys_kernel(
    places_ptr, groups_ptr, logits_ptr, keys_ptr, n, k, n_groups, group_size, BLOCK: tl.constexpr
):  # fmt: skip
    # places [queries, k] among logits [queries, n_groups, group_size], of groups [queries, n_groups]; n of all queries
    at, is_there = places(n, BLOCK)
    place = tl.load(places_ptr + at, mask=is_there, other=0)  # [BLOCK]
    groups = at // k * n_groups  # of this query and those before
    group = tl.load(groups_ptr + groups + place // group_size, mask=is_there, other=0)
    logit = tl.load(logits_ptr + groups * group_size + place, mask=is_there, other=0.0)
    key = group * group_size + place % group_size
    tl.store(keys_ptr + at, tl.where(logit > float("-inf"), key, -1).to(tl.int32), mask=is_there)


@triton.jit
def first_centroids_kernel(
    codes_ptr, initial_ptr, centroids_ptr, ranks_ptr, n, n_clusters, length, BLOCK: tl.constexpr
):  # fmt: skip
    # codes [rows, length], initial [rows, n_clusters]; centroids [rows, 2, n_clusters], lower and upper halves of codes
    at, is_there = places(n, BLOCK)
    first = tl.load(initial_ptr + at, mask=is_there, other=-1)  # [BLOCK]
    exists = (first >= 0) & (first < length)
    code = tl.load(codes_ptr + at // n_clusters * length + tl.where(exists, first, 0), mask=is_there, other=0)
    # what does not exist is farther away than anything
    rank = (at % n_clusters).to(tl.int32) + tl.where(exists, 0, 127 << 24)
    tl.store(ranks_ptr + at, rank, mask=is_there)
    centroids_ptr += at + at // n_clusters * n_clusters
    tl.store(centroids_ptr, code.to(tl.int32), mask=is_there)
    tl.store(centroids_ptr + n_clusters, (code >> 32).to(tl.int32), mask=is_there)


@triton.jit
def load_numbers(clusters_ptr, at, length, n_clusters):
    """The clusters' numbers, that of none as one above all others; beyond the last row two above."""
    clusters = tl.load(clusters_ptr + at, mask=at < length, other=n_clusters + 1)  # [BLOCK]
    return tl.where(clusters < 0, n_clusters, clusters)


@triton.jit
def sort_by_cluster_kernel(clusters_ptr, order_ptr, offsets_ptr, length, n_clusters, BLOCK: tl.constexpr):
    # one program = one cluster of one head, or what has none: it counts the rows of those before it, and lists its own.
    # Each reads the numbers of all rows of its head twice, 4 bytes a row, which stay in the cache; nothing else is kept
    row, cluster = (tl.program_id(0) // (n_clusters + 1)).to(tl.int64), tl.program_id(0) % (n_clusters + 1)
    clusters_ptr += row * length
    order_ptr += row * length
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        before += (load_numbers(clusters_ptr, start + lane, length, n_clusters) < cluster).to(tl.int32)
    place = tl.sum(before)
    tl.store(offsets_ptr + row * (n_clusters + 1) + cluster, place)
    for start in range(0, length, BLOCK):
        is_own = load_numbers(clusters_ptr, start + lane, length, n_clusters) == cluster  # [BLOCK]
        own = is_own.to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(own, 0) - 1, start + lane, mask=is_own)
        place += tl.sum(own)


KERNELS = {
    "sum_parts": sum_parts_kernel,
    "fold": fold_kernel,
    "largest": largest_kernel,
    "listed_keys": listed_keys_kernel,
    "first_centroids": first_centroids_kernel,
    "sort_by_cluster": sort_by_cluster_kernel,
}


def examples(name: str) -> list[Launch]:
    """Launches of a kernel that stand for all, on tensors without memory: what an ahead-of-time compiler needs."""
    fp32, int32, int64 = (
        torch.empty(1, device="meta", dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int64)
    )
    given: dict[str, list[dict[str, Any]]] = {
        "sum_parts": [
            {"parts_ptr": x, "total_ptr": x, "n": MANY, "n_parts": MANY, "size": MANY, "part_size": MANY}
            for x in (fp32, int32)
        ],
        "fold": [
            {name: fp32 for name in ("outs_ptr", "lses_ptr", "out_ptr", "lse_ptr")}
            | dict.fromkeys(("n", "n_parts", "n_queries", "dim"), MANY)
        ],
        # rows are counted in 32 bits
        "largest": [{"numbers_ptr": fp32, "places_ptr": int32, "n": 77, "k": 7}],
        "listed_keys": [
            {"places_ptr": int32, "groups_ptr": int32, "logits_ptr": fp32, "keys_ptr": int32}
            | dict.fromkeys(("n", "k", "n_groups", "group_size"), MANY)
        ],
        "first_centroids": [
            {"codes_ptr": int64, "initial_ptr": int32, "centroids_ptr": int32, "ranks_ptr": int32}
            | dict.fromkeys(("n", "n_clusters", "length"), MANY)
        ],
        "sort_by_cluster": [
            {"clusters_ptr": int32, "order_ptr": int32, "offsets_ptr": int32, "length": 77, "n_clusters": 7}
        ],
    }
    return [Launch(KERNELS[name], (1,), args, CONFIG) for args in given[name]]
