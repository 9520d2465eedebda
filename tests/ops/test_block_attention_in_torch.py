"""block_attention as a citizen of PyTorch: opcheck, torch.compile, torch.export, autocast, higher derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.block_attention import block_attention
from tests.device import device_type
from tests.ops.cases import Case, each, gradients, leaves

CASE = Case(options={"look_back": 1})
OPTIONS = (0.25, True, 1)  # scale, fallback, look_back


@pytest.mark.parametrize("case", [CASE, Case(batch=2, heads=4, kv_heads=2, value_dim=8)], ids=["plain", "grouped"])
def test_opcheck_forward(case: Case) -> None:
    op = torch.ops.fastattn.block_attention.default
    torch.library.opcheck(op, (*case.inputs(), *case.indices(), *OPTIONS))
    torch.library.opcheck(op, (*leaves(*case.inputs()), *case.indices(), *OPTIONS))


def test_opcheck_backward() -> None:
    q, k, v = CASE.inputs()
    out, lse = torch.ops.fastattn.block_attention(q, k, v, *CASE.indices(), *OPTIONS)
    args = (torch.ones_like(out), q, k, v, *CASE.indices(), out, lse, *OPTIONS)
    torch.library.opcheck(torch.ops.fastattn.block_attention_backward.default, args)


def every_option(case: Case) -> dict[str, Any]:
    """The op's arguments after scale and fallback, all but the default ones."""
    q_bucket, k_bucket = (torch.arange(n).expand(1, 2, 2, n).int() % 3 for n in (case.n_queries, case.n_keys))
    flags = {"look_back": 1, "is_causal": True, "correct_duplicates": True, "dropout_p": 0.25}
    tensors = {"q_bucket": q_bucket, "k_bucket": k_bucket, "seed": torch.tensor(7)}
    local = Case(rounds=1, n_blocks=6, c_q=8, c_k=8).indices(4)
    tensors |= {"local_index_q": local[0], "local_index_k": local[1], "key_mask": torch.arange(48).unsqueeze(0) % 5 > 0}
    tensors["n_used_blocks"] = torch.tensor([3], dtype=torch.int32)
    return {**flags, **tensors}


@pytest.mark.parametrize("self_mode", ["last_resort", "once"])
def test_opcheck_with_every_option(self_mode: str) -> None:
    op, options = torch.ops.fastattn.block_attention, every_option(CASE) | {"self_mode": self_mode}
    torch.library.opcheck(op.default, (*leaves(*CASE.inputs()), *CASE.indices(), 0.25, True), options)
    q, k, v = CASE.inputs()
    out, lse = op(q, k, v, *CASE.indices(), 0.25, True, **options)
    args = (torch.ones_like(out), q, k, v, *CASE.indices(), out, lse, 0.25, True)
    torch.library.opcheck(torch.ops.fastattn.block_attention_backward.default, args, options)


@pytest.mark.parametrize("self_mode", ["last_resort", "once"])
def test_compiles_as_one_graph_with_every_option(self_mode: str) -> None:
    options: dict[str, Any] = every_option(CASE) | {"self_mode": self_mode}
    options["local_index"] = options.pop("local_index_q"), options.pop("local_index_k")
    seeds, indices = (options.pop("seed"), torch.tensor(8)), CASE.indices()

    def attend(q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
        return block_attention(q, k, v, *indices, seed=seed, **options)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in seeds:  # of one graph, in which the seed is not a constant
        eager_inputs, compiled_inputs = leaves(*CASE.inputs()), leaves(*CASE.inputs())
        expected, out = attend(*eager_inputs, seed), compiled(*compiled_inputs, seed)
        assert torch.equal(out, expected)
        wanted = gradients(expected, eager_inputs, torch.ones_like(out))
        for gradient, exact in zip(gradients(out, compiled_inputs, torch.ones_like(out)), wanted, strict=True):
            assert torch.equal(gradient, exact)


def test_meta_tensors_give_shapes() -> None:
    case = Case(batch=2, heads=4, kv_heads=2, value_dim=8, n_queries=50)
    indices = (index.to("meta") for index in case.indices())
    out, lse = block_attention(*each(lambda x: x.to("meta"), case.inputs()), *indices)
    assert out.shape == (2, 4, 50, 8) and lse.shape == (2, 4, 50) and lse.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, key_mask: Tensor) -> Tensor:
        return block_attention(q, k, v, q_index, k_index, look_back=1, key_mask=key_mask)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (48, 60):
        case = Case(n_queries=n, n_keys=n, n_blocks=4)
        key_mask = torch.arange(n).unsqueeze(0) % 3 != 0
        eager_inputs, compiled_inputs = leaves(*case.inputs()), leaves(*case.inputs())
        expected = attend(*eager_inputs, *case.indices(), key_mask)
        out = compiled(*compiled_inputs, *case.indices(), key_mask)
        assert torch.equal(out, expected)
        wanted = gradients(expected, eager_inputs, torch.ones_like(out))
        for gradient, exact in zip(gradients(out, compiled_inputs, torch.ones_like(out)), wanted, strict=True):
            assert torch.equal(gradient, exact)


