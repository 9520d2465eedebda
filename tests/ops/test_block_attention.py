"""block_attention, kernel and definition alike, against the definition in fp64; and the choice between the two."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported
from fastattn.ops import block_attention as op
from fastattn.ops import fallback
from fastattn.ops.block_attention import block_attention
from fastattn.reference import block_attention as reference
from tests.accuracy import assert_as_accurate
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, Case, each, gradients, leaves, needs_compiler

# each combination of head dims, block sizes and boolean options is a build of its own, so that cases share them
GROUPED: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2}
CASES = {
    "B1-N48-D16 own block": Case(),
    "B2-H4-Hkv2-N67-S53 look back, with padding": Case(
        **GROUPED, n_queries=67, n_keys=53, n_blocks=5, c_q=16, c_k=13, options={"look_back": 1}
    ),
    "B1-H3-Hkv1-N40-S90 look both ways, rows left out": Case(
        heads=3, kv_heads=1, n_queries=40, n_keys=90, rounds=3, n_blocks=2, c_q=15, c_k=16,
        options={"look_back": 1, "look_ahead": 1, "scale": 0.9},
    ),
    "N30 one block, windows round the end": Case(
        n_queries=30, n_keys=30, n_blocks=1, c_q=16, c_k=10, options={"look_back": 2, "look_ahead": 1}
    ),
    "N61 causal, no wrap": Case(
        n_queries=61, n_keys=61, n_blocks=4, options={"is_causal": True, "wrap": False, "look_back": 1}
    ),
    "N61 causal, exclude self": Case(
        **GROUPED, n_queries=61, n_keys=61, n_blocks=4, options={"is_causal": True, "self_mode": "exclude"}
    ),
    "N48 exclude self, no wrap": Case(options={"self_mode": "exclude", "wrap": False, "look_ahead": 1}),
    "N50 own scale, masked keys": Case(n_queries=50, n_keys=50, n_blocks=4, options={"key_mask": True, "scale": 0.5}),
    "N77-D40-Dv24": Case(
        **GROUPED, n_queries=77, n_keys=77, head_dim=40, value_dim=24, n_blocks=2, c_q=39, c_k=39
    ),
    "N70-D80": Case(n_queries=70, n_keys=75, head_dim=80, value_dim=80, n_blocks=2, c_q=35, c_k=38),
    "N70-D96-Dv64": Case(n_queries=70, n_keys=70, head_dim=96, value_dim=64, n_blocks=2, c_q=35, c_k=35),
    "N150-D64 blocks of 75": Case(n_queries=150, n_keys=150, head_dim=64, value_dim=64, n_blocks=2, c_q=75, c_k=75),
    "N20-D256 one round": Case(
        n_queries=20, n_keys=20, head_dim=256, value_dim=256, rounds=1, n_blocks=2, c_q=10, c_k=10
    ),
    "N9-D1-Dv3 one round": Case(n_queries=9, n_keys=9, head_dim=1, value_dim=3, rounds=1, c_q=4, c_k=3),
    "N1-S1": Case(n_queries=1, n_keys=1, rounds=1, n_blocks=1, c_q=1, c_k=1),
}  # fmt: skip


def options_of(case: Case) -> dict[str, Any]:
    options = dict(case.options)
    if "key_mask" in options:
        options["key_mask"] = torch.arange(case.n_keys).expand(case.batch, -1) % 4 != 2
    return options


def defined(case: Case, dtype: torch.dtype, inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) by the definition, in ``dtype``."""
    inputs = leaves(*(x.to(dtype) for x in inputs))
    out, lse = reference.block_attention(*inputs, *case.indices(), **options_of(case))
    return out.detach(), lse.detach(), *gradients(out, inputs, dout)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_as_accurate_as_plain_pytorch(case: Case, impl: str) -> None:
    inputs = leaves(*case.inputs())
    out, lse = block_attention(*inputs, *case.indices(), **options_of(case), impl=impl)
    assert out.shape == (case.batch, case.heads, case.n_queries, case.value_dim)
    assert lse.shape == out.shape[:3] and lse.dtype == torch.float32 and not lse.requires_grad
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    actual = (out, lse, *gradients(out, inputs, dout))
    plain, exact = (defined(case, dtype, inputs, dout) for dtype in (torch.float32, torch.float64))
    empty = exact[1] == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    for name, a, p, e in zip(("out", "lse", "dq", "dk", "dv"), actual, plain, exact, strict=True):
        if name == "lse":
            a, p, e = (x.masked_fill(empty, 0.0) for x in (a, p, e))
        assert_as_accurate(a, p, e, name)


