"""improved_clustered_attention: parity with the original, its definition, gradients, and PyTorch's own machinery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import improved_clustered_attention
from fastattn.reference.improved_clustered import improved_clustered_attention as definition
from tests.accuracy import assert_as_accurate, original
from tests.bad_input import Bad, Change, each_of
from tests.device import device_type
from tests.ops.cases import IMPLS, Three, each, gradients, leaves

C, D = 5, 8


def inputs(batch: int = 2, heads: int = 2, n: int = 40, dtype: torch.dtype = torch.float32) -> Three:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, D, generator=g).to(dtype) for _ in range(3))
    return q, k, v


def given(q: Tensor) -> Tensor:
    return torch.randint(C, q.shape[:3], generator=torch.Generator().manual_seed(1), dtype=torch.int32)


@pytest.mark.parametrize("impl", IMPLS)
class TestTheOriginal:
    def compare(self, name: str, impl: str, examples: int = 2, from_hashes: bool = True, **knobs: Any) -> None:
        made = original(name)
        x = leaves(*(made[tensor].transpose(1, 2)[:examples] for tensor in "qkv"))
        if from_hashes:
            knobs |= {"planes": made["planes"], "initial_centroids": made["init_idx"], "n_bits": int(made["bits"])}
            knobs["n_iterations"] = int(made["iterations"])
        else:
            knobs["clusters"] = made["clusters"][:examples]
        out = improved_clustered_attention(
            *x, n_clusters=C, topk=int(made["topk"]), detach_mass=True, impl=impl, **knobs
        )
        actual = (out, *torch.autograd.grad(out, x, made["w"].transpose(1, 2)[:examples]))
        for a, tensor in zip(actual, ("out", "dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(a, made[tensor].transpose(1, 2)[:examples], rtol=1e-5, atol=1e-5)

    def test_gives_the_same_out_and_gradients_with_the_mass_as_a_constant(self, impl: str) -> None:
        self.compare("improved", impl)

    def test_with_longer_lists_too(self, impl: str) -> None:
        """Not its second example: there the original attends to padding (its list is longer than the example)."""
        self.compare("improved_short_topk", impl, examples=1)

    def test_causal_gives_the_same(self, impl: str) -> None:
        """With its clusters: one lost all members, and the original then draws bits that no seed sets."""
        self.compare("improved_causal", impl, from_hashes=False, is_causal=True)


def solve(attention: Any, x: Three, *args: Any, **knobs: Any) -> tuple[Tensor, ...]:
    x = leaves(*x)
    out = attention(*x, *args, **knobs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, x, dout)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "knobs",
    [{}, {"detach_mass": True}, {"is_causal": True}, {"key_mask": True, "scale": 0.7}, {"dropout_p": 0.4}],
    ids=lambda knobs: ", ".join(knobs) or "plain",
)
def test_is_its_definition_in_fp64(knobs: dict[str, Any], impl: str) -> None:
    x = inputs()
    knobs = dict(knobs)
    if "key_mask" in knobs:
        knobs["key_mask"] = torch.arange(40) < torch.tensor([[33], [3]])
    clusters = given(x[0])
    if "key_mask" in knobs:
        clusters = clusters.masked_fill(~knobs["key_mask"].unsqueeze(1), -1)
    seeds = torch.Generator().manual_seed(9)
    drawn = knobs | (
        {"seeds": [int(torch.randint(2**63 - 1, (), generator=seeds)) for _ in "ab"]} if "dropout_p" in knobs else {}
    )
    plain, exact = (
        solve(definition, each(lambda y, d=d: y.to(d), x), clusters, C, topk=6, **drawn)
        for d in (torch.float32, torch.float64)
    )
    generator = torch.Generator().manual_seed(9)
    actual = solve(
        improved_clustered_attention,
        x,
        n_clusters=C,
        topk=6,
        clusters=clusters,
        impl=impl,
        generator=generator,
        **knobs,
    )
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        assert_as_accurate(a, p, e, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype, impl: str) -> None:
    x = inputs(dtype=dtype)
    clusters = given(x[0])
    exact = solve(definition, each(Tensor.double, x), clusters, C, topk=6)  # type: ignore[call-arg]
    actual = solve(improved_clustered_attention, x, n_clusters=C, topk=6, clusters=clusters, impl=impl)
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, exact, strict=True):
        assert a.dtype == dtype
        error, largest = float((a.double() - e).abs().max()), max(1.0, float(e.abs().max()))
        assert error <= 8 * torch.finfo(dtype).eps * largest, (name, error)


class TestGradients:
    def test_are_exact_in_fp64_the_mass_included(self) -> None:
        x = leaves(*inputs(1, 1, 8, torch.float64))
        knobs: dict[str, Any] = {"n_clusters": 2, "topk": 3, "impl": "reference", "clusters": given(x[0]) % 2}
        assert torch.autograd.gradcheck(lambda *y: improved_clustered_attention(*y, **knobs), x)
        assert torch.autograd.gradcheck(lambda *y: improved_clustered_attention(*y, is_causal=True, **knobs), x)

    def test_the_mass_has_one_unless_it_is_detached(self) -> None:
        x = inputs()
        true, detached = (
            solve(improved_clustered_attention, x, n_clusters=C, topk=6, clusters=given(x[0]), detach_mass=detach)
            for detach in (False, True)
        )
        assert torch.equal(true[0], detached[0]) and torch.equal(true[3], detached[3])
        assert not torch.allclose(true[1], detached[1]) and not torch.allclose(true[2], detached[2])

    def test_a_second_derivative_is_refused(self) -> None:
        x = leaves(*inputs())
        out = improved_clustered_attention(*x, n_clusters=C, topk=6, clusters=given(x[0]))
        (dv,) = torch.autograd.grad(out.square().sum(), x[2], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dv.sum().backward()


class TestInTorch:
    @pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
    def test_compiles_as_one_graph(self, is_causal: bool) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor, clusters: Tensor, mask: Tensor) -> Tensor:
            return improved_clustered_attention(
                q, k, v, n_clusters=C, topk=6, clusters=clusters, key_mask=mask, is_causal=is_causal
            )

        mask = torch.arange(40) < torch.tensor([[33], [3]])
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        eager, x = leaves(*inputs()), leaves(*inputs())
        out, expected = compiled(*x, given(x[0]), mask), attend(*eager, given(x[0]), mask)
        assert torch.equal(out, expected)
        for a, b in zip(gradients(out, x, out), gradients(expected, eager, out), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_exports_as_one_node_with_what_it_draws_as_constants(self, dropout_p: float) -> None:
        g = torch.Generator()
        knobs: dict[str, Any] = {"n_clusters": C, "topk": 6, "n_bits": 6, "dropout_p": dropout_p, "generator": g}

        class Attend(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return improved_clustered_attention(q, k, v, impl="reference", **knobs)

        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
        g.manual_seed(1)
        program = torch.export.export(Attend(), inputs(), dynamic_shapes=({0: batch, 2: length},) * 3, strict=False)
        ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert ops == ["fastattn.improved_clustered_attention.default"]
        x = inputs(batch=3, n=57)
        g.manual_seed(1)
        assert torch.equal(program.module()(*x), Attend()(*x))

    def test_the_exported_op_is_for_inference(self) -> None:
        x, clusters = inputs(), given(inputs()[0])
        op, knobs = torch.ops.fastattn.improved_clustered_attention.default, (C, 16, 3, 6, False, False, 0.3)
        no_draws = (None, None, None, clusters)
        torch.library.opcheck(op, (*x, *no_draws, torch.rand(2, 40) < 0.7, None, *knobs, 0.0, None, None, "reference"))
        out = op(*leaves(*x), *no_draws, None, None, *knobs, 0.0, None, None, "reference")
        with pytest.raises(RuntimeError, match="inference only"):
            out.sum().backward()

    def test_autocast_casts_as_sdpa_does(self) -> None:
        x = leaves(*inputs())
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            out = improved_clustered_attention(*x, n_clusters=C, topk=6, clusters=given(x[0]))
        halves = each(Tensor.bfloat16, x)
        expected = improved_clustered_attention(*halves, n_clusters=C, topk=6, clusters=given(x[0]))
        assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        assert all(gradient.dtype == torch.float32 for gradient in gradients(out, x, torch.ones_like(out)))

    def test_draws_are_the_generators(self) -> None:
        x = inputs()
        knobs: dict[str, Any] = {"n_clusters": C, "topk": 6, "dropout_p": 0.3}
        first, second, other = (
            improved_clustered_attention(*x, **knobs, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, second) and not torch.equal(first, other)


BAD: list[Bad] = [
    ("topk", ValueError, "none", lambda a: 0),
    ("topk", TypeError, "not an int", lambda a: 1.5),
    ("is_causal", TypeError, "not a bool", lambda a: 1),
    ("is_causal", ValueError, "another number of keys", lambda a: True),
    ("detach_mass", TypeError, "not a bool", lambda a: None),
    ("dropout_p", ValueError, "1", lambda a: 1.0),
    ("n_clusters", ValueError, "none", lambda a: 0),
    ("clusters", ValueError, "a number too high", lambda a: given(a["q"]) + 1),
    ("key_mask", TypeError, "not bool", lambda a: torch.ones(2, 41)),
    ("query_mask", ValueError, "length", lambda a: torch.ones(2, 41, dtype=torch.bool)),
    ("generator", TypeError, "a seed", lambda a: 5),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_what_is_wrong_is_named(name: str, error: type[Exception], change: Change) -> None:
    q, _, _ = inputs()
    _, k, v = inputs(n=41)
    args: dict[str, Any] = {"q": q, "k": k, "v": v, "n_clusters": C}
    with pytest.raises(error, match=rf"^{name}\b"):
        improved_clustered_attention(**args | {name: change(args)})
