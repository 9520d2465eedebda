"""Linear attention, kernels and definition alike, against the definition in fp64; and the choice between the two."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported
from fastattn.ops import fallback
from fastattn.ops import linear_attention as op
from fastattn.ops.linear_attention import attend_linear
from tests.accuracy import assert_as_accurate
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, needs_compiler
from tests.ops.linear_cases import LinearCase, results

GROUPED: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2}
ALL: dict[str, Any] = {"has_mask": True, "has_state": True}
# each combination of dims, map and flags is a build of some kernels
CASES = {
    "B2-H4-Hkv2-N150 elu, causal, mask, state": LinearCase(**GROUPED, **ALL, is_causal=True),
    "B2-H4-Hkv2-N70-S610 relu2, mask, state": LinearCase(
        **GROUPED, **ALL, n_queries=70, n_keys=610, feature_map="relu2"
    ),
    "N131-F160-Dv140 identity, causal": LinearCase(
        n_queries=131, n_keys=131, features=160, value_dim=140, feature_map="identity", is_causal=True
    ),
    "N40-S90-D40-Dv24 relu": LinearCase(n_queries=40, n_keys=90, features=40, value_dim=24, feature_map="relu"),
    "N9-D1-Dv3 elu, causal": LinearCase(n_queries=9, n_keys=9, features=1, value_dim=3, is_causal=True),
}
RELU = CASES["N40-S90-D40-Dv24 relu"]
CAUSAL = CASES["B2-H4-Hkv2-N150 elu, causal, mask, state"]
WHOLE = CASES["B2-H4-Hkv2-N70-S610 relu2, mask, state"]


def attend(case: LinearCase, inputs: list[Tensor], impl: str) -> tuple[Tensor, Tensor]:
    q, k, v, *initial = inputs
    return attend_linear(q, k, v, initial=initial[0] if initial else None, impl=impl, **case.options())


def check(case: LinearCase, dtype: torch.dtype, impl: str) -> None:
    inputs = case.inputs(dtype)
    out, state = attend(case, inputs, impl)
    assert out.dtype == dtype and state.dtype == torch.float32
    actual = results(case, out, state, inputs)
    plain, exact = (case.defined(to, inputs) for to in (dtype, torch.float64))
    for name, value in actual.items():
        if "state" in name or "initial" in name:
            # what is summed up in fp32 has the rounding of its 16-bit summands
            scale = exact[name].abs().max()
            near = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(value / scale, (exact[name] / scale).float(), rtol=0, atol=near)
        else:
            assert_as_accurate(value, plain[name], exact[name], name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_as_accurate_as_plain_pytorch(case: LinearCase, impl: str) -> None:
    check(case, torch.float32, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CAUSAL, torch.float16), (WHOLE, torch.bfloat16)],
    ids=["causal, fp16", "all keys, bf16"],
)
def test_half_inputs_are_accurate_to_their_own_rounding(case: LinearCase, dtype: torch.dtype, impl: str) -> None:
    check(case, dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp16_sums_may_be_larger_than_fp16(impl: str) -> None:
    n = 600
    q, k = (torch.full((1, 2, n, 16), 60.0, dtype=torch.float16, requires_grad=True) for _ in "qk")
    v = torch.linspace(-1, 1, n, dtype=torch.float16).view(1, 1, n, 1).expand(1, 2, n, 16)
    v = v.contiguous().requires_grad_()
    # as the half case has it, so that the kernels are there
    options = {"is_causal": True, "key_mask": torch.ones(1, n, dtype=torch.bool), "initial": torch.zeros(1, 2, 16 * 17)}
    out, state = attend_linear(q, k, v, feature_map="elu", impl=impl, **options)
    wanted = v.float().cumsum(2) / torch.arange(1, n + 1).view(-1, 1)
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=2e-3)
    torch.testing.assert_close(state[..., -16:], torch.full((1, 2, 16), 61.0 * n))
    dv = torch.autograd.grad(out.float().sum(), v)[0].float()
    torch.testing.assert_close(dv.sum(2), torch.full((1, 2, 16), float(n)), rtol=2e-2, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_fp32_features_stand_beside_half_values(impl: str) -> None:
    case = LinearCase(n_queries=70, n_keys=70, feature_map="identity", is_causal=True)
    q, k, v = case.inputs()
    half = v.detach().bfloat16().requires_grad_()
    out, state = attend_linear(q, k, half, is_causal=True, impl=impl)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    wanted, _ = attend_linear(q, k, half.float(), is_causal=True, impl="reference")
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=0.01)
    dq, dk, dv = torch.autograd.grad(out.float().sum(), (q, k, half))
    assert (dq.dtype, dk.dtype, dv.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    exact = torch.autograd.grad(wanted.sum(), (q, k, half))
    for a, e in zip((dq, dk, dv), exact, strict=True):
        torch.testing.assert_close(a.float(), e.float(), rtol=0, atol=0.02 * float(e.abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
class TestDenominators:
    def test_of_zero_give_zero_and_zero_gradients(self, impl: str) -> None:
        q, k, v = RELU.inputs()
        with torch.no_grad():
            q[:, :, 3] = -1.0
        for eps in (1e-6, 0.0):
            out, _ = attend_linear(q, k, v, feature_map="relu", eps=eps, impl=impl)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            assert not out[:, :, 3].any() and not dq[:, :, 3].any()
            assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))

    def test_have_eps_added_as_it_is(self, impl: str) -> None:
        q, k, v = RELU.inputs()
        weights = torch.relu(q) @ torch.relu(k).mT
        out, _ = attend_linear(q, k, v, feature_map="relu", eps=30.0, impl=impl)
        torch.testing.assert_close(out, weights @ v / (weights.sum(-1, keepdim=True) + 30), rtol=1e-5, atol=1e-6)

    def test_without_any_key_are_zero_too(self, impl: str) -> None:
        q, k, v, initial = CAUSAL.inputs()
        empty = {"key_mask": torch.zeros(2, 150, dtype=torch.bool), "initial": torch.zeros_like(initial)}
        for eps in (1e-6, 0.0):
            out, state = attend_linear(q, k, v, feature_map="elu", is_causal=True, eps=eps, impl=impl, **empty)
            every = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            assert not out.any() and not state.any() and not any(x.any() for x in every)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", [CAUSAL, WHOLE], ids=["causal", "all keys"])
def test_what_masked_keys_hold_has_no_effect(case: LinearCase, impl: str) -> None:
    results_of = []
    for poison in (0.0, math.nan, math.inf):
        inputs = case.inputs()
        masked = ~case.mask()[:, None, :, None]  # pyright: ignore[reportOptionalSubscript]
        inputs[1:3] = [x.detach().masked_fill(masked, poison).requires_grad_() for x in inputs[1:3]]
        out, state = attend(case, inputs, impl)
        results_of.append(results(case, out, state, inputs))
    for other in results_of[1:]:
        assert all(torch.equal(other[name], value) for name, value in results_of[0].items())
    assert all(torch.isfinite(value).all() for value in results_of[0].values())
    for name in ("dk", "dv"):
        assert not results_of[0][name].masked_select(masked).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any, impl: str) -> None:
    case = LinearCase(batch=2, n_queries=70, n_keys=70, is_causal=True, has_mask=True, has_state=True)
    q, k, v, initial = (x.detach() for x in case.inputs())
    tensors = [layout(x) for x in (q, k, v)]
    outs = []
    for given in (tensors, [x.contiguous() for x in tensors]):
        leaves = [x.detach().requires_grad_() for x in given] + [initial.clone().requires_grad_()]
        out, state = attend(case, leaves, impl)
        outs.append(results(case, out, state, leaves))
    for name, value in outs[0].items():
        torch.testing.assert_close(value, outs[1][name], rtol=0, atol=2e-6 * float(value.abs().max() + 1), msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_gives_same_bits_on_any_number_of_threads(impl: str) -> None:
    before = torch.get_num_threads()
    got = []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            inputs = CAUSAL.inputs()
            out, state = attend(CAUSAL, inputs, impl)
            got.append(results(CAUSAL, out, state, inputs))
    finally:
        torch.set_num_threads(before)
    pairs = [(0, 2)] if impl == "reference" else [(0, 1), (0, 2)]  # torch's own products may split up otherwise
    for i, j in pairs:
        assert all(torch.equal(got[i][name], value) for name, value in got[j].items())


@needs_compiler
def test_the_length_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import linear_attention as kernels

    inputs = CAUSAL.inputs()
    expected = results(CAUSAL, *attend(CAUSAL, inputs, "triton"), inputs)
    tuned = Config({"BLOCK_M": 32, "BLOCK_F": 16, "BLOCK_DV": 16})
    monkeypatch.setattr(op, "stamp", lambda: "of this test")
    monkeypatch.setattr(op, "lookup", lambda name, *_: tuned if "BLOCK_M" in kernels.TUNING[name].blocks else None)
    for name, value in results(CAUSAL, *attend(CAUSAL, inputs, "triton"), inputs).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_compiler
def test_kernels_that_share_states_share_their_tiles() -> None:
    from fastattn.kernels import linear_attention as kernels

    tuned = {"linear_attention_gradients": Config({"BLOCK_M": 32, "BLOCK_F": 16, "BLOCK_DV": 16})}
    names = ("linear_attention_states", "linear_attention_scan", *tuned, "linear_attention_outputs")
    config = kernels.configurations(names, "cpu", 64, 64, 4, True, tuned)
    assert config["linear_attention_outputs"].blocks["BLOCK_M"] == 32
    assert kernels.chunk_length(1000, True, config) == 32


@needs_compiler
def test_states_of_a_whole_sequence_are_few() -> None:
    from fastattn.kernels.linear_attention import chunk_length

    assert chunk_length(100, False, {}) == 512
    assert -(-(2**20) // chunk_length(2**20, False, {})) <= 64


class TestChoiceOfImplementation:
    @pytest.fixture
    def lacking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that can't run the kernels, for a reason that nobody has been warned of."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise Unsupported("the moon is full")

        monkeypatch.setattr(op, "kernel_room", lambda room: SimpleNamespace(forward=refuse, backward=refuse))
        monkeypatch.setattr(fallback, "_warned", set())

    @pytest.mark.usefixtures("lacking")
    @pytest.mark.parametrize("case", [CAUSAL, WHOLE], ids=["causal", "all keys"])
    def test_falls_back_to_the_definition_with_one_warning(self, case: LinearCase) -> None:
        inputs = case.inputs()
        initial = inputs[3]
        with pytest.warns(UserWarning, match="linear attention by its PyTorch definition, because the moon is full"):
            out, state = attend_linear(*inputs[:3], initial=initial, **case.options())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actual = results(case, out, state, inputs)
        exact = case.defined(torch.float64, inputs)
        for name, value in actual.items():
            scale = float(exact[name].abs().max())
            torch.testing.assert_close(value.double() / scale, exact[name] / scale, rtol=0, atol=2e-6, msg=name)

    @pytest.mark.usefixtures("lacking")
    def test_triton_means_no_fallback(self) -> None:
        with pytest.raises(Unsupported, match="moon"):
            attend(CAUSAL, CAUSAL.inputs(), "triton")
