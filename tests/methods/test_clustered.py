"""clustered_attention against the original implementation, against its definition, and as a citizen of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import clustered_attention
from fastattn.methods.clustered import assign_clusters
from fastattn.reference import clustered as definition
from tests.accuracy import assert_as_accurate, original
from tests.device import device_type
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, Three, each, gradients, leaves, needs_compiler
from tests.watching import LargestTensor

D, C = 8, 5  # of the fixtures, and of most tests here, so that kernels are built once


def inputs(
    batch: int = 2, heads: int = 2, n: int = 40, s: int | None = None, kv_heads: int | None = None,
    dim: int = D, value_dim: int = D,
) -> Three:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, n, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads or heads, s or n, width, generator=g) for width in (dim, value_dim))
    return q, k, v


def some_clusters(q: Tensor, n_clusters: int = C) -> Tensor:
    """Random ones, the last of them empty, with queries of none."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(-1, max(1, n_clusters - 1), q.shape[:3], generator=g)


def draws(dim: int = D, n_bits: int = 16, n: int = 40) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    planes = torch.randn(n_bits, dim + 1, generator=g)
    return {
        "n_clusters": C,
        "n_bits": n_bits,
        "planes": planes,
        "initial_centroids": torch.randperm(n, generator=g)[:C],
        "generator": g,
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["clustered", "clustered_nobias"])
def test_equals_the_original_forward_and_backward(name: str, impl: str) -> None:
    """In the second, clusters lost all members, which the original re-draws from a source that can't be seeded: its
    clusters are taken as given. The first is hashed and clustered here too."""
    f = original(name)
    q, k, v = leaves(*(f[x].transpose(1, 2) for x in "qkv"))
    given = {"clusters": f["clusters"]}
    if name == "clustered":
        given = {"planes": f["planes"], "initial_centroids": f["init_idx"]}
    out = clustered_attention(
        q, k, v, n_clusters=int(f["C"]), n_bits=int(f["bits"]), n_iterations=int(f["iterations"]), impl=impl, **given
    )
    torch.testing.assert_close(out.transpose(1, 2), f["out"], rtol=0, atol=2e-6)
    for x, gradient in zip("qkv", gradients(out.transpose(1, 2), (q, k, v), f["w"]), strict=True):
        torch.testing.assert_close(gradient.transpose(1, 2), f["d" + x], rtol=0, atol=5e-6)


SHAPES: dict[str, dict[str, int]] = {
    "N40-D8": {},
    "cross": {"n": 31, "s": 77},
    "grouped": {"heads": 4, "kv_heads": 2},
    "D40-Dv24": {"dim": 40, "value_dim": 24},
    "D1": {"dim": 1, "value_dim": 1},
    "D96": {"n": 300, "dim": 96, "value_dim": 80},
    "one query, one key": {"n": 1},
}
RUNS = [*((name, torch.float32) for name in SHAPES), ("N40-D8", torch.float16), ("N40-D8", torch.bfloat16)]


@needs_compiler
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_is_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    x = each(lambda t: t.to(dtype), inputs(**SHAPES[name]))
    clusters = some_clusters(x[0])
    key_mask = torch.arange(x[1].shape[2]).expand(x[1].shape[0], -1) % 4 != 3
    masks = {"key_mask": key_mask, "query_mask": torch.ones(x[0].shape[0], x[0].shape[2], dtype=torch.bool)}
    plain, exact, ours = leaves(*x), leaves(*each(Tensor.double, x)), leaves(*x)
    results = [
        definition.clustered_attention(*plain, clusters, C, key_mask=key_mask),
        definition.clustered_attention(*exact, clusters, C, key_mask=key_mask),
        clustered_attention(*ours, n_clusters=C, clusters=clusters, impl="triton", **masks),
    ]
    dout = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grads = [gradients(out, t, dout) for out, t in zip(results, (plain, exact, ours), strict=True)]
    assert_as_accurate(results[2], results[0], results[1], "out")
    for what, b, c, a in zip("qkv", *grads, strict=True):
        assert_as_accurate(a, b, c, f"d{what}")


