"""topk_attention, kernel and definition alike, against the definition in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.block_attention import block_attention
from fastattn.ops.topk_attention import topk_attention
from fastattn.reference import topk_attention as reference
from tests.accuracy import assert_as_accurate
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, needs_compiler

NAMES = ("out", "lse", "dq", "dk", "dv", "dmass", "drest")


@dataclass(frozen=True)
class Case:
    """A few queries are in no cluster, one cluster is empty, and each list has places without a key."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    n_queries: int = 48
    n_keys: int = 48
    head_dim: int = 16
    value_dim: int = 16
    n_clusters: int = 5
    top_k: int = 8
    is_causal: bool = False
    dropout_p: float = 0.0

    def tensors(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        rows = (self.batch, self.heads)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        clusters = torch.randint(-1, self.n_clusters, (*rows, self.n_queries), generator=g).int()
        clusters[clusters == 1] = 0
        lists = torch.rand(*rows, self.n_clusters, self.n_keys, generator=g).argsort(-1)[..., : self.top_k].int()
        lists[..., self.top_k // 2] = -1
        return {
            "q": draw(*rows, self.n_queries, self.head_dim),
            "k": draw(self.batch, self.kv_heads, self.n_keys, self.head_dim),
            "v": draw(self.batch, self.kv_heads, self.n_keys, self.value_dim),
            "clusters": clusters,
            "topk_index": lists,
            "mass": torch.rand(*rows, self.n_clusters, generator=g),
            "rest": draw(*rows, self.n_clusters, self.value_dim),
        }

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "dropout_p": self.dropout_p, "seed": 5}


LEAVES = ("q", "k", "v", "mass", "rest")


def solve(attention: Any, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """out, lse, and the gradient of a random sum of both."""
    tensors = {name: x.detach().clone().requires_grad_(name in LEAVES) for name, x in tensors.items()}
    out, lse = attention(**tensors, **options)
    g = torch.Generator().manual_seed(3)
    dout, dlse = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (out, lse))
    loss = (out * dout).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * dlse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, [tensors[name] for name in LEAVES])


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(dtype if name in "qkv" else wide) if x.is_floating_point() else x for name, x in tensors.items()}


