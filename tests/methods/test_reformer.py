"""lsh_attention against the originals, against its definition, and as a citizen of PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import lsh_attention
from fastattn.methods import reformer
from fastattn.ops.hash_argmax import hash_argmax
from fastattn.reference import reformer as definition
from tests.accuracy import assert_as_accurate
from tests.device import device_type
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, needs_compiler
from tests.watching import LargestTensor

D, SIZE, ROUNDS = 8, 16, 3  # in most tests here, so that kernels are built once
Two = tuple[Tensor, Tensor]


def inputs(batch: int = 2, heads: int = 2, n: int = 64, v_heads: int | None = None, seed: int = 0) -> Two:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, D, generator=g), torch.randn(batch, v_heads or heads, n, D, generator=g)


def draws(n_buckets: int = 8, rounds: int = ROUNDS, heads: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(heads, D, rounds, n_buckets // 2, generator=torch.Generator().manual_seed(seed))


def leaves(*x: Tensor) -> Two:
    qk, v = (y.detach().clone().requires_grad_() for y in x)
    return qk, v


def with_gradients(out: Tensor, x: Two, dout: Tensor) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, x, dout.to(out.dtype))


KNOBS: dict[str, Any] = {"n_hashes": ROUNDS, "bucket_size": SIZE}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "N64": ({}, {}),
    "N75, does not divide": ({"n": 75}, {}),
    "N75 causal": ({"n": 75}, {"is_causal": True}),
    "N75 look both ways": ({"n": 75}, {"look_ahead": 1}),
    "N75, own bucket only": ({"n": 75}, {"across_buckets": False}),
    "N75 causal, own bucket only": ({"n": 75}, {"across_buckets": False, "is_causal": True}),
    "N75, duplicates once": ({"n": 75}, {"correct_duplicates": True}),
    "N75 causal, duplicates once, both ways": (
        {"n": 75}, {"correct_duplicates": True, "is_causal": True, "look_ahead": 1}
    ),
    "N75, own bucket only, duplicates once": ({"n": 75}, {"across_buckets": False, "correct_duplicates": True}),
    "N75, window": ({"n": 75}, {"local_window": SIZE}),
    "N75 causal, window of 10, duplicates once": (
        {"n": 75}, {"local_window": 10, "correct_duplicates": True, "is_causal": True}
    ),
    "N75 causal, no wrap": ({"n": 75}, {"wrap": False, "is_causal": True}),
    "N40, mean": ({"n": 40}, {"merge": "mean"}),
    "N40 causal, mean, last resort": ({"n": 40}, {"merge": "mean", "self_mode": "last_resort", "is_causal": True}),
    "N40 own key like others": ({"n": 40}, {"self_mode": "attend"}),
    "N40, no neighbours": ({"n": 40}, {"look_back": 0, "is_causal": True}),
    "N10, one block": ({"n": 10}, {}),
    "N40, dense": ({"n": 40}, {"dense_threshold": 40, "is_causal": True}),
    "N1": ({"n": 1}, {}),
    "H4-Hkv2, causal": ({"heads": 4, "v_heads": 2}, {"is_causal": True}),
}  # fmt: skip


# those that are run by the kernels too, as (case, masked): each has builds of its own, and the kernels have tests of
# their own
FUSED = [
    ("N75 causal", False), ("N75 causal", True), ("N75 look both ways", True), ("N40, dense", True),
    ("N75, own bucket only, duplicates once", True), ("N75 causal, window of 10, duplicates once", True),
    ("H4-Hkv2, causal", True),
]  # fmt: skip


def run_of(name: str, masked: bool, impl: str, **more: Any) -> Any:
    return pytest.param(*CASES[name], masked, impl, id=f"{name}, {'key mask' if masked else 'no mask'}-{impl}", **more)


RUNS = [run_of(name, masked, "reference") for name in CASES for masked in (False, True)]
RUNS += [run_of(name, masked, "triton", marks=needs_compiler) for name, masked in FUSED]


@pytest.mark.parametrize(("shape", "knobs", "masked", "impl"), RUNS)
def test_is_its_definition(shape: dict[str, Any], knobs: dict[str, Any], masked: bool, impl: str) -> None:
    x = leaves(*inputs(**shape))
    g = torch.Generator().manual_seed(2)
    n = x[0].shape[2]
    knobs = knobs | {"key_mask": torch.rand(2, n, generator=g) < 0.7 if masked else None}
    out = lsh_attention(*x, rotations=draws(), impl=impl, **KNOBS, **knobs)
    dout = torch.randn(out.shape, generator=g)
    actual = with_gradients(out, x, dout)
    given = {name: value for name, value in knobs.items() if name != "dense_threshold"}
    buckets = hash_argmax(x[0], draws(), 8, impl=impl)
    results = []
    for dtype in (torch.float32, torch.float64):
        y = leaves(*(z.to(dtype) for z in x))
        if "dense_threshold" in knobs:
            expected = definition.shared_qk_attention(*y, is_causal=True, key_mask=knobs["key_mask"])
        else:
            expected = definition.lsh_attention(*y, buckets, bucket_size=SIZE, **given)
        results.append(with_gradients(expected, y, dout))
    for name, a, p, e in zip(("out", "dqk", "dv"), actual, *results, strict=True):
        assert_as_accurate(a, p, e, name)
    if masked:
        for tensor in actual:
            mask = knobs["key_mask"].unsqueeze(1).expand(-1, tensor.shape[1], -1)
            assert not tensor[~mask].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_accurate_to_their_own_rounding(dtype: torch.dtype, impl: str) -> None:
    x = leaves(*(y.to(dtype) for y in inputs(n=75)))
    out = lsh_attention(*x, rotations=draws(), is_causal=True, impl=impl, **KNOBS)
    assert out.dtype == dtype
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = with_gradients(out, x, dout)
    buckets = hash_argmax(x[0], draws(), 8, impl=impl)
    results = []
    for wide in (dtype, torch.float64):
        y = leaves(*(z.to(wide) for z in x))
        expected = definition.lsh_attention(*y, buckets, bucket_size=SIZE, is_causal=True)
        results.append(with_gradients(expected, y, dout))
    for name, a, p, e in zip(("out", "dqk", "dv"), actual, *results, strict=True):
        assert_as_accurate(a, p, e, name)


def test_definition_has_the_right_gradients() -> None:
    """Of the softmax and of the keys' norm, causal, with rows that have but themselves."""
    x = leaves(*(y[:1, :1, :, :3].double() for y in inputs(n=7)))
    buckets = torch.randint(0, 3, (1, 1, 2, 7), generator=torch.Generator().manual_seed(0))
    for knobs in ({"is_causal": True}, {"correct_duplicates": True, "local_window": 3}, {"across_buckets": False}):
        assert torch.autograd.gradcheck(
            lambda qk, v, knobs=knobs: definition.lsh_attention(qk, v, buckets, bucket_size=2, **knobs), x
        )


