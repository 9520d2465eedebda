"""LinearAttentionStep in ONNX Runtime: the body against the definition, and steps against the causal form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.export import to_onnx
from fastattn.ops.linear_attention import FEATURE_MAPS
from fastattn.reference.linear_attention_step import linear_attention_step
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
FREE = torch.export.Dim.DYNAMIC


def inputs(batch: int, heads: int, kv_heads: int, n: int = 1, dtype: Any = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    shapes = ((batch, heads, n, 8), (batch, kv_heads, n, 8), (batch, kv_heads, n, 5))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(1, 3, 3), (2, 4, 2), (2, 4, 1)])
def test_is_its_definition(
    run_node: RunNode, batch: int, heads: int, kv_heads: int, feature_map: str, dtype: Any
) -> None:
    q, k, v = inputs(batch, heads, kv_heads, dtype=dtype)
    if feature_map == "identity":  # features are positive, that denominators be no zeros
        q, k = q.abs(), k.abs()
    g = torch.Generator().manual_seed(0)
    s, z = torch.rand(batch, heads, 8, 5, generator=g), torch.rand(batch, heads, 8, generator=g)
    outputs = {"out": (dtype, 4), "new_s": (torch.float32, 4), "new_z": (torch.float32, 3)}
    knobs = {"feature_map": FEATURE_MAPS.index(feature_map), "eps": 1e-6}
    found = run_node("LinearAttentionStep", {"q": q, "k": k, "v": v, "s": s, "z": z}, outputs, **knobs)
    plain = linear_attention_step(q, k, v, s, z, feature_map=feature_map)
    exact = linear_attention_step(*(x.double() for x in (q, k, v, s, z)), feature_map=feature_map)
    for name, ours, theirs, true in zip(outputs, found, plain, exact, strict=True):
        assert_as_accurate(ours, theirs, true, name)


def test_before_the_first_key_nothing_is_divided_by_0(run_node: RunNode) -> None:
    q, k, v = inputs(1, 2, 2)
    state = {"s": torch.zeros(1, 2, 8, 5), "z": torch.zeros(1, 2, 8)}
    outputs = {"out": (torch.float32, 4), "new_s": (torch.float32, 4), "new_z": (torch.float32, 3)}
    knobs = {"feature_map": FEATURE_MAPS.index("relu"), "eps": 0.0}
    out, *_ = run_node("LinearAttentionStep", {"q": q, "k": -k.abs(), "v": v, **state}, outputs, **knobs)
    assert not out.any()


def test_steps_of_an_exported_model_are_the_causal_form(tmp_path: Path) -> None:
    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
            return fastattn.linear_attention_step(q, k, v, (s, z), feature_map="relu2")

    x = inputs(2, 4, 2, n=9)
    state = fastattn.methods.linear.empty_state(2, 4, 8, 5)
    sample = dict(zip("qkv", (part[:, :, :1] for part in x), strict=True)) | {"s": state.s, "z": state.z}
    free = {name: {0: FREE} for name in sample}
    path = to_onnx(Step().eval(), sample, tmp_path / "step.onnx", dynamic_shapes=free)
    ours = [node.op_type for node in onnx.load(path).graph.node if node.domain == "fastattn"]
    assert ours == ["LinearAttentionStep"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (2, 1):
        s, z = state.s.numpy()[:batch], state.z.numpy()[:batch]
        outs = []
        for i in range(9):
            token = dict(zip("qkv", (part[:batch, :, i : i + 1].numpy() for part in x), strict=True))
            out, s, z = session.run(None, {**token, "s": s, "z": z})
            outs.append(torch.from_numpy(out))
        own = tuple(part[:batch] for part in x)
        knobs: dict[str, Any] = {"feature_map": "relu2", "is_causal": True, "return_state": True, "impl": "reference"}
        whole, (last_s, last_z) = fastattn.linear_attention(*own, **knobs)
        torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(s), last_s, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(z), last_z, rtol=1e-5, atol=1e-5)