def test_the_definition_in_fp64_has_right_gradients() -> None:
    x = leaves(*each(Tensor.double, inputs(1, 1, 6, dim=3, value_dim=2)))
    clusters = torch.tensor([0, 1, 1, -1, 0, 0]).view(1, 1, 6)
    knobs: dict[str, Any] = {"n_clusters": 3, "clusters": clusters, "impl": "reference"}
    assert torch.autograd.gradcheck(lambda *x: clustered_attention(*x, **knobs), x)
    assert torch.autograd.gradgradcheck(lambda *x: clustered_attention(*x, **knobs), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_its_definition_in_the_clusters_that_it_makes(impl: str) -> None:
    x = inputs(n=50, s=33)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(5)) < 0.7
    clusters = assign_clusters(x[0], n_iterations=10, query_mask=mask, clusters=None, **draws(n=50))
    assert torch.equal(clusters == -1, ~mask.unsqueeze(1).expand_as(clusters))
    out = clustered_attention(*x, query_mask=mask, impl=impl, **draws(n=50))
    expected = definition.clustered_attention(*x, clusters, C)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert not out[~mask.unsqueeze(1).expand(2, 2, 50)].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_no_key_has_0_and_no_gradient(impl: str) -> None:
    x = leaves(*inputs())
    key_mask = torch.tensor([[True], [False]]).expand(2, 40)
    out = clustered_attention(
        *x, key_mask=key_mask, query_mask=torch.ones(2, 40, dtype=torch.bool), impl=impl, **draws()
    )
    assert not out[1].any() and out[0].all()
    for gradient in gradients(out, x, torch.ones_like(out)):
        assert gradient.isfinite().all() and not gradient[1].any()


def test_a_key_mask_stands_for_the_queries_mask_where_lengths_are_equal() -> None:
    x, mask = inputs(), torch.arange(40).expand(2, 40) % 3 != 0
    out = clustered_attention(*x, key_mask=mask, **draws())
    assert torch.equal(out, clustered_attention(*x, key_mask=mask, query_mask=mask, **draws()))
    assert not out[:, :, ::3].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_more_clusters_than_queries(impl: str) -> None:
    """Then each query with a code of its own is a cluster of its own: dense attention."""
    q, k, v = inputs(n=9, s=30)
    knobs: dict[str, Any] = {"n_clusters": 100, "generator": torch.Generator().manual_seed(0), "impl": impl}
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(clustered_attention(q, k, v, **knobs), dense, rtol=0, atol=2e-6)


def test_given_clusters_are_masked_too() -> None:
    x, mask = inputs(), torch.arange(40).expand(2, 40) < 33
    clusters = some_clusters(x[0])
    out = clustered_attention(*x, n_clusters=C, clusters=clusters, query_mask=mask)
    masked = clusters.masked_fill(~mask.unsqueeze(1), -1)
    assert torch.equal(out, clustered_attention(*x, n_clusters=C, clusters=masked.int(), query_mask=mask))


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: Any) -> None:
    x = each(layout, inputs())
    out = clustered_attention(*x, impl="triton", **draws())
    torch.testing.assert_close(out, clustered_attention(*each(Tensor.contiguous, x), **draws()), rtol=0, atol=1e-6)


DROPOUT: dict[str, Any] = {"dropout_p": 0.4, "n_clusters": C}


