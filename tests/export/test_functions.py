"""The bodies of our ONNX functions, one by one, against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from fastattn.reference import block_attention as block_reference
from fastattn.reference import smyrf as smyrf_reference

FLOAT = torch.float32


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_blocks(batch, heads, rounds, n_blocks, size, n, seed):
    """In each round a random part of the rows, each once, in random slots; -1 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    slots = n_blocks * size
    blocks = torch.full((batch, heads, rounds, slots), -1, dtype=torch.int32)
    for index in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(rounds)).tolist():
        rows = torch.randperm(n, generator=generator)[: min(n, slots) - 2]
        blocks[tuple(index)][torch.randperm(slots, generator=generator)[: len(rows)]] = rows.int()
    return blocks.unflatten(-1, (n_blocks, size))


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "s", "dim", "value_dim"),
    [(2, 4, 4, 61, 61, 16, 16), (2, 4, 2, 61, 45, 8, 24), (1, 3, 1, 33, 70, 40, 5)],
)
def test_block_attention_agrees_on_given_blocks(run_node, batch, heads, kv_heads, n, s, dim, value_dim):
    q, k, v = (
        randn(batch, heads, n, dim),
        randn(batch, kv_heads, s, dim, seed=1),
        randn(batch, kv_heads, s, value_dim, seed=2),
    )
    q_index = random_blocks(batch, heads, 3, 5, 13, n, seed=3)
    k_index = random_blocks(batch, heads, 3, 5, 9, s, seed=4)
    k_index[:, :, :, 2] = -1  # a block without a key
    inputs = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    out, lse = run_node("BlockAttention", inputs, {"out": (FLOAT, 4), "lse": (FLOAT, 3)}, scale=0.3)
    wanted, wanted_lse = block_reference.block_attention(q, k, v, q_index, k_index, scale=0.3)
    assert_close(out, wanted, atol=2e-6, rtol=2e-6)
    assert_close(lse, wanted_lse, atol=2e-6, rtol=2e-6)


def test_a_row_that_meets_no_key_is_zero_and_padding_reads_nothing(run_node):
    q, k, v = randn(1, 1, 6, 4), randn(1, 1, 6, 4, seed=1), randn(1, 1, 6, 4, seed=2)
    # row 0 of each stands in no block, row 5 of q in a block without keys
    for x in (q, k, v):
        x[:, :, 0] = float("nan")
    q_index = torch.tensor([[1, 2, -1], [5, -1, -1]], dtype=torch.int32)[None, None, None]
    k_index = torch.tensor([[1, 2, 3, -1], [-1, -1, -1, -1]], dtype=torch.int32)[None, None, None]
    inputs = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    out, lse = run_node("BlockAttention", inputs, {"out": (FLOAT, 4), "lse": (FLOAT, 3)}, scale=1.0)
    met = torch.tensor([False, True, True, False, False, False])
    assert (out[0, 0, ~met] == 0).all() and (lse[0, 0, ~met] == -torch.inf).all()
    wanted = torch.softmax(q[0, 0, 1:3] @ k[0, 0, 1:4].mT, -1) @ v[0, 0, 1:4]
    assert_close(out[0, 0, met], wanted)