# each combination of head dims, list tiles and boolean options is a build of its own, so that cases share them
MIXED = "B2-H4-Hkv2-N77-S90-D40-Dv24 causal, dropout"
CASES = {
    "B1-N48-D16": Case(),
    MIXED: Case(
        batch=2, heads=4, kv_heads=2, n_queries=77, n_keys=90, head_dim=40, value_dim=24, top_k=37, is_causal=True,
        dropout_p=0.3,
    ),
    "H3-Hkv1-N700 a cluster of several parts": Case(heads=3, kv_heads=1, n_queries=700, n_keys=60, n_clusters=4),
    "N60 a list of several tiles": Case(n_queries=60, n_keys=300, top_k=200, dropout_p=0.3),
    "N40-D96-Dv80": Case(n_queries=40, head_dim=96, value_dim=80),
    "N9-D1-Dv3 more clusters than queries": Case(n_queries=9, n_keys=9, head_dim=1, value_dim=3, n_clusters=20),
    "N1-S1": Case(n_queries=1, n_keys=1, top_k=1),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_as_accurate_as_plain_pytorch(case: Case, impl: str) -> None:
    tensors = case.tensors()
    actual = solve(topk_attention, tensors, **case.options, impl=impl)
    assert actual[0].shape == (case.batch, case.heads, case.n_queries, case.value_dim)
    plain, exact = (
        solve(reference.topk_attention, cast(tensors, d), **case.options) for d in (torch.float32, torch.float64)
    )
    empty = exact[1] == -math.inf
    assert torch.equal(actual[1] == -math.inf, empty)
    for name, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        if name == "lse":
            a, p, e = (x.masked_fill(empty, 0.0) for x in (a, p, e))
        assert_as_accurate(a, p, e, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype, impl: str) -> None:
    case = CASES[MIXED]
    tensors = cast(case.tensors(), dtype)
    actual = solve(topk_attention, tensors, **case.options, impl=impl)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    plain, exact = (solve(reference.topk_attention, cast(tensors, d), **case.options) for d in (dtype, torch.float64))
    for what, a, p, e in zip(NAMES, actual, plain, exact, strict=True):
        if what != "lse":
            assert_as_accurate(a, p, e, what)


def test_the_backward_written_out_is_the_gradient_of_the_definition() -> None:
    for case in (CASES["B1-N48-D16"], CASES[MIXED]):
        tensors = cast(case.tensors(), torch.float64)
        out, lse, *wanted = solve(reference.topk_attention, tensors, **case.options)
        g = torch.Generator().manual_seed(3)
        dout, dlse = (torch.randn(x.shape, generator=g).double() for x in (out, lse))
        del tensors["rest"]
        actual = reference.topk_attention_backward(
            dout, dlse.masked_fill(lse == -math.inf, 0.0), **tensors, lse=lse, **case.options
        )
        for a, b in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
class TestQueries:
    def test_of_no_cluster_and_keys_of_no_list_may_hold_nan(self, impl: str) -> None:
        tensors = Case().tensors()
        outside = tensors["clusters"] < 0
        tensors["q"][outside] = math.nan
        tensors["topk_index"][tensors["topk_index"] == 7] = -1
        clean = solve(topk_attention, tensors | {"q": torch.nan_to_num(tensors["q"])}, impl=impl)
        for name in "kv":
            tensors[name][:, :, 7] = math.nan
        actual = solve(topk_attention, tensors, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(actual, clean, strict=True))
        assert not actual[0][outside].any() and (actual[1][outside] == -math.inf).all()
        assert all(torch.isfinite(x).all() for x in (actual[0], *actual[2:]))

    def test_whose_list_is_empty_or_in_the_future_give_the_rest_alone(self, impl: str) -> None:
        case = Case(is_causal=True)
        tensors = case.tensors()
        tensors["topk_index"][:, :, 0] = -1
        tensors["topk_index"][:, :, 2] = tensors["topk_index"][:, :, 2].clamp_min(40)
        out, lse, dq, *_ = solve(topk_attention, tensors, is_causal=True, impl=impl)
        row = torch.arange(48).expand(1, 2, -1)
        alone = (tensors["clusters"] == 0) | ((tensors["clusters"] == 2) & (row < 40))
        assert alone.any() and (lse[alone] == -math.inf).all() and not dq[alone].any()
        rest = tensors["rest"].gather(2, tensors["clusters"].clamp_min(0).long().unsqueeze(-1).expand(-1, -1, -1, 16))
        assert torch.equal(out[alone], rest[alone])

    def test_all_in_no_cluster_give_zeros(self, impl: str) -> None:
        tensors = Case().tensors()
        tensors["clusters"].fill_(-1)
        out, lse, *gradients = solve(topk_attention, tensors, impl=impl)
        assert not out.any() and (lse == -math.inf).all() and not any(x.any() for x in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_cluster_with_one_list_is_block_attention(impl: str) -> None:
    tensors = Case().tensors()
    rows = torch.arange(48, dtype=torch.int32).expand(1, 2, 1, 48)
    out, lse = topk_attention(
        tensors["q"], tensors["k"], tensors["v"], torch.zeros(1, 2, 48, dtype=torch.int32), rows, impl=impl
    )
    index = rows.unsqueeze(2)
    expected, expected_lse = block_attention(tensors["q"], tensors["k"], tensors["v"], index, index, impl=impl)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_that_is_twice_in_a_list_counts_twice(impl: str) -> None:
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.tensor([1.0, 4.0]).view(1, 1, 2, 1)
    lists = torch.tensor([0, 1, 0], dtype=torch.int32).view(1, 1, 1, 3)
    out, lse = topk_attention(q, k, v, torch.zeros(1, 1, 1, dtype=torch.int32), lists, impl=impl)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([3.0]).log())


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any) -> None:
    tensors = Case().tensors()
    strided = tensors | {name: layout(tensors[name]) for name in "qkv"}
    out, lse = topk_attention(**strided, impl="triton")
    plain = {name: x.contiguous() for name, x in strided.items()}
    expected, expected_lse = topk_attention(**plain, impl="triton")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    wanted, actual = solve(topk_attention, plain, impl="triton"), solve(topk_attention, strided, impl="triton")
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@needs_compiler
def test_rows_that_stand_beyond_two_to_the_31_elements_are_found(tmp_path: Path) -> None:
    # a sparse file: the gaps between the rows take neither memory nor disk
    stride = 2**30
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 16)
    far = storage.as_strided((1, 1, 4, 16), (0, 0, stride, 1))
    near = torch.randn(1, 1, 4, 16, generator=torch.Generator().manual_seed(0))
    far.copy_(near)
    clusters, lists = torch.zeros(1, 1, 4, dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32).view(1, 1, 1, 2)
    out, lse = topk_attention(far, far, far, clusters, lists, impl="triton")
    expected, expected_lse = topk_attention(near, near, near, clusters, lists, impl="triton")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_gives_same_bits(impl: str) -> None:
    case = CASES[MIXED]
    first, second = (solve(topk_attention, case.tensors(), **case.options, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [48, 2**31 - 1, -2])
def test_keys_out_of_range_are_refused(bad: int, impl: str) -> None:
    tensors = Case().tensors()
    tensors["topk_index"][0, 1, 2, 3] = bad
    with pytest.raises(ValueError, match="topk_index"):
        topk_attention(**tensors, impl=impl)


def test_reference_has_second_derivatives_in_fp64() -> None:
    case = Case(heads=1, kv_heads=1, n_queries=6, n_keys=6, head_dim=2, value_dim=2, n_clusters=2, top_k=3)
    tensors = cast(case.tensors(), torch.float64)

    def attend(*leaves: Tensor) -> Tensor:
        return topk_attention(**tensors | dict(zip(LEAVES, leaves, strict=True)), impl="reference")[0]

    leaves = tuple(tensors[name].requires_grad_() for name in LEAVES)
    assert torch.autograd.gradcheck(attend, leaves) and torch.autograd.gradgradcheck(attend, leaves)