class TestOwnKey:
    @pytest.mark.parametrize("impl", IMPLS)
    def test_is_all_that_a_row_without_another_key_has(self, impl: str) -> None:
        """The first row of a causal sequence: its output is its value, to the last bit, and so is the gradient."""
        qk, v = leaves(*inputs())
        out = lsh_attention(qk, v, rotations=draws(), is_causal=True, impl=impl, **KNOBS)
        assert torch.equal(out[:, :, 0], v[:, :, 0])
        dqk, dv = torch.autograd.grad(out[:, :, 0].sum(), (qk, v))
        assert not dqk.any()
        assert torch.equal(dv[:, :, 0], torch.ones_like(dv[:, :, 0])) and not dv[:, :, 1:].any()

    @pytest.mark.parametrize("impl", IMPLS)
    def test_has_no_weight_where_there_is_another(self, impl: str) -> None:
        """Not even where it is by far the largest: -1e5, as in the originals, would not be enough here."""
        qk, v = inputs(batch=1, heads=1, n=2)
        v = torch.tensor([[1.0] * D, [2.0] * D]).expand(1, 1, 2, D)
        for threshold in (0, 2):
            out = lsh_attention(
                1e6 * qk, v, rotations=draws(), scale=1.0, dense_threshold=threshold, impl=impl, **KNOBS
            )
            assert torch.equal(out, v.flip(2))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_are_safe(impl: str) -> None:
    qk, v = inputs(n=75)
    qk[:, :, ::3] = 0.0
    x = leaves(qk, v)
    out = lsh_attention(*x, rotations=draws(), impl=impl, **KNOBS)
    for tensor in with_gradients(out, x, torch.ones_like(out)):
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 1e3


