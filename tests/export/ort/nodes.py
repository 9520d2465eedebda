"""Single nodes of our domain, run by the library's kernels alone: the models have no function bodies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from fastattn.export.ort import needs
from fastattn.export.ort.library import build_library
from fastattn.export.ort.needs import Call
from fastattn.kernels import centroid_attention, hamming, linear_attention, linear_attention_step, topk_attention
from fastattn.ops.block_attention import block_attention
from fastattn.ops.cluster_attention import cluster_sums
from fastattn.ops.cluster_members import members
from fastattn.ops.hash_argmax import hash_argmax
from fastattn.ops.hash_bits import hash_bits
from fastattn.ops.smyrf_hash import smyrf_hash
from fastattn.reference.block_attention import fold_key_mask
from tests.export.element_types import TYPES

DIM, VALUE_DIM, CLUSTERS, TOP_K, FACTORS = 20, 12, 7, 5, (8, 4)
DIMS_OF_HASHES = (16, 83)  # beside DIM, of what SMYRF hashes


@dataclass(frozen=True)
class Node:
    """inputs: by name. outputs: their types by name. expected: what torch's op makes of the inputs."""

    op: str
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, torch.dtype]
    attributes: Mapping[str, Any]
    expected: tuple[Tensor, ...] = ()

    def call(self) -> Call:
        first = next(iter(self.inputs.values()))
        dtype = first.dtype if first.is_floating_point() else torch.float32
        options = {"n_clusters": CLUSTERS, "topk": TOP_K, "local_window": self.attributes.get("across_buckets", 0)}
        return Call(self.op, dtype, DIM, VALUE_DIM, dtype, options | dict(self.attributes))

    def model(self) -> bytes:
        graph = helper.make_graph(
            [helper.make_node(self.op, list(self.inputs), list(self.outputs), domain="fastattn", **self.attributes)],
            "node",
            [helper.make_tensor_value_info(n, TYPES[x.dtype], [None] * x.ndim) for n, x in self.inputs.items()],
            [helper.make_tensor_value_info(n, TYPES[dtype], None) for n, dtype in self.outputs.items()],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastattn", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()

    def session(self, library: Path) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are looked for, not read
        options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(self.model(), options, providers=["CPUExecutionProvider"])

    def run(self, library: Path) -> list[Tensor]:
        return run(self.session(library), self.inputs)


def run(session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    given = {name: x.contiguous().numpy() for name, x in inputs.items()}
    return [torch.from_numpy(np.asarray(x)) for x in session.run(None, given)]


@cache
def library() -> Path:
    """One with what all of :func:`nodes` run."""
    hashes = [Call("SmyrfHash", dtype, dim) for dtype in (torch.float32, torch.float16) for dim in DIMS_OF_HASHES]
    return build_library(needs.variants([*(node.call() for node in nodes()), *hashes]))


def nodes() -> Iterator[Node]:
    """A node of each op with kernels, and with each type where kernels know it: grouped heads, odd lengths, masks."""
    for dtype in (torch.float32, torch.float16):
        yield from _attention(dtype)
        yield smyrf_hash_node(dtype, 133, 77)
        if dtype == torch.float32:  # the others' types meet the same code
            yield from _hashes_and_clusters(dtype)


def _attention(dtype: torch.dtype) -> Iterator[Node]:
    g = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, n = 2, 4, 2, 133

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    q, k = normal(batch, heads, n, DIM), normal(batch, kv_heads, n, DIM)
    v = normal(batch, kv_heads, n, VALUE_DIM)
    q_index, k_index = (_partition((batch, heads, 3), n, 5, 31, g) for _ in "qk")
    given = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    outputs = {"out": dtype, "lse": torch.float32}
    yield Node("BlockAttention", given, outputs, {"scale": 0.3}, block_attention(*given.values(), scale=0.3))

    if dtype == torch.float32:
        yield from _options(given, g)
    key_mask = torch.rand(batch, n, generator=g) > 0.2
    outputs = {"out": dtype, "den": torch.float32, "state": torch.float32}
    for is_causal in (0, 1):
        given = {"q": q, "k": k, "v": v, "key_mask": key_mask, "initial": torch.zeros(1, 1, 1)}
        attributes = {"feature_map": 0, "is_causal": is_causal, "eps": 1e-6}
        expected = linear_attention.forward(q, k, v, key_mask, None, "elu", bool(is_causal), 1e-6)
        yield Node("LinearAttention", given, outputs, attributes, expected)


def _options(given: dict[str, Tensor], g: torch.Generator) -> Iterator[Node]:
    """Block attention as causal SMYRF and as Reformer have it."""
    rows, n = given["q_index"].shape[:3], given["q"].shape[2]
    local = _partition((*rows[:2], 1), n, 17, 8, g)
    n_used = torch.tensor([5, 4], dtype=torch.int32)
    cut = {name: given[name].clone() for name in ("q_index", "k_index")}
    for index in cut.values():
        index[1, :, :, 4:] = -1
    buckets = torch.randint(2, (*rows, n), generator=g, dtype=torch.int32)
    mask, nowhere = torch.rand(rows[0], n, generator=g) > 0.2, torch.full((1, 1, 1, 1, 1), -1, dtype=torch.int32)
    outputs = {"out": torch.float32, "lse": torch.float32}
    no_bucket = torch.zeros(1, 1, 1, 1, dtype=torch.int32)

    smyrf = {"self_mode": "once", "is_causal": True, "correct_duplicates": True}
    expected = block_attention(*given.values(), **smyrf, scale=0.3, local_index=(local, local))
    inputs = {**given, "local_q_index": local, "local_k_index": local, "q_bucket": no_bucket, "k_bucket": no_bucket}
    inputs |= {"n_used_blocks": torch.tensor([5], dtype=torch.int32), "own_mask": torch.ones(1, 1, dtype=torch.bool)}
    attributes = {"scale": 0.3, "look_back": 0, "look_ahead": 0, "wrap": 1, "is_causal": 1, "self_mode": 3}
    attributes |= {"across_buckets": 1, "correct_duplicates": 1}
    yield Node("BlockAttentionWithOptions", inputs, outputs, attributes, expected)

    cut["k_index"] = fold_key_mask(cut["k_index"], mask)
    given = given | cut
    named = {"q_bucket": buckets, "k_bucket": buckets, "n_used_blocks": n_used, "key_mask": mask}
    expected = block_attention(*given.values(), scale=0.3, look_back=1, wrap=False, self_mode="last_resort", **named)
    inputs = {**given, "local_q_index": nowhere, "local_k_index": nowhere, "q_bucket": buckets, "k_bucket": buckets}
    inputs |= {"n_used_blocks": n_used, "own_mask": mask}
    attributes = {"scale": 0.3, "look_back": 1, "look_ahead": 0, "wrap": 0, "is_causal": 0, "self_mode": 2}
    attributes |= {"across_buckets": 0, "correct_duplicates": 0}
    yield Node("BlockAttentionWithOptions", inputs, outputs, attributes, expected)


def _hashes_and_clusters(dtype: torch.dtype) -> Iterator[Node]:
    g = torch.Generator().manual_seed(1)
    batch, heads, kv_heads, n = 2, 4, 2, 1500  # more than a chunk of rows that are summed apart
    rows = (batch, heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    x, k, v = normal(*rows, n, DIM), normal(batch, kv_heads, n, DIM), normal(batch, kv_heads, n, VALUE_DIM)
    key_mask = torch.rand(batch, n, generator=g) > 0.2
    rotations = normal(heads, DIM, 3, sum(FACTORS) // 2)
    given: dict[str, Tensor] = {"x": x, "rotations": rotations}
    expected = hash_argmax(x, rotations, FACTORS)
    yield Node("HashArgmax", given, {"buckets": torch.int32}, {"factors": FACTORS}, (expected,))

    planes = normal(31, DIM + 1)
    codes = hash_bits(x, planes)
    yield Node("HashBits", {"x": x, "planes": planes}, {"codes": torch.int64}, {}, (codes,))

    seed = torch.tensor(5)
    initial = torch.stack([torch.randperm(n, generator=g)[:CLUSTERS] for _ in range(batch * heads)])
    initial = initial.view(*rows, CLUSTERS).int()
    initial[0, 0, 3] = -1
    clusters = hamming.kmeans(codes, initial, key_mask, seed, 31, 4)
    given = {"codes": codes, "initial": initial, "mask": key_mask, "seed": seed}
    attributes: dict[str, Any] = {"n_bits": 31, "n_iterations": 4}
    yield Node("HammingKmeans", given, {"clusters": torch.int32}, attributes, (clusters,))

    given, outputs = {"x": x, "clusters": clusters}, {"sums": torch.float32, "counts": torch.int32}
    expected = cluster_sums(x, clusters, CLUSTERS)
    yield Node("ClusterSums", given, outputs, {"n_clusters": CLUSTERS}, expected)

    means = normal(*rows, CLUSTERS, DIM)
    attributes = {"top_k": TOP_K, "scale": 0.3}
    given = {"q": means, "k": k, "v": v, "key_mask": key_mask}
    outputs = {"out": torch.float32, "lse": torch.float32, "topk_index": torch.int32}
    expected = centroid_attention.forward(means, k, v, key_mask, seed, TOP_K, 0.3)
    yield Node("CentroidAttention", given, outputs, attributes, expected)
    lists = expected[2]

    given = {"q": means, "k": k, "key_mask": torch.ones(1, 1, dtype=torch.bool)}
    expected = centroid_attention.forward(means, k, None, None, seed, TOP_K, 0.3)[2:]
    yield Node("TopkKeys", given, {"topk_index": torch.int32}, attributes, expected)

    mass, rest = torch.rand(*rows, CLUSTERS, generator=g), normal(*rows, CLUSTERS, VALUE_DIM)
    given = {"q": x, "k": k, "v": v, "clusters": clusters, "topk_index": lists, "mass": mass, "rest": rest}
    order = members(clusters, CLUSTERS)
    expected = topk_attention.forward(x, k, v, *order, lists, mass, rest, seed, True, 0.3)
    outputs, attributes = {"out": dtype, "lse": torch.float32}, {"is_causal": 1, "scale": 0.3}
    yield Node("TopkAttention", given, outputs, attributes, expected)

    one = {"q": x[:, :, :1], "k": k[:, :, :1], "v": v[:, :, :1]}
    s, z = normal(*rows, DIM, VALUE_DIM), torch.rand(*rows, DIM, generator=g)
    outputs = {"out": dtype, "new_s": torch.float32, "new_z": torch.float32}
    expected = linear_attention_step.forward(*one.values(), s, z, "elu", 1e-6)
    yield Node("LinearAttentionStep", {**one, "s": s, "z": z}, outputs, {"feature_map": 0, "eps": 1e-6}, expected)


def smyrf_hash_node(dtype: torch.dtype, n: int, s: int, dim: int = DIM) -> Node:
    g = torch.Generator().manual_seed(n)
    given = {
        "q": torch.randn(2, 4, n, dim, generator=g).to(dtype),
        "k": torch.randn(2, 2, s, dim, generator=g).to(dtype),
    }
    given["projections"] = torch.randn(dim + 2, 5, generator=g)
    masks = {"query_mask": torch.rand(2, n, generator=g) > 0.2, "key_mask": torch.rand(2, s, generator=g) > 0.2}
    expected = smyrf_hash(*given.values(), **masks)
    return Node("SmyrfHash", given | masks, {"q_hash": torch.float32, "k_hash": torch.float32}, {}, expected)


def _partition(lead: tuple[int, ...], n: int, n_blocks: int, size: int, g: torch.Generator) -> Tensor:
    """Each of n rows in one of the blocks, (..., n_blocks, size) int32."""
    index = torch.full((*lead, n_blocks * size), -1, dtype=torch.int32)
    for at in index.view(-1, n_blocks * size):
        at[torch.randperm(len(at), generator=g)[:n]] = torch.randperm(n, generator=g).int()
    return index.view(*lead, n_blocks, size)


NODE_OF_HASHES = next(node for node in nodes() if node.op == "HashArgmax")
