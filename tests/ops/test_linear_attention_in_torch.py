"""The ops of linear attention as citizens of PyTorch: opcheck, shapes on meta tensors, gradients of some inputs."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops.linear_attention import attend_linear
from fastattn.ops.linear_attention_step import step_linear
from tests.ops.linear_cases import LinearCase

CASE = LinearCase(batch=2, heads=4, kv_heads=2, is_causal=True, has_mask=True, has_state=True)  # kernels are there


def test_opcheck_forward() -> None:
    q, k, v, initial = CASE.inputs()
    op = torch.ops.fastattn.linear_attention.default
    torch.library.opcheck(op, (q, k, v, CASE.mask(), initial, "elu", True, 1e-6, True))
    torch.library.opcheck(op, (q.detach(), k.detach(), v.detach(), CASE.mask(), initial, "elu", True, 1e-6, True))


@pytest.mark.parametrize("grouped", [True, False])
def test_opcheck_backward(grouped: bool) -> None:
    case = CASE if grouped else LinearCase(is_causal=True, has_mask=True, has_state=True)
    q, k, v, initial = (x.detach() for x in case.inputs())
    out, den, state = torch.ops.fastattn.linear_attention(q, k, v, case.mask(), initial, "elu", True, 1e-6, True)
    args = (torch.ones_like(out), torch.ones_like(state), q, k, v, case.mask(), initial, out, den, state)
    torch.library.opcheck(torch.ops.fastattn.linear_attention_backward.default, (*args, "elu", True, True))


def test_opcheck_step() -> None:
    args = [x.detach()[:, :, :1] for x in CASE.inputs()[:3]]
    state = (torch.randn(2, 4, 16, 16), torch.rand(2, 4, 16))
    torch.library.opcheck(torch.ops.fastattn.linear_attention_step.default, (*args, *state, "elu", 1e-6))


def test_the_op_of_a_step_refuses_gradients_that_its_function_has() -> None:
    q, k, v = (x[:, :, :1] for x in CASE.inputs()[:3])
    state = (torch.randn(2, 4, 16, 16), torch.rand(2, 4, 16))
    assert step_linear(q, k, v, *state, feature_map="elu")[0].requires_grad
    out, *_ = torch.ops.fastattn.linear_attention_step(q, k, v, *state, "elu", 1e-6)
    with pytest.raises(RuntimeError, match="for inference"):
        out.sum().backward()


def test_meta_tensors_give_shapes() -> None:
    q, k, v, initial = (x.detach().to("meta") for x in CASE.inputs())
    out, state = attend_linear(q, k, v, feature_map="elu", is_causal=True, initial=initial)
    assert out.shape == (2, 4, 150, 16) and state.shape == (2, 4, 16 * 17) and state.dtype == torch.float32


@pytest.mark.parametrize("needed", [0, 1, 2, 3], ids=["q", "k", "v", "initial"])
def test_gradient_of_one_input_alone(needed: int) -> None:
    def attend(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return attend_linear(*inputs[:3], initial=inputs[3], **CASE.options())

    every = CASE.inputs()
    expected = torch.autograd.grad(attend(every)[0].sum(), every[needed])[0]
    one = [x.detach() for x in every]
    one[needed].requires_grad_()
    out, state = attend(one)
    assert torch.equal(torch.autograd.grad(out.sum(), one[needed], retain_graph=True)[0], expected)
    if needed:  # a state knows no queries
        assert torch.isfinite(torch.autograd.grad(state.sum(), one[needed])[0]).all()