@pytest.mark.parametrize("impl", IMPLS)
def test_an_example_without_rows_gives_zero(impl: str) -> None:
    x = leaves(*inputs())
    mask = torch.tensor([[True], [False]]).expand(2, 64)
    for threshold in (0, 64):
        out = lsh_attention(*x, rotations=draws(), key_mask=mask, dense_threshold=threshold, impl=impl, **KNOBS)
        every = with_gradients(out, x, torch.ones_like(out))
        assert all(torch.isfinite(y).all() and not y[1].any() and y[0].any() for y in every)


@pytest.mark.parametrize("knobs", [{"local_window": 3}, {"across_buckets": False, "dense_threshold": 8}], ids=str)
def test_a_short_example_is_dense_beside_longer_ones_too(knobs: dict[str, Any]) -> None:
    qk, v = inputs(n=40)
    mask = torch.stack([torch.arange(40) % 5 == 1, torch.ones(40, dtype=torch.bool)])
    out = lsh_attention(qk, v, n_hashes=3, bucket_size=8, rotations=draws(), key_mask=mask, impl="reference", **knobs)
    dense = definition.shared_qk_attention(qk, v, key_mask=mask)
    torch.testing.assert_close(out[0], dense[0], rtol=0, atol=2e-6)
    assert (out[1] - dense[1]).abs().max() > 0.1


class TestBuckets:
    def test_default_number_is_that_of_the_blocks_and_even(self) -> None:
        assert reformer.default_factors(64, 8) == (8,)
        assert reformer.default_factors(65, 8) == (10,)
        assert reformer.default_factors(5, 64) == (2,)
        assert reformer.default_factors(8192, 64) == (128,)
        assert reformer.default_factors(16384, 64) == (16, 16)
        assert reformer.default_factors(2**20, 64) == (128, 128)

    def test_rotations_tell_their_number(self) -> None:
        x = inputs()
        expected = lsh_attention(*x, rotations=draws(4), n_buckets=4, **KNOBS)
        assert torch.equal(lsh_attention(*x, rotations=draws(4), **KNOBS), expected)

    @pytest.mark.parametrize("n_buckets", [8, (4, 6), 2**17], ids=str)
    def test_of_an_earlier_call_serve_again(self, n_buckets: Any) -> None:
        x = inputs(n=75)
        width = sum(n_buckets) if isinstance(n_buckets, tuple) else n_buckets
        rotations = draws(width, 1)
        expected = lsh_attention(*x, n_hashes=1, bucket_size=SIZE, n_buckets=n_buckets, rotations=rotations)
        buckets = hash_argmax(x[0], rotations, n_buckets)
        assert torch.equal(lsh_attention(*x, n_hashes=1, bucket_size=SIZE, buckets=buckets), expected)

    def test_rows_are_sorted_by_bucket_then_position_and_masked_ones_last(self) -> None:
        buckets = torch.tensor([[[[3, 1, 3, 0, 1, 1]]]], dtype=torch.int32)
        assert reformer.sort_by_bucket(buckets, 4, None).tolist() == [[[[3, 1, 4, 5, 0, 2]]]]
        mask = torch.tensor([[True, True, True, False, False, True]])
        assert reformer.sort_by_bucket(buckets, 4, mask).tolist() == [[[[1, 5, 0, 2, 3, 4]]]]


