"""smyrf_attention against the original implementation, against its definition, and as a citizen of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import smyrf_attention
from fastattn.methods import smyrf_routing
from fastattn.ops.block_attention import block_attention
from fastattn.reference import smyrf as definition
from tests.accuracy import assert_as_accurate, original
from tests.device import device_type
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, Three, each, gradients, leaves
from tests.watching import LargestTensor

D, SIZE = 8, 16  # of the fixtures, and of most tests here, so that kernels are built once


def inputs(
    batch: int = 2, heads: int = 2, n: int = 64, s: int | None = None, kv_heads: int | None = None, seed: int = 0
) -> Three:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, D, generator=g)
    k, v = (torch.randn(batch, kv_heads or heads, s or n, D, generator=g) for _ in "kv")
    return q, k, v


def draws(n_hashes: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(D + 2, n_hashes, generator=torch.Generator().manual_seed(seed))


class TestAgainstTheOriginal:
    """The fixtures' rows are (batch * heads, N, D)."""

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("name", ["smyrf_self", "smyrf_onecluster"])
    def test_equals_it_forward_and_backward(self, name: str, impl: str) -> None:
        f = original(name)
        q, k, v = leaves(*(f[x].unsqueeze(0) for x in "qkv"))
        out = smyrf_attention(
            q, k, v,
            n_hashes=int(f["n_hashes"]), q_cluster_size=int(f["q_cluster"]), k_cluster_size=int(f["k_cluster"]),
            scale=1 / float(f["norm_factor"]), projections=f["alpha"], impl=impl,
        )  # fmt: skip
        torch.testing.assert_close(out[0], f["out"], rtol=0, atol=2e-6)
        for x, gradient in zip("qkv", gradients(out[0], (q, k, v), f["w"]), strict=True):
            torch.testing.assert_close(gradient[0], f["d" + x], rtol=0, atol=5e-6)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_equals_it_with_masks_in_the_original_clusters(self, impl: str) -> None:
        """The fixture's rows r = 0..3 (2 examples of 2 heads) had mask r mod 2, where r // 2 is right: so here each row
        is an example of one head, with the mask that it had.

        The clusters are the original's own, because its bound on the norms takes padding in, and so its hashes do: ours
        do not (what padding holds has no effect), so that the same projections make other clusters. In its clusters all
        is equal wherever the original is right: a padded query that met padded keys alone got their mean from it (a
        masked key is one with -10000, and all of them had that), and gets 0 from us. Such queries pass gradients only
        to padded keys and values, so everything at real rows is compared, and out of the other padded queries too.
        """
        f = original("smyrf_mask")
        real = (f["attn_mask"] == 0).repeat(2, 1)  # [4, 64]
        q_index, k_index = (f[x].permute(1, 0, 2).reshape(4, 1, 3, 4, 16) for x in ("q_positions", "k_positions"))
        q, k, v = leaves(*(f[x].unsqueeze(1) for x in "qkv"))
        scale = 1 / float(f["norm_factor"])
        out, lse = block_attention(q, k, v, q_index, k_index, key_mask=real, scale=scale, impl=impl)
        met = lse[:, 0] > -math.inf
        assert met[real].all() and not met.all()
        torch.testing.assert_close(out[:, 0][met], f["out"][met], rtol=0, atol=2e-6)
        for x, gradient in zip("qkv", gradients(out[:, 0], (q, k, v), f["w"]), strict=True):
            torch.testing.assert_close(gradient[:, 0][real], f["d" + x][real], rtol=0, atol=5e-6)

    def test_makes_its_clusters_where_padding_has_no_larger_norms(self) -> None:
        """The same fixture through the whole method, once padding's norms can't tell: each row's padding is replaced by
        copies of its own real rows in the fixture's transforms too, so that both sides have one bound on the norms."""
        f = original("smyrf_mask")
        real = (f["attn_mask"] == 0).repeat(2, 1)
        q, k = (torch.where(real.unsqueeze(-1), f[x], f[x][:, :1]).unsqueeze(1) for x in "qk")
        clusters = smyrf_routing.plan(64, 64, SIZE, SIZE, True)
        index, _ = smyrf_routing.route(q, k, f["alpha"], 3, real, real, clusters)
        for row in range(4):
            f_q, _ = definition.hashes(q[row, 0], k[row, 0], f["alpha"])
            masked = f_q - torch.where(real[row], 0.0, -10000.0).unsqueeze(-1)  # as the original: padding sorts last
            expected = torch.argsort(masked, dim=0, stable=True).T
            n = int(real[row].sum())
            assert torch.equal(index[row, 0].flatten(1)[:, :n].long(), expected[:, :n])
            assert (index[row, 0].flatten(1)[:, n:] == -1).all()


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "N64": ({}, {}),
    "N1": ({"n": 1}, {}),
    "N75, does not divide": ({"n": 75}, {}),
    "N75, key clusters of 15": ({"n": 75}, {"k_cluster_size": 15}),
    "N10, less than a cluster": ({"n": 10}, {}),
    "N64-S100": ({"s": 100}, {}),
    "N64-S32, key clusters of 8": ({"s": 32}, {"k_cluster_size": 8}),
    "N61-S7": ({"n": 61, "s": 7}, {}),
    "N61-S3, fewer keys than clusters": ({"n": 61, "s": 3}, {}),
    "N5-S90": ({"n": 5, "s": 90}, {"q_cluster_size": 2}),
    "H4-Hkv2": ({"heads": 4, "kv_heads": 2}, {}),
    "H4-Hkv1-S50": ({"heads": 4, "kv_heads": 1, "s": 50}, {}),
}
MASKS = ["no mask", "key mask", "query mask", "both masks"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("shape", "knobs"), SHAPES.values(), ids=SHAPES.keys())
def test_is_its_definition(shape: dict[str, Any], knobs: dict[str, Any], masks: str, impl: str) -> None:
    q, k, v = leaves(*inputs(**shape))
    g = torch.Generator().manual_seed(2)
    key_mask = torch.rand(2, k.shape[2], generator=g) < 0.7 if masks in ("key mask", "both masks") else None
    query_mask = torch.rand(2, q.shape[2], generator=g) < 0.7 if masks in ("query mask", "both masks") else None
    knobs = {"q_cluster_size": SIZE, "key_mask": key_mask, "query_mask": query_mask} | knobs
    out, lse = smyrf_attention(q, k, v, n_hashes=3, projections=draws(), return_lse=True, impl=impl, **knobs)
    dout = torch.randn(out.shape, generator=g)
    actual = (out, *gradients(out, (q, k, v), dout))
    results = []
    for dtype in (torch.float32, torch.float64):
        x = leaves(q.to(dtype), k.to(dtype), v.to(dtype))
        o, defined_lse = definition.smyrf_attention(*x, draws(), **knobs)
        results.append((o.detach(), *gradients(o, x, dout)))
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, *results, strict=True):
        assert_as_accurate(a, p, e, name)
    torch.testing.assert_close(lse, defined_lse.detach().float(), rtol=0, atol=5e-6)
    taking_part = query_mask if query_mask is not None else (key_mask if q.shape[2] == k.shape[2] else None)
    if taking_part is not None:
        rows = ~taking_part.unsqueeze(1).expand(q.shape[:3])
        assert not out[rows].any() and (lse[rows] == -math.inf).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", [{"key_mask": False}, {"query_mask": False}, {"key_mask": False, "query_mask": True}])
