"""linear_attention and linear_attention_step against the original, against each other, and as citizens of PyTorch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import linear_attention, linear_attention_step
from fastattn.methods.feature_maps import favor_features, random_directions
from fastattn.methods.linear import LinearState, empty_state
from tests.accuracy import original
from tests.device import device_type
from tests.ops.cases import IMPLS, Three, gradients, leaves

D, DV = 8, 6  # of the fixtures, and of all tests here, so that kernels are built once
ORIGINALS = ["linear_elu", "linear_elu_causal", "linear_relu", "linear_favor", "linear_favor_stab_causal", "linear_rff"]


def inputs(batch: int = 2, heads: int = 2, n: int = 70, s: int | None = None, kv_heads: int | None = None) -> Three:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, n, D, generator=g)
    k = torch.randn(batch, kv_heads or heads, s or n, D, generator=g)
    return q, k, torch.randn(batch, kv_heads or heads, s or n, DV, generator=g)


class TestAgainstTheOriginal:
    """The fixtures' tensors are (B, N, H, D)."""

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("name", ORIGINALS)
    def test_equals_it_forward_and_backward(self, name: str, impl: str) -> None:
        f = original(name)
        feature_map: Any = name.split("_")[1]
        knobs: dict[str, Any] = {"omega": f.get("omega"), "is_causal": "causal" in name, "eps": float(f["eps"])}
        if "stab" in name:
            omega = knobs.pop("omega")
            feature_map = lambda x: favor_features(x, omega, stabilize=True)  # noqa: E731
        q, k, v = leaves(*(f[x].transpose(1, 2) for x in "qkv"))
        out = linear_attention(q, k, v, feature_map=feature_map, impl=impl, **knobs)
        torch.testing.assert_close(out.transpose(1, 2), f["out"], rtol=0, atol=2e-6)
        for x, gradient in zip("qkv", gradients(out, (q, k, v), f["w"].transpose(1, 2)), strict=True):
            torch.testing.assert_close(gradient.transpose(1, 2), f["d" + x], rtol=2e-5, atol=5e-6)

    def test_makes_its_features(self) -> None:
        f = original("linear_favor")
        torch.testing.assert_close(favor_features(f["q"], f["omega"]), f["phi_q"], rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_has_its_recurrent_form_and_states(self, impl: str) -> None:
        f = original("linear_elu_causal")
        q, k, v = (f[x].transpose(1, 2) for x in "qkv")
        _, state = linear_attention(q, k, v, is_causal=True, return_state=True, impl=impl)
        outs, stepped = [], empty_state(2, 2, D, DV)
        for at in range(q.shape[2]):
            out, stepped = linear_attention_step(*(x[:, :, at : at + 1] for x in (q, k, v)), stepped)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2).transpose(1, 2), f["recurrent_out"], rtol=0, atol=2e-6)
        for got in (state, stepped):
            torch.testing.assert_close(got.s, f["S_final"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got.z, f["Z_final"], rtol=1e-5, atol=1e-5)


class TestStates:
    @pytest.mark.parametrize("feature_map", ["elu", "relu2", "favor"])
    def test_steps_go_on_from_a_prefix_as_the_causal_form_does(self, feature_map: str) -> None:
        q, k, v = inputs(heads=4, kv_heads=2)
        knobs: dict[str, Any] = {"feature_map": feature_map}
        if feature_map == "favor":
            knobs["omega"] = random_directions(D, 5, generator=torch.Generator().manual_seed(3))
        whole, last = linear_attention(q, k, v, is_causal=True, return_state=True, **knobs)
        prefix, state = linear_attention(
            q[:, :, :40], k[:, :, :40], v[:, :, :40], is_causal=True, return_state=True, **knobs
        )
        outs = [prefix]
        for at in range(40, 70):
            before = LinearState(state.s.clone(), state.z.clone())
            out, after = linear_attention_step(*(x[:, :, at : at + 1] for x in (q, k, v)), state, **knobs)
            assert torch.equal(state.s, before.s) and torch.equal(state.z, before.z)
            outs, state = [*outs, out], after
        torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.s, last.s, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.z, last.z, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_a_sequence_in_two_pieces_is_the_whole_and_so_are_its_gradients(self, impl: str) -> None:
        results = []
        for cut in (70, 33):
            q, k, v = leaves(*inputs(heads=4, kv_heads=2))
            parts, state = [], None
            for rows in (slice(0, cut), slice(cut, 70)):
                if rows.start < rows.stop:
                    out, state = linear_attention(
                        q[:, :, rows], k[:, :, rows], v[:, :, rows],
                        is_causal=True, initial_state=state, return_state=True, impl=impl,
                    )  # fmt: skip
                    parts.append(out)
            out = torch.cat(parts, 2)
            assert state is not None
            loss = (out * torch.arange(DV)).sum() + 0.01 * state.s.square().sum() + 0.01 * state.z.sum()
            results.append((out.detach(), *torch.autograd.grad(loss, (q, k, v))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)

    def test_a_state_holds_keys_that_all_queries_meet(self) -> None:
        q, k, v = inputs(s=90)
        _, state = linear_attention(q, k[:, :, :50], v[:, :, :50], return_state=True)
        out = linear_attention(q, k[:, :, 50:], v[:, :, 50:], initial_state=state)
        torch.testing.assert_close(out, linear_attention(q, k, v), rtol=1e-5, atol=1e-6)

    def test_a_step_has_gradients_to_everything(self) -> None:
        q, k, v = (x.double().requires_grad_() for x in inputs(batch=1, heads=2, kv_heads=1, n=1))
        s = torch.randn(1, 2, D, DV, dtype=torch.float64).requires_grad_()
        z = (torch.rand(1, 2, D, dtype=torch.float64) + 1).requires_grad_()
        from fastattn.ops.linear_attention_step import step_linear

        assert torch.autograd.gradcheck(lambda *x: step_linear(*x, feature_map="elu"), (q, k, v, s, z))

    def test_a_step_is_the_same_with_and_without_gradients(self) -> None:
        q, k, v = inputs(heads=4, kv_heads=2, n=1)
        state = LinearState(torch.randn(2, 4, D, DV), torch.rand(2, 4, D) + 1)
        plain, new = linear_attention_step(q, k, v, state, feature_map="relu")
        traced, other = linear_attention_step(*leaves(q, k, v), state, feature_map="relu")
        assert traced.requires_grad and not plain.requires_grad
        for a, b in ((plain, traced), (new.s, other.s), (new.z, other.z)):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)

    def test_half_tokens_keep_an_fp32_state(self) -> None:
        q, k, v = (x.bfloat16() for x in inputs(n=1))
        out, state = linear_attention_step(q, k, v, empty_state(2, 2, D, DV))
        assert out.dtype == torch.bfloat16 and state.s.dtype == state.z.dtype == torch.float32
        torch.testing.assert_close(out, v, rtol=0, atol=0.01)  # one key: its value


class TestFeatureMaps:
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_a_callable_is_applied_to_queries_and_keys_and_learns(self, is_causal: bool) -> None:
        layer = torch.nn.Linear(D, 2 * D)
        q, k, v = leaves(*inputs())
        out = linear_attention(q, k, v, feature_map=lambda x: layer(x).exp(), is_causal=is_causal)
        weights = layer(q).exp() @ layer(k).exp().mT
        weights = weights.tril() if is_causal else weights
        wanted = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        leaves_of = (layer.weight, q, k, v)
        for a, b in zip(
            torch.autograd.grad(out.square().sum(), leaves_of),
            torch.autograd.grad(wanted.square().sum(), leaves_of),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_what_masked_keys_hold_does_not_reach_what_a_callable_learns(self) -> None:
        layer = torch.nn.Linear(D, 2 * D)
        mask = torch.arange(70).expand(2, -1) < 50
        q, k, v = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in inputs())
        q, k, v = leaves(inputs()[0], k, v)
        out = linear_attention(q, k, v, feature_map=lambda x: layer(x).exp(), key_mask=mask)
        every = torch.autograd.grad(out.sum(), (layer.weight, q, k, v))
        assert torch.isfinite(out).all() and all(torch.isfinite(x).all() for x in every)

    @pytest.mark.parametrize("feature_map", ["favor", "rff", "grf"])
    def test_same_generator_state_gives_same_bits_and_draws_what_may_be_passed_in(self, feature_map: str) -> None:
        x = inputs()
        a, b = (linear_attention(*x, feature_map=feature_map, generator=torch.Generator().manual_seed(7)) for _ in "ab")
        omega = random_directions(D, D, generator=torch.Generator().manual_seed(7))
        assert torch.equal(a, b) and torch.equal(a, linear_attention(*x, feature_map=feature_map, omega=omega))

    @pytest.mark.parametrize("feature_map", ["favor", "grf"])
    def test_random_features_of_half_inputs_are_made_in_fp32(self, feature_map: str) -> None:
        q, k, v = (x.half() for x in inputs())
        omega = random_directions(D, D, generator=torch.Generator().manual_seed(7))
        out = linear_attention(q, k, v, feature_map=feature_map, omega=omega, is_causal=True)
        wide = linear_attention(q.float(), k.float(), v.float(), feature_map=feature_map, omega=omega, is_causal=True)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out.float(), wide, rtol=0, atol=3e-3)