class TestDraws:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_same_generator_state_gives_same_bits(self, dropout_p: float) -> None:
        knobs: dict[str, Any] = {"is_causal": True, "dropout_p": dropout_p, **KNOBS}
        a, b = (lsh_attention(*inputs(), generator=torch.Generator().manual_seed(7), **knobs) for _ in "ab")
        assert torch.equal(a, b)

    def test_generator_draws_what_may_be_passed_in(self) -> None:
        g = torch.Generator().manual_seed(7)
        drawn = lsh_attention(*inputs(n=128), generator=g, **KNOBS)
        assert torch.equal(drawn, lsh_attention(*inputs(n=128), rotations=draws(8, heads=2, seed=7), **KNOBS))

    def test_rotations_get_no_gradient_and_need_none(self) -> None:
        rotations = draws().requires_grad_()
        lsh_attention(*leaves(*inputs()), rotations=rotations, **KNOBS).sum().backward()
        assert rotations.grad is None

    @pytest.mark.parametrize("knobs", [{}, {"merge": "mean"}, {"dense_threshold": 64}], ids=str)
    def test_dropout_keeps_the_mean(self, knobs: dict[str, Any]) -> None:
        qk, v = inputs()
        exact = lsh_attention(qk, v, rotations=draws(), impl="reference", **KNOBS, **knobs)
        g = torch.Generator().manual_seed(0)
        many = [
            lsh_attention(qk, v, rotations=draws(), dropout_p=0.2, generator=g, impl="reference", **KNOBS, **knobs)
            for _ in range(16)
        ]
        assert not torch.equal(many[0], many[1])
        assert (torch.stack(many).mean(0) - exact).abs().mean() < 0.4 * (many[0] - exact).abs().mean()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any) -> None:
    x = [layout(y) for y in inputs()]
    expected = lsh_attention(*(y.contiguous() for y in x), rotations=draws(), **KNOBS)
    torch.testing.assert_close(lsh_attention(*x, rotations=draws(), **KNOBS), expected, rtol=0, atol=1e-6)