def test_an_example_without_rows_gives_zero(masks: dict[str, bool], impl: str) -> None:
    q, k, v = leaves(*inputs())
    given: dict[str, Any] = {name: torch.tensor([[True], [value]]).expand(2, 64) for name, value in masks.items()}
    out, lse = smyrf_attention(q, k, v, q_cluster_size=SIZE, return_lse=True, impl=impl, **given)
    every = gradients(out, (q, k, v), torch.ones_like(out))
    assert not out[1].any() and (lse[1] == -math.inf).all()
    assert torch.isfinite(out).all() and torch.isfinite(lse[0]).all()
    assert all(torch.isfinite(x).all() and not x[1].any() and x[0].any() for x in every)


def test_cross_attention_leaves_no_real_query_without_keys() -> None:
    q, k, v = inputs(n=100, s=60)
    query_mask, key_mask = torch.arange(100).expand(2, -1) < 37, torch.arange(60).expand(2, -1) >= 50
    _, lse = smyrf_attention(
        q, k, v, q_cluster_size=SIZE, n_hashes=1, return_lse=True, query_mask=query_mask, key_mask=key_mask
    )
    assert torch.isfinite(lse[query_mask.unsqueeze(1).expand_as(lse)]).all()


class TestDraws:
    def test_same_generator_state_gives_same_bits(self) -> None:
        a, b = (
            smyrf_attention(*inputs(), q_cluster_size=SIZE, generator=torch.Generator().manual_seed(7)) for _ in "ab"
        )
        assert torch.equal(a, b)

    def test_generator_draws_what_may_be_passed_in(self) -> None:
        g = torch.Generator().manual_seed(7)
        drawn = smyrf_attention(*inputs(), n_hashes=2, q_cluster_size=SIZE, generator=g)
        projections = torch.randn(D + 2, 2, generator=torch.Generator().manual_seed(7))
        assert torch.equal(drawn, smyrf_attention(*inputs(), n_hashes=2, q_cluster_size=SIZE, projections=projections))

    def test_without_either_torchs_own_state_decides(self) -> None:
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(smyrf_attention(*inputs(), q_cluster_size=SIZE))
        assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])

    def test_projections_get_no_gradient_and_need_none(self) -> None:
        projections = draws().requires_grad_()
        smyrf_attention(*leaves(*inputs()), n_hashes=3, q_cluster_size=SIZE, projections=projections).sum().backward()
        assert projections.grad is None