class TestDropout:
    @pytest.mark.parametrize("impl", IMPLS)
    def test_keeps_the_mean_and_drops_alike_for_a_cluster(self, impl: str) -> None:
        x, g = inputs(), torch.Generator().manual_seed(0)
        clusters = some_clusters(x[0])
        exact = clustered_attention(*x, n_clusters=C, clusters=clusters)
        runs = [clustered_attention(*x, clusters=clusters, generator=g, impl=impl, **DROPOUT) for _ in range(60)]
        mean = torch.stack(runs).mean(0)
        assert not torch.equal(runs[0], runs[1])
        assert (mean - exact).square().mean() < 0.05 * (runs[0] - exact).square().mean()  # 1 / 60 is due
        own = runs[0][0, 0][clusters[0, 0] == 0]
        assert torch.equal(own, own[:1].expand_as(own))

    @needs_compiler
    def test_kernel_and_definition_drop_the_same(self) -> None:
        results = []
        for impl in ("triton", "reference"):
            x = leaves(*inputs())
            knobs = DROPOUT | {"clusters": some_clusters(x[0]), "generator": torch.Generator().manual_seed(3)}
            out = clustered_attention(*x, impl=impl, **knobs)
            results.append((out, *gradients(out, x, torch.ones_like(out))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_same_generator_gives_the_same_bits() -> None:
    x = inputs()
    knobs: dict[str, Any] = {"n_clusters": C, "n_bits": 6}
    one, same, other = (
        clustered_attention(*x, generator=torch.Generator().manual_seed(seed), **knobs) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, planes: Tensor, mask: Tensor) -> Tensor:
        knobs: dict[str, Any] = {"n_clusters": C, "n_bits": 6, "initial_centroids": torch.arange(C)}
        return clustered_attention(q, k, v, planes=planes, key_mask=mask, **knobs)

    planes = torch.randn(6, D + 1, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (40, 56):
        mask = torch.arange(n).expand(2, n) % 5 != 0
        eager, traced = leaves(*inputs(n=n)), leaves(*inputs(n=n))
        torch.manual_seed(0)  # for clusters that lose all their members
        expected = attend(*eager, planes, mask)
        torch.manual_seed(0)
        out = compiled(*traced, planes, mask)
        assert torch.equal(out, expected)
        wanted = gradients(expected, eager, torch.ones_like(out))
        for gradient, exact in zip(gradients(out, traced, torch.ones_like(out)), wanted, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-6)


def test_exports_as_one_node_with_what_it_draws_as_constants() -> None:
    g = torch.Generator()

    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return clustered_attention(q, k, v, n_clusters=C, n_bits=6, generator=g, impl="reference")

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    g.manual_seed(1)
    program = torch.export.export(Attend(), inputs(), dynamic_shapes=({0: batch, 2: length},) * 3, strict=False)
    ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ops == ["fastattn.clustered_attention.default"]
    x = inputs(batch=3, n=57)
    g.manual_seed(1)
    expected = Attend()(*x)
    for _ in range(2):
        assert torch.equal(program.module()(*x), expected)


def test_a_strict_trace_exports_too() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return clustered_attention(q, k, v, n_clusters=C, n_bits=6, impl="reference")

    program = torch.export.export(Attend(), inputs(), strict=True)
    assert [str(node.target) for node in program.graph.nodes].count("fastattn.clustered_attention.default") == 1
    assert torch.isfinite(program.module()(*inputs())).all()


def test_the_exported_op_is_for_inference() -> None:
    x, planes, draw = inputs(), draws()["planes"], torch.tensor(3)
    op, knobs = torch.ops.fastattn.clustered_attention.default, (C, 16, 3, 0.3, 0.0, None, "reference")
    torch.library.opcheck(op, (*x, planes, None, draw, None, torch.rand(2, 40) < 0.7, None, *knobs))
    out = op(*leaves(*x), planes, None, draw, None, None, None, *knobs)
    with pytest.raises(RuntimeError, match="inference only"):
        out.sum().backward()


@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_casts_as_sdpa_does(impl: str | None) -> None:
    x = leaves(*inputs())
    knobs: dict[str, Any] = {"n_clusters": C, "clusters": some_clusters(x[0]), "impl": impl}
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        out = clustered_attention(*x, **knobs)
        actual = gradients(out, x, torch.ones_like(out))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, clustered_attention(*each(Tensor.bfloat16, x), **knobs))
    assert all(gradient.dtype == torch.float32 for gradient in actual)


@needs_compiler
def test_memory_is_linear_in_the_length() -> None:
    """No tensor on the way has more elements than a few of the inputs', however many clusters there are."""
    x = leaves(*inputs(1, 1, 4096))
    knobs: dict[str, Any] = {"n_clusters": 64, "n_bits": 32, "impl": "triton"}
    with LargestTensor() as largest:
        clustered_attention(*x, **knobs).sum().backward()
    assert 0 < largest.elements <= 2 * x[0].numel()


def test_double_backward_is_refused_only_when_it_happens() -> None:
    x = leaves(*inputs())
    out = clustered_attention(*x, n_clusters=C, clusters=some_clusters(x[0]))
    (dq,) = torch.autograd.grad(out.square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; impl='reference' has one"):
        dq.sum().backward()


def test_scale_and_its_default() -> None:
    x = inputs()
    expected = clustered_attention(*x, scale=1 / math.sqrt(D), **draws())
    assert torch.equal(clustered_attention(*x, **draws()), expected)
    assert not torch.equal(clustered_attention(*x, scale=1.0, **draws()), expected)