class TestInTorch:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    @pytest.mark.parametrize(
        "knobs",
        [{"is_causal": True}, {"local_window": SIZE, "correct_duplicates": True, "dropout_p": 0.0}, {"merge": "mean"}],
        ids=str,
    )
    def test_compiles_as_one_graph(self, knobs: dict[str, Any], dynamic: bool) -> None:
        rotations = draws()

        def attend(qk: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
            return lsh_attention(qk, v, rotations=rotations, key_mask=key_mask, **KNOBS, **knobs)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (64, 75):
            key_mask = torch.arange(n).expand(2, -1) < n - 9
            eager, traced = leaves(*inputs(n=n)), leaves(*inputs(n=n))
            expected, out = attend(*eager, key_mask), compiled(*traced, key_mask)
            wanted = with_gradients(expected, eager, torch.ones_like(out))
            for a, b in zip(with_gradients(out, traced, torch.ones_like(out)), wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_compiles_with_its_own_draws(self) -> None:
        compiled = torch.compile(
            lambda qk, v: lsh_attention(qk, v, bucket_size=SIZE, dropout_p=0.1), fullgraph=True, backend="aot_eager"
        )
        out = compiled(*inputs())
        assert out.shape == (2, 2, 64, D) and torch.isfinite(out).all()

    @pytest.mark.parametrize("impl", IMPLS)
    def test_autocast_casts_as_sdpa_does(self, impl: str) -> None:
        x = leaves(*inputs())
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            out = lsh_attention(*x, rotations=draws(), impl=impl, **KNOBS)
        assert out.dtype == torch.bfloat16
        expected = lsh_attention(*(y.bfloat16() for y in x), rotations=draws(), impl=impl, **KNOBS)
        assert torch.equal(out, expected)
        assert all(y.dtype == torch.float32 for y in torch.autograd.grad(out.float().sum(), x))

    @pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
    def test_exports_as_one_node_for_any_batch_and_length(self, strict: bool) -> None:
        class Attend(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("rotations", draws())

            def forward(self, qk: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
                knobs: dict[str, Any] = {"key_mask": key_mask, "is_causal": True, "local_window": 10, **KNOBS}
                return lsh_attention(qk, v, rotations=self.rotations, **knobs)

        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
        dims = ({0: batch, 2: length}, {0: batch, 2: length}, {0: batch, 1: length})
        x = (*inputs(), torch.ones(2, 64, dtype=torch.bool))
        program = torch.export.export(Attend().eval(), x, dynamic_shapes=dims, strict=strict)
        ops = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert ops == ["fastattn.lsh_attention.default"]
        x = (*inputs(batch=3, n=75), torch.arange(75).expand(3, -1) < torch.tensor([[75], [50], [7]]))
        torch.testing.assert_close(program.module()(*x), Attend()(*x), rtol=0, atol=1e-6)

    def test_draws_of_an_exported_graph_are_constants_for_the_length_of_its_example(self) -> None:
        class Attend(torch.nn.Module):
            def forward(self, qk: Tensor, v: Tensor) -> Tensor:
                return lsh_attention(qk, v, generator=torch.Generator().manual_seed(4), **KNOBS)

        dims = ({2: torch.export.Dim("length", min=2)},) * 2
        program = torch.export.export(Attend().eval(), inputs(), dynamic_shapes=dims, strict=False)
        rotations = torch.randn(2, D, ROUNDS, 2, generator=torch.Generator().manual_seed(4))  # 64 rows: 4 buckets
        x = inputs(n=200)
        expected = lsh_attention(*x, rotations=rotations, **KNOBS)
        torch.testing.assert_close(program.module()(*x), expected, rtol=0, atol=1e-6)

    def test_opcheck_of_the_whole_method(self) -> None:
        knobs = (SIZE, [8], 1, 0, True, True, 0.3, True, False, 0, "lse", SIZE, "last_resort", "last")
        args = (*inputs(n=75), draws(), None, torch.rand(2, 75) < 0.7, *knobs)
        torch.library.opcheck(torch.ops.fastattn.lsh_attention.default, args)

    def test_the_exported_op_refuses_to_pass_gradients(self) -> None:
        knobs = (SIZE, [8], 1, 0, True, True, 0.3, True, False, 0, "lse", SIZE, "last_resort", "last")
        out = torch.ops.fastattn.lsh_attention(*leaves(*inputs()), draws(), None, None, *knobs)
        with pytest.raises(RuntimeError, match="inference only"):
            out.sum().backward()

    def test_double_backward_is_refused(self) -> None:
        qk, v = leaves(*inputs())
        out = lsh_attention(qk, v, rotations=draws(), **KNOBS)
        (dv,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            dv.sum().backward()

    def test_fp64_runs_by_the_definition_with_second_derivatives(self) -> None:
        x = leaves(*(y[:1, :1].double() for y in inputs(n=6)))
        knobs: dict[str, Any] = {"bucket_size": 3, "n_hashes": 2, "rotations": draws(2, 2), "impl": "reference"}
        assert torch.autograd.gradcheck(lambda qk, v: lsh_attention(qk, v, is_causal=True, **knobs), x)
        assert torch.autograd.gradgradcheck(lambda qk, v: lsh_attention(qk, v, is_causal=True, **knobs), x)

    def test_meta_tensors_give_shapes(self) -> None:
        qk, v = (y.to("meta") for y in inputs(n=75, heads=4, v_heads=2))
        assert lsh_attention(qk, v, bucket_size=SIZE).shape == (2, 4, 75, D)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_no_intermediate_tensor_is_larger_than_the_inputs(masked: bool) -> None:
    """So memory is linear in the length, whatever the number of buckets."""
    x = leaves(*inputs(batch=1, n=1000))
    key_mask = torch.arange(1000).expand(1, -1) < 900 if masked else None
    knobs: dict[str, Any] = {"bucket_size": SIZE, "n_hashes": 4, "rotations": draws(1000, 4), "key_mask": key_mask}
    lsh_attention(*x, **knobs)
    with LargestTensor() as largest:
        out = lsh_attention(*x, **knobs)
        out.sum().backward()
    assert 0 < largest.elements <= max(x[0].numel(), math.prod((D, 4, 500)))