class TestStrides:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_do_not_matter(self, layout: Any) -> None:
        x = each(layout, inputs())
        knobs: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": SIZE, "projections": draws()}
        expected = smyrf_attention(*each(Tensor.contiguous, x), **knobs)
        torch.testing.assert_close(smyrf_attention(*x, **knobs), expected, rtol=0, atol=1e-6)


KNOBS: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": SIZE}


class TestInTorch:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
    def test_compiles_as_one_graph(self, masked: bool, dynamic: bool) -> None:
        projections = draws()

        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
            return smyrf_attention(q, k, v, projections=projections, key_mask=key_mask, **KNOBS)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (64, 75):
            key_mask = torch.arange(n).expand(2, -1) < n - 9 if masked else None
            eager, traced = leaves(*inputs(n=n)), leaves(*inputs(n=n))
            expected, out = attend(*eager, key_mask), compiled(*traced, key_mask)
            assert torch.equal(out, expected)
            wanted = gradients(expected, eager, torch.ones_like(out))
            actual = gradients(out, traced, torch.ones_like(out))
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))

    def test_compiles_cross_attention_with_its_own_draws(self) -> None:
        compiled = torch.compile(
            lambda q, k, v: smyrf_attention(q, k, v, q_cluster_size=SIZE), fullgraph=True, backend="aot_eager"
        )
        out = compiled(*inputs(n=64, s=100))
        assert out.shape == (2, 2, 64, D) and torch.isfinite(out).all()

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    def test_exports_as_one_node_for_any_batch_and_length(self, strict: bool) -> None:
        class Attend(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("projections", draws())
                self.project = torch.nn.Linear(D, D)

            def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
                knobs: dict[str, Any] = {"projections": self.projections, "key_mask": key_mask, **KNOBS}
                return smyrf_attention(self.project(q), k, v, **knobs)

        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
        dims = tuple({0: batch, axis: length} for axis in (2, 2, 2, 1))
        module = Attend().eval()
        program = torch.export.export(
            module, (*inputs(), torch.ones(2, 64, dtype=torch.bool)), dynamic_shapes=dims, strict=strict
        )
        ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert ops.count("fastattn.smyrf_attention.default") == 1
        assert not any("argsort" in name or "block_attention" in name for name in ops)
        x = (*inputs(batch=3, n=75), torch.arange(75).expand(3, -1) < 50)
        torch.testing.assert_close(program.module()(*x), module(*x), rtol=0, atol=1e-6)

    def test_opcheck_of_the_whole_method(self) -> None:
        args = (*inputs(n=75), draws(), torch.rand(2, 75) < 0.7, None, SIZE, None, 0.3, 3)
        torch.library.opcheck(torch.ops.fastattn.smyrf_attention.default, args)

    def test_the_exported_op_refuses_to_pass_gradients(self) -> None:
        out, _ = torch.ops.fastattn.smyrf_attention(*leaves(*inputs()), draws(), None, None, SIZE, None, 0.3, 3)
        with pytest.raises(RuntimeError, match="inference only"):
            out.sum().backward()

    @pytest.mark.filterwarnings("ignore:fastattn runs block attention by its PyTorch definition")
    def test_autocast_casts_as_sdpa_does(self) -> None:
        x = leaves(*inputs())
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            out = smyrf_attention(*x, projections=draws(), **KNOBS)
        assert out.dtype == torch.bfloat16
        expected = smyrf_attention(*each(Tensor.bfloat16, x), projections=draws(), **KNOBS)
        assert torch.equal(out, expected)
        assert all(gradient.dtype == torch.float32 for gradient in gradients(out, x, torch.ones_like(out)))

    @pytest.mark.filterwarnings("ignore:fastattn runs block attention by its PyTorch definition")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_half_inputs_are_routed_in_fp32(self, dtype: torch.dtype) -> None:
        x = each(lambda y: y.to(dtype), inputs(n=75))
        out = smyrf_attention(*x, projections=draws(), **KNOBS)
        wide = smyrf_attention(*each(Tensor.float, x), projections=draws(), **KNOBS)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wide, rtol=0, atol=4 * torch.finfo(dtype).eps)

    def test_double_backward_is_refused(self) -> None:
        x = leaves(*inputs())
        out = smyrf_attention(*x, projections=draws(), **KNOBS)
        (dq,) = torch.autograd.grad(out.square().sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dq.sum().backward()

    def test_fp64_runs_by_the_definition_with_second_derivatives(self) -> None:
        x = leaves(*each(lambda y: y[:1, :1].double(), inputs(n=6)))
        knobs: dict[str, Any] = {"q_cluster_size": 3, "n_hashes": 2, "projections": draws(2), "impl": "reference"}
        assert torch.autograd.gradcheck(lambda q, k, v: smyrf_attention(q, k, v, **knobs), x)
        assert torch.autograd.gradgradcheck(lambda q, k, v: smyrf_attention(q, k, v, **knobs), x)

    def test_meta_tensors_give_shapes(self) -> None:
        x = each(lambda y: y.to("meta"), inputs(n=75))
        assert smyrf_attention(*x, q_cluster_size=SIZE).shape == (2, 2, 75, D)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_no_intermediate_tensor_is_larger_than_the_inputs(masked: bool) -> None:
    """So memory is linear in the length, and F(q), G(k) of D + 2 columns are never made."""
    q, k, v = inputs(batch=1, n=1000)
    key_mask = torch.arange(1000).expand(1, -1) < 900 if masked else None
    projections = draws(4)
    smyrf_attention(q, k, v, q_cluster_size=SIZE, projections=projections, key_mask=key_mask)
    with LargestTensor() as largest:
        smyrf_attention(q, k, v, q_cluster_size=SIZE, projections=projections, key_mask=key_mask)
    assert 0 < largest.elements <= q.numel()
