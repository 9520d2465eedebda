"""ClusteredAttention in ONNX Runtime: the body of the node against torch, and whole calls of the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.export import check, to_onnx
from fastattn.reference.clustered import clustered_attention as definition
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
FREE = torch.export.Dim.DYNAMIC
ALL = torch.ones(1, 1, dtype=torch.bool)
C = 7


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, n: int = 41, s: int | None = None, dtype: Any = torch.float32
) -> tuple[Tensor, ...]:
    """q of few values, so that torch and ONNX Runtime hash alike whatever the order of their sums."""
    g = torch.Generator().manual_seed(n)
    q = torch.randint(-4, 5, (batch, heads, n, 8), generator=g) / 4
    k, v = (torch.randn(batch, kv_heads, s or n, width, generator=g) for width in (8, 5))
    return tuple(x.to(dtype) for x in (q, k, v))


def planes(n_bits: int = 20) -> Tensor:
    return torch.randint(-4, 5, (n_bits, 9), generator=torch.Generator().manual_seed(0)) / 4


def some_rows(length: int, seed: int = 0) -> Tensor:
    return torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.6


CASES: dict[str, dict[str, Any]] = {
    "odd": {},
    "fp16": {"dtype": torch.float16},
    "one key head": {"kv_heads": 1},
    "fewer queries than clusters": {"n": 3},
    "one query": {"n": 1},
    "cross": {"n": 30, "s": 50},
    "masked": {"masked": True},
    "masked, fp16": {"masked": True, "dtype": torch.float16},
    "masked, cross": {"masked": True, "n": 30, "s": 50},
    "first centroids for all heads": {"initial": True},
    "first centroids, masked": {"initial": True, "masked": True},
}


@pytest.mark.parametrize("name", CASES)
def test_is_what_torch_computes(run_node: RunNode, name: str) -> None:
    case = dict(CASES[name])
    masked, with_initial = case.pop("masked", False), case.pop("initial", False)
    q, k, v = inputs(**case)
    n, s = q.shape[2], k.shape[2]
    key_mask = some_rows(s) if masked else None
    query_mask = some_rows(n, 1) if masked else None
    if key_mask is not None and query_mask is not None:
        key_mask[1] = False  # one example has no key at all
        q = q.masked_fill(~query_mask[:, None, :, None], float("nan"))
        k, v = (x.masked_fill(~key_mask[:, None, :, None], float("nan")) for x in (k, v))
    initial = torch.arange(C, dtype=torch.int32) * 5
    seed = torch.tensor(2**61 + 7)
    tensors = {"q": q, "k": k, "v": v, "planes": planes(), "initial": initial.view(1, 1, C), "seed": seed}
    tensors |= {"key_mask": ALL if key_mask is None else key_mask}
    tensors |= {"query_mask": ALL if query_mask is None else query_mask}
    clustering = {"n_clusters": C, "n_bits": 20, "n_iterations": 5}
    knobs = {**clustering, "draws_initial": int(not with_initial), "scale": 0.3}
    (out,) = run_node("ClusteredAttention", tensors, {"out": (q.dtype, 4)}, **knobs)

    given = fastattn.methods.clustered.Clustering(planes(), initial if with_initial else None, seed, None)
    clusters = fastattn.methods.clustered.find_clusters(q, *given, query_mask, **clustering, impl="reference")
    plain, exact = (
        definition(*(x.to(dtype) for x in (q, k, v)), clusters, C, key_mask=key_mask, scale=0.3)
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_accurate(out, plain.to(out.dtype), exact)
    if masked:
        assert not out[1].any()


def test_of_given_clusters_only_the_attention_is_left(run_node: RunNode) -> None:
    q, k, v = inputs()
    clusters = torch.randint(-1, C, q.shape[:3], generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    tensors = {"q": q, "k": k, "v": v, "clusters": clusters, "key_mask": ALL}
    (out,) = run_node("AttendClusters", tensors, {"out": (torch.float32, 4)}, n_clusters=C, scale=0.3)
    plain, exact = (definition(*x, clusters, C, scale=0.3) for x in ((q, k, v), (q.double(), k.double(), v.double())))
    assert_as_accurate(out, plain, exact)


class Attend(torch.nn.Module):
    def __init__(self, method: Any, **knobs: Any) -> None:
        super().__init__()
        self.method, self.knobs = method, {"n_clusters": C, "n_bits": 20, **knobs}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, query_mask: Tensor | None = None,
        clusters: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        masks = {"key_mask": key_mask, "query_mask": query_mask}
        return self.method(q, k, v, **self.knobs, **masks, clusters=clusters)


def exported(module: torch.nn.Module, folder: Path, **sample: Tensor) -> tuple[list[str], Callable[..., Tensor]]:
    """Our nodes in the file, whose batch and lengths are free, and one session of it."""
    of_rows = {0: FREE, 1: FREE}
    shapes = {name: of_rows if "mask" in name else {0: FREE, 2: FREE} for name in sample}
    path = to_onnx(module.eval(), sample, folder / "model.onnx", dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(**values: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in values.items()})[0])

    return [node.op_type for node in onnx.load(path).graph.node if node.domain == "fastattn"], run


def named(x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip("qkv", x, strict=True))


def test_a_call_is_one_node_that_takes_any_batch_and_length(tmp_path: Path) -> None:
    """What the method draws is drawn once, at export, and is a weight of the file from then on."""
    g = torch.Generator().manual_seed(4)
    module = Attend(fastattn.clustered_attention, planes=planes(), generator=g, impl="reference")
    nodes, run = exported(module, tmp_path, **named(inputs()), key_mask=torch.ones(2, 41, dtype=torch.bool))
    assert nodes == ["ClusteredAttention"]
    for batch, n in ((1, 1), (2, 41), (3, 5), (1, 300)):
        x, mask = inputs(batch, n=n), torch.arange(n).expand(batch, -1) % 4 != 1
        g.manual_seed(4)
        expected = module(*x, key_mask=mask)
        torch.testing.assert_close(run(**named(x), key_mask=mask), expected, rtol=1e-5, atol=2e-6)


def test_first_centroids_that_a_shorter_sequence_does_not_have_are_left_out(tmp_path: Path) -> None:
    first = torch.arange(C) * 6
    knobs: dict[str, Any] = {"planes": planes(), "generator": torch.Generator().manual_seed(0), "impl": "reference"}
    nodes, run = exported(
        Attend(fastattn.clustered_attention, initial_centroids=first, **knobs), tmp_path, **named(inputs())
    )
    assert nodes == ["ClusteredAttention"]
    for n in (41, 20):
        knobs["generator"].manual_seed(0)
        there = torch.where(first < n, first, -1)
        expected = Attend(fastattn.clustered_attention, initial_centroids=there, **knobs)(*inputs(n=n))
        torch.testing.assert_close(run(**named(inputs(n=n))), expected, rtol=1e-5, atol=2e-6)


def test_given_clusters_are_inputs(tmp_path: Path) -> None:
    def some(batch: int, n: int) -> Tensor:
        return torch.randint(-1, C, (batch, 4, n), generator=torch.Generator().manual_seed(n))

    module, mask = Attend(fastattn.clustered_attention, impl="reference"), torch.ones(2, 41, dtype=torch.bool)
    nodes, run = exported(module, tmp_path, **named(inputs()), query_mask=mask, clusters=some(2, 41))
    assert nodes == ["AttendClusters"]
    x = {**named(inputs(3, n=20)), "query_mask": torch.arange(20).expand(3, -1) % 3 != 0, "clusters": some(3, 20)}
    torch.testing.assert_close(run(**x), module(**x), rtol=1e-5, atol=2e-6)


def test_what_no_node_stands_for_is_refused_by_name(tmp_path: Path) -> None:
    path, free = tmp_path / "model.onnx", {0: FREE, 2: FREE}
    with pytest.raises(ValueError, match=r"clustered_attention can't be exported to ONNX with dropout_p=0\.1"):
        to_onnx(Attend(fastattn.clustered_attention, dropout_p=0.1).eval(), named(inputs()), path, dynamic_shapes={})
    cross = {**named(inputs(n=30, s=50)), "key_mask": some_rows(50)}
    shapes = {"q": free, "k": free, "v": free, "key_mask": {0: FREE, 1: FREE}}
    with pytest.raises(ValueError, match="always different tokens: give a query_mask"):
        to_onnx(Attend(fastattn.clustered_attention).eval(), cross, path, dynamic_shapes=shapes)
    assert not path.exists()


@pytest.mark.parametrize("method", ["clustered", "improved_clustered"])
def test_a_patched_model_clusters_as_it_does_in_torch(tmp_path: Path, make_tokens: Any, method: str) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=99, max_position_embeddings=400, initializer_range=0.3, **sizes)
    model = fastattn.patch(BertModel(config).eval(), method, n_clusters=10, min_length=0, impl="reference")
    path = to_onnx(model, make_tokens(2, 40, [40, 25]), tmp_path / "bert.onnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node if node.domain == "fastattn"]
    assert nodes == ["ClusteredAttention" if method == "clustered" else "ImprovedClusteredAttention"]
    for batch, length, lengths in ((1, 9, None), (3, 101, [101, 64, 1]), (2, 50, [0, 50])):
        report = check(model, path, make_tokens(batch, length, lengths))
        # rounding alone, or a query that a plane's other side has moved to another cluster, which changes two clusters
        assert report.ok and all(e.relative < 1e-5 or e.rows_off < 0.3 for e in report.errors), report