def blocks_by_hand(hashes, mask, n_blocks, size, packed):
    """One row of hashes, in plain Python; sorted() is stable."""
    rows = sorted((i for i in range(len(hashes)) if mask[i]), key=lambda i: hashes[i])
    blocks = []
    for c in range(n_blocks):
        first, last = (
            (c * size, (c + 1) * size) if packed else (c * len(rows) // n_blocks, (c + 1) * len(rows) // n_blocks)
        )
        block = rows[first:last]
        blocks.append(block + [-1] * (size - len(block)))
    return blocks


@pytest.mark.parametrize("packed", [1, 0])
@pytest.mark.parametrize(("n", "n_blocks", "size"), [(40, 5, 8), (37, 5, 8), (3, 3, 1), (5, 1, 64), (1, 1, 1)])
def test_rows_are_cut_into_blocks_by_a_stable_sort(run_node, n, n_blocks, size, packed):
    # few different hashes: nearly everything is a tie, zeros of both signs among them
    hashes = torch.randint(-2, 3, (2, 3, 2, n), generator=torch.Generator().manual_seed(n)) * randn(1).abs()
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n + 1)) > 0.3
    mask[1] = True
    inputs = {"hashes": hashes, "mask": mask, "n_blocks": torch.tensor([n_blocks]), "block_size": torch.tensor([size])}
    (blocks,) = run_node("SortedBlocks", inputs, {"blocks": (torch.int32, 5)}, packed=packed)
    for b in range(2):
        for h in range(3):
            for r in range(2):
                wanted = blocks_by_hand(hashes[b, h, r].tolist(), mask[b].tolist(), n_blocks, size, packed)
                assert blocks[b, h, r].tolist() == wanted


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_hashes_are_those_of_the_rows_that_take_part(run_node, heads, kv_heads):
    q, k, projections = randn(2, heads, 31, 8), randn(2, kv_heads, 23, 8, seed=1), randn(10, 3, seed=2)
    query_mask, key_mask = torch.rand(2, 31) > 0.3, torch.rand(2, 23) > 0.3
    q.masked_fill_(~query_mask[:, None, :, None], 1e3)  # large rows that take no part must not set the radius
    k.masked_fill_(~key_mask[:, None, :, None], float("nan"))
    inputs = {"q": q, "k": k, "projections": projections, "query_mask": query_mask, "key_mask": key_mask}
    q_hash, k_hash = run_node("SmyrfHash", inputs, {"q_hash": (FLOAT, 4), "k_hash": (FLOAT, 4)})
    for b in range(2):
        for h in range(heads):
            real_q, real_k = q[b, h, query_mask[b]], k[b, h * kv_heads // heads, key_mask[b]]
            wanted_q, wanted_k = smyrf_reference.hashes(real_q.double(), real_k.double(), projections.double())
            assert_close(q_hash[b, h][:, query_mask[b]].mT.double(), wanted_q, atol=1e-5, rtol=1e-5)
            assert_close(k_hash[b, h][:, key_mask[b]].mT.double(), wanted_k, atol=1e-5, rtol=1e-5)


CASES = {
    "self": {"n": 100, "s": 100},
    "self-masked": {"n": 100, "s": 100, "masked": True},
    "self-shorter-than-a-cluster": {"n": 7, "s": 7},
    "self-one-token": {"n": 1, "s": 1},
    "grouped-queries": {"n": 77, "s": 77, "kv_heads": 2, "masked": True},
    "cross": {"n": 90, "s": 57},
    "cross-masked": {"n": 90, "s": 57, "masked": True},
    "cross-few-keys": {"n": 90, "s": 3},
    "cross-given-key-clusters": {"n": 64, "s": 32, "k_cluster_size": 8},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_smyrf_attention_agrees_with_its_definition(run_node, case):
    n, s, kv_heads, k_cluster_size = case["n"], case["s"], case.get("kv_heads", 4), case.get("k_cluster_size")
    q, k, v, projections = (
        randn(2, 4, n, 16),
        randn(2, kv_heads, s, 16, seed=1),
        randn(2, kv_heads, s, 8, seed=2),
        randn(18, 3),
    )
    generator = torch.Generator().manual_seed(3)
    key_mask = torch.rand(2, s, generator=generator) > 0.3 if "masked" in case else None
    query_mask = torch.rand(2, n, generator=generator) > 0.3 if "masked" in case and n != s else None
    wanted, wanted_lse = smyrf_reference.smyrf_attention(
        q,
        k,
        v,
        projections,
        q_cluster_size=16,
        k_cluster_size=k_cluster_size,
        key_mask=key_mask,
        query_mask=query_mask,
        scale=0.25,
    )
    everyone = torch.ones(1, 1, dtype=torch.bool)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "projections": projections,
        "key_mask": everyone if key_mask is None else key_mask,
        "query_mask": query_mask
        if query_mask is not None
        else key_mask
        if n == s and key_mask is not None
        else everyone,
    }
    out, lse = run_node(
        "SmyrfAttention",
        inputs,
        {"out": (FLOAT, 4), "lse": (FLOAT, 3)},
        q_cluster_size=16,
        k_cluster_size=k_cluster_size or 0,
        scale=0.25,
        packed=int(n == s),
    )
    taking_part = inputs["query_mask"].expand(2, n)[:, None].expand(2, 4, n)
    assert (out[~taking_part] == 0).all() and (lse[~taking_part] == -torch.inf).all()
    # Two tokens whose hashes differ in the last bit only may swap across a cluster's edge, and then all rows of these
    # two clusters differ. That is rare (never seen at these lengths) and can't be excluded: one such pair is allowed.
    off = ((out - wanted).abs().amax(-1) > 1e-5) & taking_part
    assert off.sum() <= 2 * 16
    assert_close(lse[taking_part & ~off], wanted_lse[taking_part & ~off].float(), atol=1e-5, rtol=1e-5)
