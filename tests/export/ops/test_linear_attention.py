"""LinearAttention in ONNX Runtime: the body of the node against the definition, and whole calls of the method."""

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
from fastattn.reference.linear_attention import linear_attention
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
FREE = torch.export.Dim.DYNAMIC
F16, F32 = torch.float16, torch.float32


def inputs(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, n: int = 37, s: int | None = None, dtype: Any = F32
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    shapes = ((batch, heads, n, 8), (batch, kv_heads, s or n, 8), (batch, kv_heads, s or n, 5))
    return tuple(torch.randn(shape, generator=g).to(dtype) for shape in shapes)


def attend(
    run_node: RunNode, x: tuple[Tensor, ...], feature_map: str = "elu", is_causal: bool = False,
    key_mask: Tensor | None = None, initial: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    tensors = dict(zip("qkv", x, strict=True))
    tensors["key_mask"] = torch.ones(1, 1, dtype=torch.bool) if key_mask is None else key_mask
    tensors["initial"] = torch.zeros(1, 1, 1) if initial is None else initial
    outputs = {"out": (x[2].dtype, 4), "den": (F32, 3), "state": (F32, 3)}
    knobs = {"feature_map": FEATURE_MAPS.index(feature_map), "is_causal": int(is_causal), "eps": 1e-6}
    return run_node("LinearAttention", tensors, outputs, **knobs)


def assert_is_the_definition(found: list[Tensor], x: tuple[Tensor, ...], **knobs: Any) -> None:
    plain = linear_attention(*x, **knobs)
    if knobs.get("initial") is not None:
        knobs["initial"] = knobs["initial"].double()
    exact = linear_attention(*(part.double() for part in x), **knobs)
    for name, ours, theirs, true in zip(("out", "den", "state"), found, plain, exact, strict=True):
        assert_as_accurate(ours, theirs, true, name)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_each_map_is_its_definition(run_node: RunNode, feature_map: str, is_causal: bool, dtype: Any) -> None:
    x = inputs(n=70, dtype=dtype)
    if feature_map == "identity":  # features are positive, that denominators be no zeros
        x = (x[0].abs(), x[1].abs(), x[2])
    found = attend(run_node, x, feature_map, is_causal)
    assert_is_the_definition(found, x, feature_map=feature_map, is_causal=is_causal)


@pytest.mark.parametrize(("masked", "with_state"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("n", "s", "heads", "kv_heads", "is_causal"),
    [
        (1, 1, 3, 3, True),
        (1, 1, 4, 1, False),
        (64, 64, 4, 2, True),
        (65, 65, 3, 3, True),
        (200, 200, 4, 1, True),
        (37, 90, 4, 2, False),
        (90, 37, 3, 3, False),
    ],
)
def test_lengths_groups_masks_and_states(
    run_node: RunNode, n: int, s: int, heads: int, kv_heads: int, is_causal: bool, masked: bool, with_state: bool
) -> None:
    x, mask, initial = inputs(2, heads, kv_heads, n, s), None, None
    if masked:
        mask = torch.arange(s).expand(2, -1) % 3 != 0
        mask = mask & torch.tensor([[True], [False]])  # one example has no key at all
        x = (x[0], *(part.masked_fill(~mask[:, None, :, None], float("nan")) for part in x[1:]))
    if with_state:
        initial = torch.rand(2, heads, 8 * 6, generator=torch.Generator().manual_seed(0))
    found = attend(run_node, x, "elu", is_causal, mask, initial)
    knobs: dict[str, Any] = {"is_causal": is_causal, "key_mask": mask, "initial": initial}
    assert_is_the_definition(found, x, **knobs)
    if masked and not with_state:
        assert not found[0][1].any() and not found[2][1].any()


def test_a_row_whose_denominator_is_0_gives_0(run_node: RunNode) -> None:
    q, k, v = inputs()
    tensors = {"q": -q.abs(), "k": k, "v": v, "key_mask": torch.ones(1, 1, dtype=torch.bool)}
    outputs = {"out": (F32, 4), "den": (F32, 3), "state": (F32, 3)}
    for is_causal in (0, 1):
        out, den, _ = run_node(
            "LinearAttention", {**tensors, "initial": torch.zeros(1, 1, 1)}, outputs,
            feature_map=FEATURE_MAPS.index("relu"), is_causal=is_causal, eps=0.0,
        )  # fmt: skip
        assert not out.any() and not den.any()


class Attend(torch.nn.Module):
    def __init__(self, **knobs: Any) -> None:
        super().__init__()
        self.knobs = knobs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Any:
        return fastattn.linear_attention(q, k, v, key_mask=key_mask, **self.knobs)


def exported(module: torch.nn.Module, path: Path, **sample: Tensor) -> tuple[onnx.ModelProto, Any]:
    """The file, whose batch and length are free, and one session of it."""
    length = {"key_mask": {0: FREE, 1: FREE}, "s": {0: FREE}, "z": {0: FREE}}
    shapes = {name: length.get(name, {0: FREE, 2: FREE}) for name in sample}
    path = to_onnx(module.eval(), sample, path / "model.onnx", dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(**values: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in values.items()})]

    return onnx.load(path), run


def named(x: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return dict(zip("qkv", x, strict=True))


def test_a_causal_call_is_one_node_that_takes_any_batch_and_length(tmp_path: Path) -> None:
    module = Attend(is_causal=True, feature_map="relu2", return_state=True, impl="reference")
    mask = torch.ones(2, 37, dtype=torch.bool)
    file, run = exported(module, tmp_path, **named(inputs()), key_mask=mask)
    ours = [node.op_type for node in file.graph.node if node.domain == "fastattn"]
    assert ours == ["LinearAttention"]
    for batch, n in ((1, 1), (2, 37), (3, 64), (1, 150)):
        x, mask = inputs(batch, n=n), torch.arange(n).expand(batch, -1) % 4 != 1
        out, (s, z) = module(*x, key_mask=mask)
        for found, expected in zip(run(**named(x), key_mask=mask), (out, s, z), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_features_are_made_before_the_node_and_their_draws_are_weights(tmp_path: Path) -> None:
    maps: tuple[Any, ...] = ("favor", "rff", "grf", torch.nn.functional.softplus)
    draws = torch.Generator()

    class All(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return tuple(fastattn.linear_attention(q, k, v, feature_map=each, generator=draws) for each in maps)

    draws.manual_seed(3)
    file, run = exported(All(), tmp_path, **named(inputs()))
    assert [node.op_type for node in file.graph.node if node.domain == "fastattn"] == ["LinearAttention"] * 4
    assert not any("Random" in node.op_type for node in file.graph.node)
    for n in (1, 70):
        draws.manual_seed(3)  # or torch would draw others now
        for found, expected in zip(run(**named(inputs(1, n=n))), All()(*inputs(1, n=n)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fp16_features_of_fp16_inputs(tmp_path: Path) -> None:
    """Random features are fp32 beside values in fp16."""
    omega = fastattn.methods.feature_maps.random_directions(8, 8, generator=torch.Generator().manual_seed(0))
    module = Attend(feature_map="favor", omega=omega, is_causal=True)
    _, run = exported(module, tmp_path, **named(inputs(dtype=F16)))
    (found,) = run(**named(inputs(n=70, dtype=F16)))
    expected = module(*inputs(n=70, dtype=F16))
    assert found.dtype == expected.dtype == F16
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_state_goes_into_the_next_call(tmp_path: Path) -> None:
    class Next(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor, z: Tensor) -> Any:
            knobs: dict[str, Any] = {"initial_state": (s, z), "is_causal": True, "return_state": True}
            return fastattn.linear_attention(q, k, v, **knobs)

    state = fastattn.methods.linear.empty_state(2, 4, 8, 5)
    _, run = exported(Next(), tmp_path, **named(inputs()), s=state.s, z=state.z)
    x = inputs(n=90)
    s, z, parts = state.s, state.z, []
    for first, last in ((0, 1), (1, 70), (70, 90)):
        out, s, z = run(**named(tuple(part[:, :, first:last] for part in x)), s=s, z=z)
        parts.append(out)
    whole, (all_s, all_z) = fastattn.linear_attention(*x, is_causal=True, return_state=True, impl="reference")
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for found, expected in ((s, all_s), (z, all_z)):  # sums of 90 terms
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
