"""attend: every method by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import attend
from fastattn.methods.attend import METHODS
from tests.methods.test_smyrf import D, draws, inputs
from tests.ops.cases import each, gradients, leaves


def test_runs_the_methods_own_functions() -> None:
    q, k, v = inputs(heads=4, kv_heads=2)

    def same(actual: Any, expected: Any) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    reference: dict[str, Any] = {"impl": "reference"}
    hashes: dict[str, Any] = {"projections": draws(), "n_hashes": 3, "q_cluster_size": 16, **reference}
    same(attend(q, k, v, **hashes), fastattn.smyrf_attention(q, k, v, **hashes))
    same(
        attend(q, k, v, method="smyrf", return_lse=True, **hashes),
        fastattn.smyrf_attention(q, k, v, return_lse=True, **hashes),
    )
    same(attend(q, k, v, method="linear", **reference), fastattn.linear_attention(q, k, v, **reference))
    same(
        attend(q, q, v, method="lsh", bucket_size=8, generator=draw(), **reference),
        fastattn.lsh_attention(q, v, bucket_size=8, generator=draw(), **reference),
    )
    for method in ("clustered", "improved_clustered"):
        function = getattr(fastattn, f"{method}_attention")
        knobs: dict[str, Any] = {"n_clusters": 5, **reference}
        expected = function(q, k, v, generator=draw(), **knobs)
        same(attend(q, k, v, method=method, generator=draw(), **knobs), expected)


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    x = inputs()
    with pytest.raises(ValueError, match=r"^method must be one of 'dense', 'smyrf', .* got 'magic'"):
        attend(*x, method="magic")
    with pytest.raises(ValueError, match=r"^unknown knob 'n_clusters', 'topk' for method 'smyrf'; allowed: n_hashes, "):
        attend(*x, n_clusters=4, topk=3)
    with pytest.raises(ValueError, match=r"allowed: key_mask, query_mask, is_causal, scale, dropout_p$"):
        attend(*x, method="dense", n_hashes=4)
    with pytest.raises(ValueError, match=r"^k must be q itself with method='lsh'"):
        attend(*x, method="lsh")
    with pytest.raises(ValueError, match=r"^cu_seqlens_k needs cu_seqlens"):
        attend(*x, cu_seqlens_k=torch.zeros(1, dtype=torch.int32))


def test_every_method_is_listed_in_its_documentation() -> None:
    assert all(f'"{method}"' in str(attend.__doc__) for method in METHODS)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    s = (q @ k.mT / math.sqrt(D)).masked_fill(~keep, -math.inf)
    return (s.softmax(-1).nan_to_num(0.0) @ v).masked_fill(~keep.any(-1, keepdim=True), 0.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masks", ["no mask", "key mask", "both masks"])
def test_dense_is_softmax_attention_over_the_rows_that_take_part(masks: str, is_causal: bool) -> None:
    q, k, v = each(Tensor.double, inputs(n=20))
    g = torch.Generator().manual_seed(1)
    key_mask = torch.rand(2, 20, generator=g) < 0.6 if masks != "no mask" else torch.ones(2, 20, dtype=torch.bool)
    query_mask = torch.rand(2, 20, generator=g) < 0.6 if masks == "both masks" else key_mask
    if masks != "no mask":
        key_mask[1] = False
    keep = key_mask[:, None, None] & query_mask[:, None, :, None]
    keep = keep & torch.ones(20, 20, dtype=torch.bool).tril() if is_causal else keep
    given: dict[str, Any] = {} if masks == "no mask" else {"key_mask": key_mask}
    given |= {"query_mask": query_mask} if masks == "both masks" else {}
    pairs = ((query_mask, q), (key_mask, k), (key_mask, v))
    holds_nan = (torch.where(mask[:, None, :, None], x, math.nan) for mask, x in pairs)
    x, y = leaves(*holds_nan), leaves(q, k, v)
    out, expected = attend(*x, method="dense", is_causal=is_causal, **given), softmax_attention(*y, keep)
    torch.testing.assert_close(out, expected)
    for a, b in zip(gradients(out, x, torch.ones_like(out)), gradients(expected, y, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0))