class TestInTorch:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compiles_as_one_graph_with_states(self, dynamic: bool) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
            return linear_attention(
                q, k, v, is_causal=True, key_mask=key_mask, initial_state=state, return_state=True
            )  # fmt: skip

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (64, 75):
            rest = (torch.arange(n).expand(2, -1) < n - 9, empty_state(2, 2, D, DV))
            eager, traced = leaves(*inputs(n=n)), leaves(*inputs(n=n))
            (expected, wanted_state), (out, state) = attend(*eager, *rest), compiled(*traced, *rest)
            assert torch.equal(out, expected) and torch.equal(state.s, wanted_state.s)
            wanted = gradients(expected, eager, torch.ones_like(out))
            actual = gradients(out, traced, torch.ones_like(out))
            assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))

    def test_a_step_compiles_as_one_graph(self) -> None:
        compiled = torch.compile(linear_attention_step, fullgraph=True, backend="aot_eager")
        x, state = inputs(n=1), empty_state(2, 2, D, DV)
        (out, new), (expected, wanted) = compiled(*x, state), linear_attention_step(*x, state)
        assert torch.equal(out, expected) and torch.equal(new.s, wanted.s)

    def test_exports_as_one_node(self) -> None:
        class Attend(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
                return linear_attention(q, k, v, key_mask=key_mask)

        args = (*inputs(), torch.arange(70).expand(2, -1) < 50)
        program = torch.export.export(Attend(), args)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert names.count("fastattn.linear_attention.default") == 1
        assert torch.equal(program.module()(*args), Attend()(*args))

    @pytest.mark.parametrize("feature_map", ["elu", "favor"])
    def test_autocast_casts_as_sdpa_does(self, feature_map: str) -> None:
        x = leaves(*inputs())
        omega = None if feature_map == "elu" else random_directions(D, D, generator=torch.Generator().manual_seed(0))
        knobs: dict[str, Any] = {"feature_map": feature_map, "omega": omega, "is_causal": True}
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            out = linear_attention(*x, **knobs)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, linear_attention(*(y.bfloat16() for y in x), **knobs))
        assert all(gradient.dtype == torch.float32 for gradient in gradients(out, x, torch.ones_like(out)))

    def test_double_backward_is_refused_and_the_reference_has_it(self) -> None:
        x = leaves(*inputs())
        (dq,) = torch.autograd.grad(linear_attention(*x).square().sum(), x[0], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; impl='reference' has one"):
            dq.sum().backward()
        out = linear_attention(*x, impl="reference")
        (dq,) = torch.autograd.grad(out.square().sum(), x[0], create_graph=True)
        dq.sum().backward()
        assert x[0].grad is not None and torch.isfinite(x[0].grad).all()


def test_the_page_runs_as_it_stands() -> None:
    page = Path(__file__).parents[2].joinpath("docs/linear.md").read_text()
    names: dict[str, Any] = {}
    for text in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(text, names)
    assert names["token"].shape == (1, 8, 1, 64)
