"""The body of BlockAttention in ONNX Runtime, against the definition."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch.testing import assert_close

import fastattn.ops.block_attention
from fastattn.export import check, to_onnx
from fastattn.reference.block_attention import block_attention

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
    wanted, wanted_lse = block_attention(q, k, v, q_index, k_index, scale=0.3)
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


def test_half_inputs_are_summed_in_fp32(run_node):
    q, k, v = (randn(2, 4, 61, 16, seed=seed).half() for seed in range(3))
    indices = random_blocks(2, 4, 3, 5, 13, 61, seed=3), random_blocks(2, 4, 3, 5, 9, 61, seed=4)
    inputs = dict(zip(("q", "k", "v", "q_index", "k_index"), (q, k, v, *indices), strict=True))
    out, lse = run_node("BlockAttention", inputs, {"out": (torch.float16, 4), "lse": (FLOAT, 3)}, scale=0.3)
    wanted, wanted_lse = block_attention(q.float(), k.float(), v.float(), *indices, scale=0.3)
    assert_close(out.float(), wanted, atol=5e-4, rtol=5e-4)  # the rounding of out alone
    assert_close(lse, wanted_lse, atol=2e-6, rtol=2e-6)


class Attend(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, q_index, k_index):
        return fastattn.ops.block_attention.block_attention(q, k, v, q_index, k_index, **self.options)[0]


@pytest.mark.parametrize(
    ("options", "op"),
    [({}, "BlockAttention"), ({"look_back": 1, "self_mode": "last_resort"}, "BlockAttentionWithOptions")],
    ids=["plain", "options"],
)
def test_the_torch_op_becomes_a_node(tmp_path, options, op):
    q, k, v = (randn(2, 2, 40, 8, seed=seed) for seed in range(3))
    index = random_blocks(2, 2, 3, 5, 9, 40, seed=3)
    sample = {"q": q, "k": k, "v": v, "q_index": index, "k_index": index}
    path = to_onnx(Attend(**options).eval(), sample, tmp_path / "model.onnx", dynamic_shapes={})
    assert [node.op_type for node in onnx.load(path).graph.node if node.domain == "fastattn"] == [op]
    assert check(Attend(**options).eval(), path, sample, tolerance=1e-6).ok


def test_dropout_is_refused_by_name(tmp_path):
    q, index = randn(2, 2, 40, 8), random_blocks(2, 2, 3, 5, 9, 40, seed=3)
    sample = {"q": q, "k": q.clone(), "v": q.clone(), "q_index": index, "k_index": index.clone()}
    with pytest.raises(ValueError, match=r"can't be exported to ONNX with dropout_p=0\.5"):
        to_onnx(Attend(dropout_p=0.5).eval(), sample, tmp_path / "model.onnx", dynamic_shapes={})