HALF_CASES = [
    "B2-H4-Hkv2-N67-S53 look back, with padding", "N77-D40-Dv24", "N150-D64 blocks of 75", "N9-D1-Dv3 one round"
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", HALF_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype, name: str, impl: str) -> None:
    case = CASES[name]
    inputs = leaves(*case.inputs(dtype))
    out, lse = block_attention(*inputs, *case.indices(), **options_of(case), impl=impl)
    assert out.dtype == dtype and lse.dtype == torch.float32
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = gradients(out, inputs, dout)
    plain, exact = (defined(case, d, inputs, dout) for d in (dtype, torch.float64))
    for what, a, p, e in zip(
        ("out", "dq", "dk", "dv"), (out, *actual), (plain[0], *plain[2:]), (exact[0], *exact[2:]), strict=True
    ):
        assert_as_accurate(a, p, e, what)


@pytest.mark.parametrize("impl", IMPLS)
class TestRowsWithoutKeys:
    def test_give_zero_and_zero_gradients(self, impl: str) -> None:
        case = Case()
        inputs = leaves(*case.inputs())
        q_index, k_index = case.indices()
        q_index[:, :, 1] = q_index[:, :, 0]
        k_index[:, :, :, 1] = -1
        alone = q_index[:, :, 0, 1].long()  # [1, 2, 16]
        out, lse = block_attention(*inputs, q_index, k_index, impl=impl)
        dq, dk, dv = gradients(out, inputs, torch.ones_like(out))
        rows = alone.unsqueeze(-1).expand(-1, -1, -1, 16)
        assert not out.gather(2, rows).any() and not dq.gather(2, rows).any()
        assert torch.equal((lse == -math.inf).sum(-1), torch.full((1, 2), 16))
        assert (lse.gather(2, alone) == -math.inf).all()
        assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))

    def test_may_be_all_of_them(self, impl: str) -> None:
        case = Case()
        inputs = leaves(*case.inputs())
        q_index, k_index = case.indices()
        out, lse = block_attention(*inputs, q_index, torch.full_like(k_index, -1), impl=impl)
        assert not out.any() and (lse == -math.inf).all()
        assert not any(gradient.any() for gradient in gradients(out, inputs, torch.ones_like(out)))

    def test_in_no_block_may_hold_nan(self, impl: str) -> None:
        case = Case(options={"look_back": 1})
        q, k, v = case.inputs()
        q_index, k_index = (torch.where(index % 5 == 0, -1, index) for index in case.indices())
        clean, _ = block_attention(q, k, v, q_index, k_index, look_back=1, impl=impl)
        for tensor in (q, k, v):
            tensor[:, :, ::5] = math.nan
        inputs = leaves(q, k, v)
        out, _ = block_attention(*inputs, q_index, k_index, look_back=1, impl=impl)
        assert torch.equal(out, clean)
        dout = torch.ones_like(out)
        dout[:, :, ::5] = math.nan
        assert all(torch.isfinite(gradient).all() for gradient in gradients(out, inputs, dout))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any, impl: str) -> None:
    case = Case()
    inputs = each(layout, case.inputs())
    expected, expected_lse = block_attention(*each(Tensor.contiguous, inputs), *case.indices(), impl=impl)
    out, lse = block_attention(*inputs, *case.indices(), impl=impl)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    places = leaves(*inputs)  # clones keep strides where no memory overlaps
    dout = layout(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    actual = gradients(block_attention(*places, *case.indices(), impl=impl)[0], places, dout)
    plain = leaves(*each(Tensor.contiguous, inputs))
    wanted = gradients(block_attention(*plain, *case.indices(), impl=impl)[0], plain, dout.contiguous())
    for gradient, exact in zip(actual, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_indices_need_not_be_contiguous(impl: str) -> None:
    case = Case()
    q_index, k_index = case.indices()
    strided = (torch.stack([x, x * 0 + 10**6], -1)[..., 0] for x in (q_index, k_index))
    out, _ = block_attention(*case.inputs(), *strided, impl=impl)
    assert torch.equal(out, block_attention(*case.inputs(), q_index, k_index, impl=impl)[0])


@needs_compiler
def test_rows_that_stand_beyond_two_to_the_31_elements_are_found(tmp_path: Path) -> None:
    # a sparse file: the gaps between the rows take neither memory nor disk
    stride = 2**30
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + 16)
    far = storage.as_strided((1, 1, 4, 16), (0, 0, stride, 1))
    torch.manual_seed(0)
    near = torch.randn(1, 1, 4, 16)
    far.copy_(near)
    index = torch.arange(4, dtype=torch.int32).view(1, 1, 1, 1, 4)
    out, lse = block_attention(far, far, far, index, index, impl="triton")
    expected, expected_lse = block_attention(near, near, near, index, index, impl="triton")
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_nan_and_infinity_reach_the_rows_that_meet_them_and_no_others(place: str, value: float, impl: str) -> None:
    case = Case()
    inputs = dict(zip("qkv", case.inputs(), strict=True))
    inputs[place][0, 1, 7, 3] = value
    out, lse = block_attention(**inputs, q_index=case.indices()[0], k_index=case.indices()[1], impl=impl)
    exact = {name: x.double() for name, x in inputs.items()}
    expected, expected_lse = block_attention(
        **exact, q_index=case.indices()[0], k_index=case.indices()[1], impl="reference"
    )
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if not math.isinf(value):
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_input_gives_same_bits(impl: str) -> None:
    case = CASES["B2-H4-Hkv2-N67-S53 look back, with padding"]

    def run() -> tuple[Tensor, ...]:
        inputs = leaves(*case.inputs())
        out, lse = block_attention(*inputs, *case.indices(), look_back=1, impl=impl)
        return out, lse, *gradients(out, inputs, torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [48, 2**31 - 1, -2])
@pytest.mark.parametrize("name", ["q_index", "k_index"])
def test_rows_out_of_range_are_refused(name: str, bad: int, impl: str) -> None:
    case = Case()
    q_index, k_index = case.indices()
    index: dict[str, Any] = {"q_index": q_index, "k_index": k_index}
    index[name][0, 1, 1, 2, 3] = bad
    with pytest.raises(ValueError, match=name):
        block_attention(*case.inputs(), **index, impl=impl)


class TestChoiceOfImplementation:
    @pytest.fixture
    def lacking(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine that can't run the kernel, for a reason that nobody has been warned of."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise Unsupported("the moon is full")

        monkeypatch.setattr(op, "kernel_room", lambda room: SimpleNamespace(forward=refuse, backward=refuse))
        monkeypatch.setattr(fallback, "_warned", set())

    @pytest.mark.usefixtures("lacking")
    def test_falls_back_to_the_definition_with_one_warning_for_a_reason(self) -> None:
        case = Case()
        inputs = leaves(*case.inputs())
        with pytest.warns(UserWarning, match="because the moon is full. Results are right"):
            out, lse = block_attention(*inputs, *case.indices())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            block_attention(*inputs, *case.indices())
            actual = gradients(out, inputs, torch.ones_like(out))
        expected, expected_lse, *wanted = defined(case, torch.float32, inputs, torch.ones_like(out))
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        for gradient, exact in zip(actual, wanted, strict=True):
            torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-6)

    @pytest.mark.usefixtures("lacking")
    def test_triton_means_no_fallback(self) -> None:
        case = Case()
        with pytest.raises(Unsupported, match="moon"):
            block_attention(*case.inputs(), *case.indices(), impl="triton")

    @needs_compiler
    def test_tuned_configurations_reach_the_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastattn.kernels import block_attention as kernels

        asked: dict[str, Any] = {}
        launched: dict[str, Config] = {}
        tuned = Config({"BLOCK_M": 16, "BLOCK_N": 32})
        real = kernels.launches_of

        def lookup(kernel: str, device: torch.device, dtype: torch.dtype, shape: Any, flags: Any) -> Config | None:
            asked[kernel] = (device.type, dtype, shape, flags)
            return tuned if kernel != "block_attention_backward_dq" else None

        def launches_of(kernel: str, *args: Any) -> Iterator[Any]:
            for launch in real(kernel, *args):
                launched[kernel] = launch.config
                yield launch

        monkeypatch.setattr(op, "lookup", lookup)
        monkeypatch.setattr(op, "stamp", lambda: "of this test")
        monkeypatch.setattr(kernels, "launches_of", launches_of)
        case = Case(c_k=20)
        out, _ = block_attention(*leaves(*case.inputs()), *case.indices(), look_back=1, impl="triton")
        out.sum().backward()
        heuristic = kernels.heuristic("block_attention_backward_dq", "cpu", 16, 20, 16)
        assert launched == {name: heuristic if name.endswith("dq") else tuned for name in kernels.TUNING}
        device, dtype, shape, flags = asked["block_attention_forward"]
        assert (device, dtype) == ("cpu", torch.float32)
        assert shape == {
            "batch": 1, "heads": 2, "rounds": 2, "n_blocks": 3, "c_q": 16, "c_k": 20, "head_dim": 16, "value_dim": 16,
        }  # fmt: skip
        assert flags["look_back"] == 1 and flags["is_causal"] is False

    @needs_compiler
    def test_the_kernel_runs_where_there_is_a_compiler(self) -> None:
        case = Case()
        inputs = leaves(*case.inputs())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out, _ = block_attention(*inputs, *case.indices())
            actual = gradients(out, inputs, torch.ones_like(out))
        kernel, _ = block_attention(*inputs, *case.indices(), impl="triton")
        assert torch.equal(out, kernel)
        assert all(
            torch.equal(a, b) for a, b in zip(actual, gradients(kernel, inputs, torch.ones_like(out)), strict=True)
        )