def test_compiles_with_a_scale_that_changes_from_call_to_call() -> None:
    q, k, v = CASE.inputs()
    q_index, k_index = CASE.indices()

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return block_attention(q, k, v, q_index, k_index, look_back=1, scale=scale)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for scale in (0.3, 0.7):
        assert torch.equal(compiled(q, k, v, scale), attend(q, k, v, scale))
    with pytest.raises(ValueError, match=r"^scale must be finite, got nan"):
        attend(q, k, v, math.nan)


def test_compiled_call_refuses_rows_out_of_range() -> None:
    compiled = torch.compile(
        lambda q, k, v, *index: block_attention(q, k, v, *index)[0], fullgraph=True, backend="aot_eager"
    )
    q_index, k_index = CASE.indices()
    q_index[0, 0, 0, 0, 0] = 48
    with pytest.raises(ValueError, match="q_index"):
        compiled(*CASE.inputs(), q_index, k_index)


def test_exports_as_one_node() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
            return block_attention(q, k, v, q_index, k_index, look_back=1)[0]

    args = (*CASE.inputs(), *CASE.indices())
    program = torch.export.export(Attend(), args)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("fastattn.block_attention.default") == 1
    assert torch.equal(program.module()(*args), Attend()(*args))


@pytest.mark.filterwarnings("ignore:fastattn runs block attention by its PyTorch definition")
@pytest.mark.parametrize("impl", [None, "reference"])
def test_autocast_casts_as_sdpa_does(impl: str | None) -> None:
    inputs = leaves(*CASE.inputs())
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        out, lse = block_attention(*inputs, *CASE.indices(), impl=impl)
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs)
        actual = gradients(out, inputs, torch.ones_like(out))
    expected, expected_lse = block_attention(*each(Tensor.bfloat16, inputs), *CASE.indices(), impl=impl)
    assert out.dtype == sdpa.dtype == torch.bfloat16
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert all(gradient.dtype == torch.float32 for gradient in actual)


def test_double_backward_is_refused_only_when_it_happens() -> None:
    inputs = leaves(*CASE.inputs())
    out, _ = block_attention(*inputs, *CASE.indices())
    (dq,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; impl='reference' has one"):
        dq.sum().backward()


def test_reference_has_second_derivatives_in_fp64() -> None:
    case = Case(heads=1, kv_heads=1, n_queries=6, n_keys=6, head_dim=2, value_dim=2, n_blocks=2, c_q=3, c_k=3)
    inputs = leaves(*case.inputs(torch.float64))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = block_attention(q, k, v, *case.indices(), impl="reference")
        assert lse.dtype == torch.float64 and not lse.requires_grad
        return out

    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_gradient_of_one_input_alone(needed: str) -> None:
    every = leaves(*CASE.inputs())
    out, _ = block_attention(*every, *CASE.indices())
    expected = torch.autograd.grad(out.sum(), every["qkv".index(needed)])
    q, k, v = CASE.inputs()
    one = {"q": q, "k": k, "v": v}[needed].requires_grad_()
    out, _ = block_attention(q, k, v, *CASE.indices())
    assert torch.equal(torch.autograd.grad(out.sum(), one)[0], expected[0])


def test_no_grad_keeps_nothing() -> None:
    with torch.no_grad():
        out, _ = block_attention(*leaves(*CASE.inputs()), *CASE.indices())
    assert not out.requires_grad
