"""smyrf_attention's options: causal, duplicates corrected, a local round, principal directions, dropout."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import smyrf_attention
from fastattn.methods import smyrf_routing
from fastattn.reference import smyrf as definition
from fastattn.reference.smyrf_hash import heights
from tests.accuracy import assert_as_accurate
from tests.methods.test_smyrf import SIZE, D, draws, inputs
from tests.ops.cases import IMPLS, Three, each, gradients, leaves

WINDOW = 7
LOCAL = {"local_window": WINDOW}
EXACT = {"correct_duplicates": True}
CAUSAL = {"is_causal": True}
OPTIONS: list[dict[str, Any]] = [EXACT, LOCAL, CAUSAL, EXACT | LOCAL, CAUSAL | EXACT | LOCAL]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
KNOBS: dict[str, Any] = {"n_hashes": 3, "q_cluster_size": SIZE}


def one_mask(n: int, seed: int = 2) -> Tensor:
    return torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.7


def dense(q: Tensor, k: Tensor, v: Tensor, **knobs: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **knobs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", ["no mask", "key mask", "both masks"])
@pytest.mark.parametrize(("heads", "kv_heads", "n"), [(4, 2, 75), (2, 2, 1)])
@each_option
def test_are_their_definition(
    options: dict[str, Any], heads: int, kv_heads: int, n: int, masks: str, impl: str
) -> None:
    q, k, v = leaves(*inputs(heads=heads, kv_heads=kv_heads, n=n))
    knobs: dict[str, Any] = {"q_cluster_size": SIZE, **options}
    knobs["key_mask"] = None if masks == "no mask" else one_mask(n)
    knobs["query_mask"] = one_mask(n, seed=3) if masks == "both masks" else None
    out, lse = smyrf_attention(q, k, v, n_hashes=3, projections=draws(), return_lse=True, impl=impl, **knobs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    actual = (out, *gradients(out, (q, k, v), dout))
    results = []
    for dtype in (torch.float32, torch.float64):
        x = leaves(q.to(dtype), k.to(dtype), v.to(dtype))
        o, defined_lse = definition.smyrf_attention(*x, draws(), **knobs)
        results.append((o.detach(), *gradients(o, x, dout)))
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), actual, *results, strict=True):
        assert_as_accurate(a, p, e, name)
    torch.testing.assert_close(lse, defined_lse.detach().float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_duplicates_are_corrected_in_cross_attention_too(impl: str) -> None:
    q, k, v = inputs(n=64, s=100)
    out = smyrf_attention(q, k, v, n_hashes=3, q_cluster_size=SIZE, projections=draws(), impl=impl, **EXACT)
    expected, _ = definition.smyrf_attention(q, k, v, draws(), q_cluster_size=SIZE, **EXACT)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


class TestCausal:
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
    @pytest.mark.parametrize("options", [{}, EXACT, LOCAL, {"dropout_p": 0.2, "seed": 1}], ids=" ".join)
    def test_no_gradient_and_no_value_comes_from_later_positions(
        self, options: dict[str, Any], masked: bool, impl: str
    ) -> None:
        n, row = 64, 30
        q, k, v = leaves(*inputs(n=n))
        knobs: dict[str, Any] = {"projections": draws(), "is_causal": True, "impl": impl, **KNOBS, **options}
        knobs["key_mask"] = one_mask(n) if masked else None
        out = smyrf_attention(q, k, v, **knobs)
        for gradient in gradients(out[:, :, : row + 1], (q, k, v), torch.ones_like(out[:, :, : row + 1])):
            assert gradient[:, :, : row + 1].any() and not gradient[:, :, row + 1 :].any()
        changed = v.detach().clone()
        changed[:, :, row + 1 :] = 1e6
        assert torch.equal(smyrf_attention(q, k, changed, **knobs)[:, :, : row + 1], out[:, :, : row + 1])

    @pytest.mark.parametrize("impl", IMPLS)
    def test_the_first_row_has_its_own_value(self, impl: str) -> None:
        q, k, v = inputs()
        out, lse = smyrf_attention(q, k, v, is_causal=True, return_lse=True, impl=impl, **KNOBS)
        torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
        torch.testing.assert_close(lse[:, :, 0], (q[:, :, 0] * k[:, :, 0]).sum(-1) / D**0.5)

    def test_every_row_meets_its_own_key_once_however_many_rounds(self) -> None:
        q, k, _ = inputs(n=40)
        count = definition.meeting_counts(q, k, draws(64), q_cluster_size=SIZE, is_causal=True)
        assert (count.diagonal(dim1=-2, dim2=-1) == 1).all() and count.amax() > 1 and not count.triu(1).any()

    def test_one_cluster_is_dense_causal_attention(self) -> None:
        q, k, v = inputs(n=40)
        for knobs in ({"n_hashes": 1}, {"n_hashes": 3, **EXACT, **LOCAL}):
            out = smyrf_attention(q, k, v, q_cluster_size=40, is_causal=True, **knobs)
            torch.testing.assert_close(out, dense(q, k, v, is_causal=True), rtol=0, atol=2e-6)

    def test_a_prefix_does_not_give_the_first_rows(self) -> None:
        """The price of clusters made of all positions: routing depends on later tokens."""
        q, k, v = inputs(n=64)
        knobs: dict[str, Any] = {"projections": draws(), "is_causal": True, **KNOBS}
        whole = smyrf_attention(q, k, v, **knobs)
        assert not torch.allclose(smyrf_attention(*each(lambda x: x[:, :, :40], (q, k, v)), **knobs), whole[:, :, :40])


class TestDuplicates:
    def test_keys_met_by_all_are_dense_attention(self) -> None:
        """So the error falls to zero as rounds grow, which it does not without: keys met more often weigh more."""
        q, k, v = inputs(n=24)
        counts = definition.meeting_counts(q, k, draws(200), q_cluster_size=12)
        assert counts.min() > 0 and counts.min() < counts.max()
        errors = {}
        for corrected in (False, True):
            out = smyrf_attention(
                q, k, v, n_hashes=200, q_cluster_size=12, projections=draws(200), correct_duplicates=corrected
            )
            errors[corrected] = float((out - dense(q, k, v)).abs().max())
        assert errors[True] < 5e-6 and errors[False] > 1e-3

    @pytest.mark.parametrize("seed", [0, 1])
    def test_error_falls_with_rounds_and_lies_below_that_without_correction(self, seed: int) -> None:
        q, k, v = inputs(batch=1, heads=4, n=128, seed=seed)
        exact = dense(q, k, v)
        plain, corrected = (
            [
                float((smyrf_attention(
                    q, k, v, n_hashes=rounds, q_cluster_size=SIZE, projections=draws(rounds), correct_duplicates=c
                ) - exact).norm() / exact.norm())
                for rounds in (4, 16, 64)
            ]
            for c in (False, True)
        )  # fmt: skip
        assert all(later < 0.8 * earlier for earlier, later in pairwise(corrected)), corrected
        assert all(c < p for c, p in zip(corrected, plain, strict=True)), (corrected, plain)


class TestLocalWindow:
    def test_a_window_as_long_as_the_input_is_dense_attention(self) -> None:
        q, k, v = inputs(n=20)
        for window in (20, 50):
            out = smyrf_attention(q, k, v, n_hashes=2, q_cluster_size=8, local_window=window, **EXACT)
            torch.testing.assert_close(out, dense(q, k, v), rtol=0, atol=2e-6)

    def test_every_row_meets_all_of_its_window(self) -> None:
        q, k, _ = inputs(n=40)
        count = definition.meeting_counts(q, k, draws(1), q_cluster_size=4, local_window=WINDOW)
        block = torch.arange(40) // WINDOW
        assert (count[:, :, block.unsqueeze(-1) == block] >= 1).all()

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("options", [LOCAL, CAUSAL | EXACT | LOCAL], ids=" ".join)
    def test_padding_on_either_side_moves_no_window(self, options: dict[str, Any], impl: str) -> None:
        x = inputs(n=30)
        knobs: dict[str, Any] = {"projections": draws(), "impl": impl, **KNOBS, **options}
        out = smyrf_attention(*x, **knobs)
        for left, right in ((5, 0), (0, 5), (3, 4)):
            padded = each(lambda y: torch.nn.functional.pad(y, (0, 0, left, right), value=3.0), x)  # noqa: B023
            mask = torch.zeros(2, 30 + left + right, dtype=torch.bool)
            mask[:, left : left + 30] = True
            long = smyrf_attention(*padded, key_mask=mask, **knobs)
            torch.testing.assert_close(long[:, :, left : left + 30], out, rtol=0, atol=2e-6)


class TestPrincipalDirections:
    PRINCIPAL: dict[str, Any] = {"directions": "principal", "q_cluster_size": SIZE}  # noqa: RUF012

    def directions(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, _, dim = q.shape
        group = heads // k.shape[1]
        rows = [slice(None) if mask is None else mask[b] for b in range(batch)]
        each_head = [
            definition.principal_directions(q[b, h, rows[b]].double(), k[b, h // group, rows[b]].double(), 3)
            for b in range(batch)
            for h in range(heads)
        ]
        return torch.stack(each_head).view(batch, heads, dim + 2, 3)

    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
    def test_are_the_leading_singular_vectors(self, masked: bool, kv_heads: int) -> None:
        q, k, v = inputs(heads=4, kv_heads=kv_heads, n=75)
        mask = one_mask(75) if masked else None
        expected = self.directions(q, k, mask)
        q_height, _ = heights(q, k, mask, mask)
        actual = smyrf_routing.principal_directions(q, q_height, mask, 3)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)
        out = smyrf_attention(q, k, v, n_hashes=3, key_mask=mask, **self.PRINCIPAL)
        wanted, _ = definition.smyrf_attention(q, k, v, expected, q_cluster_size=SIZE, key_mask=mask)
        torch.testing.assert_close(out, wanted.float(), rtol=0, atol=2e-6)

    def test_serve_groups_in_a_plane_better_than_random_ones_do(self) -> None:
        g = torch.Generator().manual_seed(0)
        centres = torch.zeros(1, 4, 16, D)
        centres[..., :2] = 2 * torch.randn(1, 4, 16, 2, generator=g)
        group = torch.arange(256) % 16
        q, k = (centres[:, :, group] + 0.5 * torch.randn(1, 4, 256, D, generator=g) for _ in "qk")
        v = torch.randn(1, 4, 256, D, generator=g)
        exact = dense(q, k, v)

        def error(**knobs: Any) -> float:
            out = smyrf_attention(q, k, v, n_hashes=2, q_cluster_size=SIZE, **knobs)
            return float((out - exact).norm() / exact.norm())

        random = [error(projections=draws(2, seed)) for seed in range(6)]
        principal = error(directions="principal")
        assert principal < 0.9 * sum(random) / 6 and principal < min(random), (principal, random)

    def test_take_nothing_from_the_generator(self) -> None:
        g = torch.Generator().manual_seed(3)
        before = g.get_state()
        a, b = (smyrf_attention(*inputs(), n_hashes=2, generator=g, **self.PRINCIPAL) for _ in "ab")
        assert torch.equal(a, b) and torch.equal(g.get_state(), before)

    def test_what_padding_holds_has_no_effect_on_any_bit(self) -> None:
        q, k, v = inputs(n=50)
        mask = one_mask(50)[:, None, :, None]
        results = []
        for filler in (0.0, 1e9, float("nan"), float("inf")):
            x = leaves(*each(lambda y: torch.where(mask, y, filler), (q, k, v)))  # noqa: B023
            out = smyrf_attention(*x, n_hashes=2, key_mask=one_mask(50), **self.PRINCIPAL)
            results.append((out, *gradients(out, x, torch.ones_like(out))))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
        assert torch.isfinite(results[0][0]).all()

    def test_a_head_with_nan_gives_nan_and_leaves_the_others_alone(self) -> None:
        q, k, v = inputs()
        broken = q.clone()
        broken[0, 1, 5] = float("nan")
        out, expected = (smyrf_attention(x, k, v, n_hashes=2, **self.PRINCIPAL) for x in (broken, q))
        assert out[0, 1].isnan().any()
        torch.testing.assert_close(out[1], expected[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(out[0, 0], expected[0, 0], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("n", "masked"), [(1, False), (5, False), (20, True)])
    def test_need_no_variation(self, n: int, masked: bool) -> None:
        q, k, v = inputs(n=n)
        mask = torch.zeros(2, n, dtype=torch.bool) if masked else None
        out = smyrf_attention(q * 0, k, v, n_hashes=D + 1, key_mask=mask, **self.PRINCIPAL)
        assert torch.isfinite(out).all()


class TestDropout:
    @pytest.mark.parametrize("options", [{}, CAUSAL | EXACT | LOCAL], ids=["plain", "with all options"])
    def test_kernel_and_definition_drop_the_same_keys(self, options: dict[str, Any]) -> None:
        results = []
        for impl in (None, "reference"):
            x = leaves(*inputs())
            out = smyrf_attention(*x, projections=draws(), dropout_p=0.3, seed=5, impl=impl, **KNOBS, **options)
            results.append((out, *gradients(out, x, torch.ones_like(out))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    def test_leaves_the_mean_and_the_lse_as_they_are(self) -> None:
        x = inputs()
        knobs: dict[str, Any] = {"projections": draws(), "return_lse": True, **KNOBS}
        expected, expected_lse = smyrf_attention(*x, **knobs)
        results = [smyrf_attention(*x, dropout_p=0.2, seed=seed, **knobs) for seed in range(200)]
        assert all(torch.equal(lse, expected_lse) for _, lse in results)
        mean = torch.stack([out for out, _ in results]).mean(0)
        assert (
            float((mean - expected).norm() / expected.norm())
            < 0.1
            < float((results[0][0] - expected).norm() / expected.norm())
        )

    def test_same_draws_same_bits(self) -> None:
        def out(**knobs: Any) -> Tensor:
            return smyrf_attention(*inputs(), dropout_p=0.5, **KNOBS, **knobs)

        def generator(seed: int) -> dict[str, Any]:
            return {"generator": torch.Generator().manual_seed(seed)}

        assert torch.equal(out(**generator(0)), out(**generator(0)))
        assert not torch.equal(out(**generator(0)), out(**generator(1)))
        given = {"projections": draws()}
        assert torch.equal(out(seed=3, **given), out(seed=3, **given))
        assert torch.equal(out(seed=3, **given), out(seed=torch.tensor(3), **given))
        assert not torch.equal(out(seed=3, **given), out(seed=4, **given))


EVERY: dict[str, Any] = {"directions": "principal", **CAUSAL, **EXACT, **LOCAL, **KNOBS}


class TestInTorch:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    def test_all_options_compile_as_one_graph(self, dropout_p: float) -> None:
        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
            return smyrf_attention(q, k, v, key_mask=key_mask, dropout_p=dropout_p, seed=1, **EVERY)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (64, 75):
            eager, traced = leaves(*inputs(n=n)), leaves(*inputs(n=n))
            expected, out = attend(*eager, one_mask(n)), compiled(*traced, one_mask(n))
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
            wanted = gradients(expected, eager, torch.ones_like(out))
            for a, b in zip(gradients(out, traced, torch.ones_like(out)), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    def test_dropout_compiles_with_its_own_draws(self) -> None:
        compiled = torch.compile(
            lambda q, k, v: smyrf_attention(q, k, v, dropout_p=0.5, **KNOBS), fullgraph=True, backend="aot_eager"
        )
        assert torch.isfinite(compiled(*inputs())).all()

    def test_all_options_export_as_one_node(self) -> None:
        class Attend(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return smyrf_attention(q, k, v, **EVERY)

        program = torch.export.export(Attend().eval(), inputs())
        ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [name for name in ops if name.startswith("fastattn")] == ["fastattn.smyrf_attention.default"]
        torch.testing.assert_close(program.module()(*inputs()), Attend()(*inputs()), rtol=0, atol=1e-6)

    def test_opcheck_of_the_whole_method(self) -> None:
        args = (*inputs(n=75), None, one_mask(75), None, SIZE, None, 0.3, 3, True, True, WINDOW)
        torch.library.opcheck(torch.ops.fastattn.smyrf_attention.default, args)

    @each_option
    def test_definition_has_the_gradient_of_its_output(self, options: dict[str, Any]) -> None:
        x: Three = leaves(*each(lambda y: y[:1, :1].double(), inputs(n=6)))
        knobs: dict[str, Any] = {"q_cluster_size": 3, "n_hashes": 2, "projections": draws(2), "impl": "reference"}
        knobs |= options | ({"local_window": 2} if "local_window" in options else {})
        assert torch.autograd.gradcheck(lambda q, k, v: smyrf_attention(q, k, v, **knobs), x)

    @pytest.mark.filterwarnings("ignore:fastattn runs block attention by its PyTorch definition")
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_half_inputs_are_routed_in_fp32(self, dtype: torch.dtype) -> None:
        x = each(lambda y: y.to(dtype), inputs(n=75))
        out = smyrf_attention(*x, **EVERY)
        wide = smyrf_attention(*each(Tensor.float, x), **EVERY)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), wide, rtol=0, atol=4 * torch.finfo(dtype).eps)
