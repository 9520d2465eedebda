"""ImprovedClusteredAttention in ONNX Runtime: the body of the node against torch, and whole calls of the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.export import to_onnx
from fastattn.reference.improved_clustered import improved_clustered_attention as definition
from tests.accuracy import assert_as_accurate
from tests.export.ops.test_clustered_attention import ALL, Attend, C, exported, inputs, named, planes, some_rows

RunNode = Callable[..., list[Tensor]]
CASES: dict[str, dict[str, Any]] = {
    "odd": {},
    "fp16": {"dtype": torch.float16},
    "one key head": {"kv_heads": 1},
    "all keys in the list": {"topk": 100},
    "one query": {"n": 1},
    "cross": {"n": 30, "s": 50},
    "masked": {"masked": True},
    "masked, cross, lists longer than there are keys": {"masked": True, "n": 30, "s": 50, "topk": 40},
}


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", CASES)
def test_is_what_torch_computes(run_node: RunNode, name: str, is_causal: bool) -> None:
    case = {"topk": 5, **CASES[name]}
    masked, topk = case.pop("masked", False), case.pop("topk")
    if is_causal:
        case.pop("s", None)
    q, k, v = inputs(**case)
    key_mask = some_rows(k.shape[2]) if masked else None
    query_mask = some_rows(q.shape[2], 1) if masked else None
    if key_mask is not None and query_mask is not None:
        key_mask[1] = False  # one example has no key at all
        q = q.masked_fill(~query_mask[:, None, :, None], float("nan"))
        k, v = (x.masked_fill(~key_mask[:, None, :, None], float("nan")) for x in (k, v))
    seed, none = torch.tensor(2**61 + 7), torch.full((1, 1, C), -1, dtype=torch.int32)
    tensors = {"q": q, "k": k, "v": v, "planes": planes(), "initial": none, "seed": seed}
    tensors |= {"key_mask": ALL if key_mask is None else key_mask}
    tensors |= {"query_mask": ALL if query_mask is None else query_mask}
    clustering = {"n_clusters": C, "n_bits": 20, "n_iterations": 5}
    attending = {"topk": topk, "is_causal": int(is_causal), "scale": 0.3}
    (out,) = run_node(
        "ImprovedClusteredAttention", tensors, {"out": (q.dtype, 4)}, **clustering, draws_initial=1, **attending
    )

    given = fastattn.methods.clustered.Clustering(planes(), None, seed, None)
    clusters = fastattn.methods.clustered.find_clusters(q, *given, query_mask, **clustering, impl="reference")
    plain, exact = (
        definition(
            *(x.to(dtype) for x in (q, k, v)), clusters, C,
            topk=topk, is_causal=is_causal, key_mask=key_mask, scale=0.3,
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    assert_as_accurate(out, plain.to(out.dtype), exact)
    if masked:
        assert not out[1].any()


def test_a_causal_query_all_of_whose_keys_are_later_gives_0(run_node: RunNode) -> None:
    q, k, v = inputs()
    clusters = torch.zeros(2, 4, 41, dtype=torch.int32)
    k[:, :, 30] = 1e3 * torch.ones(8)  # of all queries' mean, here 1, the key
    tensors = {"q": q.abs() + 0.1, "k": k, "v": v, "clusters": clusters, "key_mask": ALL}
    knobs = {"n_clusters": 1, "topk": 1, "is_causal": 1, "scale": 0.3}
    (out,) = run_node("ImprovedAttendClusters", tensors, {"out": (torch.float32, 4)}, **knobs)
    assert not out[:, :, :30].any()
    expected = v[:, :, 30:31].repeat_interleave(2, 1).expand(-1, -1, 11, -1)
    torch.testing.assert_close(out[:, :, 30:], expected)


def test_a_call_is_one_node_that_takes_any_batch_and_length(tmp_path: Path) -> None:
    g = torch.Generator()
    knobs: dict[str, Any] = {"n_clusters": C, "n_bits": 20, "planes": planes(), "topk": 6, "impl": "reference"}

    class Both(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
            g.manual_seed(4)
            outs = [
                fastattn.improved_clustered_attention(
                    q, k, v, key_mask=key_mask, is_causal=is_causal, generator=g, **knobs
                )
                for is_causal in (False, True)
            ]
            return torch.cat(outs, -1)

    nodes, run = exported(Both(), tmp_path, **named(inputs()), key_mask=torch.ones(2, 41, dtype=torch.bool))
    assert nodes == ["ImprovedClusteredAttention"] * 2
    for batch, n in ((1, 1), (2, 41), (3, 5), (1, 300)):
        x, mask = inputs(batch, n=n), torch.arange(n).expand(batch, -1) % 4 != 1
        expected = Both()(*x, key_mask=mask)
        torch.testing.assert_close(run(**named(x), key_mask=mask), expected, rtol=1e-5, atol=2e-6)


def test_dropout_is_refused_by_name(tmp_path: Path) -> None:
    module = Attend(fastattn.improved_clustered_attention, dropout_p=0.1).eval()
    with pytest.raises(ValueError, match=r"improved_clustered_attention can't be exported to ONNX with dropout_p=0\.1"):
        to_onnx(module, named(inputs()), tmp_path / "model.onnx", dynamic_shapes={})
