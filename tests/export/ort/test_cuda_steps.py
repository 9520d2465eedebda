"""What a GPU does within an op is what the CPU's loops and PyTorch do there; the same kernels, run without a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from fastattn.export.ort import cuda_steps
from fastattn.kernels.launch import Launch, run
from fastattn.ops.cluster_members import members

BLOCK = cuda_steps.CONFIG.blocks["BLOCK"]
FP32, INT32 = torch.float32, torch.int32


def launch(name: str, programs: int, **args: Any) -> None:
    run([Launch(cuda_steps.KERNELS[name], (programs,), args, cuda_steps.CONFIG)])


def over(name: str, n: int, **args: Any) -> None:
    launch(name, triton.cdiv(n, BLOCK), n=n, **args)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [FP32, INT32])
def test_parts_are_summed_in_their_order_without_what_stands_behind_them(dtype: torch.dtype) -> None:
    rows, n_parts, size = 3, 5, 701
    parts = (100 * normal(rows, n_parts, size + 9)).to(dtype)
    total = torch.full((rows * size + 1,), 7, dtype=dtype)
    over("sum_parts", rows * size, parts_ptr=parts, total_ptr=total, n_parts=n_parts, size=size, part_size=size + 9)
    wanted = torch.zeros(rows, size, dtype=dtype)
    for part in range(n_parts):
        wanted += parts[:, part, :size]
    assert torch.equal(total[:-1].view(rows, size), wanted) and total[-1] == 7


def test_folded_parts_are_one_softmax() -> None:
    rows, n_parts, n_queries, dim = 2, 3, 19, 29
    outs, lses = normal(rows, n_parts, n_queries, dim), 9 * normal(rows, n_parts, n_queries)
    lses[0, 1], lses[1, :, 4] = -math.inf, -math.inf  # a part without keys, a query without any
    outs[lses == -math.inf] = 0
    lses[1, 2, 5] = math.nan
    out, lse = torch.full((rows * n_queries * dim + 1,), 7.0), torch.full((rows * n_queries + 1,), 7.0)
    sizes = {"n_parts": n_parts, "n_queries": n_queries, "dim": dim}
    over("fold", rows * n_queries * dim, outs_ptr=outs, lses_ptr=lses, out_ptr=out, lse_ptr=lse, **sizes)
    folded = torch.logsumexp(lses, 1)
    weights = torch.exp(lses - folded.masked_fill(folded == -math.inf, 0.0).unsqueeze(1))  # [rows, n_parts, n_queries]
    wanted = (outs * weights.unsqueeze(3)).sum(1)
    torch.testing.assert_close(out[:-1].view(wanted.shape), wanted, equal_nan=True)
    torch.testing.assert_close(lse[:-1].view(folded.shape), folded, equal_nan=True)
    assert (lse[n_queries + 4], out[-1], lse[-1]) == (-math.inf, 7, 7)


def largest(numbers: Tensor, k: int) -> Tensor:
    rows, n = numbers.shape
    places = torch.full((rows * k + 1,), 7, dtype=INT32)
    launch("largest", rows, numbers_ptr=numbers, places_ptr=places, n=n, k=k)
    assert places[-1] == 7
    return places[:-1].view(rows, k)


def of_equals_the_first(numbers: Tensor, k: int) -> Tensor:
    numbers = numbers.nan_to_num(-math.inf, math.inf, -math.inf)
    return numbers.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values.int()


@pytest.mark.parametrize("n, k", [(2 * BLOCK + 77, 33), (BLOCK, BLOCK), (5, 1), (5, 5), (BLOCK + 1, BLOCK)])
def test_the_largest_are_those_of_a_stable_sort(n: int, k: int) -> None:
    numbers = normal(4, n) * 3
    numbers[1] = numbers[1].round()  # many equal ones, and zeros of both signs
    numbers[2] = math.nan
    numbers[2, ::3], numbers[2, ::5], numbers[2, 1::7] = -math.inf, math.inf, -1e-42
    numbers[3] = -math.inf
    assert torch.equal(largest(numbers, k), of_equals_the_first(numbers, k))


def test_a_place_among_logits_of_groups_is_a_key() -> None:
    queries, k, n_groups, size = 3, 700, 50, 16
    g = torch.Generator().manual_seed(0)
    groups = torch.stack([torch.randperm(900, generator=g)[:n_groups] for _ in range(queries)]).int()
    places = torch.stack([torch.randperm(n_groups * size, generator=g)[:k] for _ in range(queries)]).int()
    logits = normal(queries, n_groups * size)
    logits[:, ::3], logits[:, ::5] = -math.inf, math.nan
    keys = torch.full((queries * k + 1,), 7, dtype=INT32)
    tensors = {"places_ptr": places, "groups_ptr": groups, "logits_ptr": logits, "keys_ptr": keys}
    over("listed_keys", queries * k, **tensors, k=k, n_groups=n_groups, group_size=size)
    all_keys = (groups.unsqueeze(2) * size + torch.arange(size, dtype=INT32)).flatten(1)
    all_keys = torch.where(logits > -math.inf, all_keys, -1)
    assert torch.equal(keys[:-1].view(queries, k), all_keys.gather(1, places.long())) and keys[-1] == 7


def test_first_centroids_are_the_codes_of_rows_that_exist() -> None:
    rows, length, n_clusters = 5, 77, 300
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**63), 2**63 - 1, (rows, length), generator=g)
    initial = torch.randint(0, length, (rows, n_clusters), generator=g, dtype=INT32)
    wrong = torch.tensor([-1, length, 2**31 - 1, -(2**31)], dtype=INT32)
    initial[:, ::7] = wrong[torch.arange(rows) % 4].unsqueeze(1)
    centroids = torch.full((rows * 2 * n_clusters + 1,), 7, dtype=INT32)
    ranks = torch.full((rows * n_clusters + 1,), 7, dtype=INT32)
    tensors = {"codes_ptr": codes, "initial_ptr": initial, "centroids_ptr": centroids, "ranks_ptr": ranks}
    over("first_centroids", rows * n_clusters, **tensors, n_clusters=n_clusters, length=length)
    exists = (initial >= 0) & (initial < length)
    assert 0 < exists.sum() < exists.numel()
    wanted = torch.arange(n_clusters, dtype=INT32) + torch.where(exists, 0, 127 << 24)
    assert torch.equal(ranks[:-1].view(rows, n_clusters), wanted) and ranks[-1] == 7
    low, high = centroids[:-1].view(rows, 2, n_clusters).long().unbind(1)
    code = (high << 32) | (low & 0xFFFFFFFF)
    assert torch.equal(code[exists], codes.gather(1, initial.clamp(0, length - 1).long())[exists])
    assert centroids[-1] == 7


@pytest.mark.parametrize("n, n_clusters", [(2 * BLOCK + 77, 13), (BLOCK, 1), (3, 40)])
def test_rows_are_sorted_by_cluster_as_torch_sorts_them(n: int, n_clusters: int) -> None:
    heads = 4
    clusters = torch.randint(-1, n_clusters, (1, heads, n), generator=torch.Generator().manual_seed(0), dtype=INT32)
    clusters[0, 1], clusters[0, 2] = -1, n_clusters - 1  # none at all, and all in one
    order = torch.full((heads * n + 1,), 7, dtype=INT32)
    offsets = torch.full((heads * (n_clusters + 1) + 1,), 7, dtype=INT32)
    tensors = {"clusters_ptr": clusters, "order_ptr": order, "offsets_ptr": offsets}
    launch("sort_by_cluster", heads * (n_clusters + 1), **tensors, length=n, n_clusters=n_clusters)
    wanted = members(clusters, n_clusters)
    assert torch.equal(order[:-1].view(1, heads, n), wanted[0]) and order[-1] == 7
    assert torch.equal(offsets[:-1].view(1, heads, n_clusters + 1), wanted[1]) and offsets[-1] == 7


def test_every_kernel_has_an_example() -> None:
    for name in cuda_steps.KERNELS:
        assert all(example.kernel is cuda_steps.KERNELS[name] for example in cuda_steps.examples(name))
