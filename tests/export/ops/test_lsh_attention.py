"""Reformer's attention in ONNX Runtime: the node's body against the definition, and the whole way from a module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from fastattn import lsh_attention
from fastattn.export import check, to_onnx
from fastattn.methods.reformer import dense_length
from fastattn.ops.block_attention import SELF_MODES
from fastattn.ops.hash_argmax import hash_argmax
from tests.accuracy import assert_as_accurate

RunNode = Callable[..., list[Tensor]]
D, SIZE, ROUNDS = 8, 16, 3


def inputs(batch: int = 2, heads: int = 2, n: int = 75, v_heads: int | None = None) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.randn(batch, heads, n, D, generator=g), torch.randn(batch, v_heads or heads, n, 12, generator=g)


def draws(n_buckets: int = 8, heads: int = 1) -> Tensor:
    return torch.randn(heads, D, ROUNDS, n_buckets // 2, generator=torch.Generator().manual_seed(1))


def masked(qk: Tensor) -> Tensor:
    """The first example of the batch is short, the last one empty if there are three."""
    mask = torch.rand(qk.shape[0], qk.shape[2], generator=torch.Generator().manual_seed(2)) < 0.7
    mask[0, 13:] = False
    mask[2:] = False
    return mask


def run(
    run_node: RunNode, qk: Tensor, v: Tensor, rotations: Tensor, factors: tuple[int, ...] = (8,), **knobs: Any
) -> Tensor:
    flags = {"look_back": 1, "look_ahead": 0, "wrap": True, "is_causal": False, "across_buckets": True}
    flags |= {"correct_duplicates": False, "local_window": 0, "dense_threshold": None}
    flags = {name: knobs.get(name, default) for name, default in flags.items()}
    flags["dense_threshold"] = dense_length(flags["dense_threshold"], SIZE, bool(flags["across_buckets"]))
    key_mask = knobs.get("key_mask")
    (out,) = run_node(
        "LshAttention",
        {
            "qk": qk,
            "v": v,
            "rotations": rotations,
            "key_mask": torch.ones(1, 1).bool() if key_mask is None else key_mask,
        },
        {"out": (qk.dtype, 4)},
        factors=factors,
        bucket_size=SIZE,
        scale=knobs.get("scale", 0.3),
        self_mode=SELF_MODES.index(knobs.get("self_mode", "last_resort")),
        **{name: int(value) for name, value in flags.items()},
    )
    return out


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "N75, key mask": ({}, {}),
    "N64 causal": ({"n": 64}, {"is_causal": True}),
    "N75 look both ways": ({}, {"look_ahead": 1}),
    "N75, no neighbours, own key like others": ({}, {"look_back": 0, "self_mode": "attend"}),
    "N75, causal, own bucket only, duplicates once": (
        {}, {"across_buckets": False, "is_causal": True, "correct_duplicates": True, "look_ahead": 1}
    ),
    "N75, window of 10, duplicates once": ({"batch": 3}, {"local_window": 10, "correct_duplicates": True}),
    "N75 causal, no wrap": ({}, {"wrap": False, "is_causal": True}),
    "N10, one block, window": ({"n": 10}, {"local_window": 4, "is_causal": True}),
    "N40, dense": ({"n": 40}, {"dense_threshold": 40, "is_causal": True, "local_window": 4}),
    "N40, dense, own bucket": ({"n": 40}, {"dense_threshold": 64, "across_buckets": False, "wrap": False}),
    "N1": ({"n": 1, "batch": 1}, {}),
    "H4-Hkv2, causal": ({"heads": 4, "v_heads": 2}, {"is_causal": True}),
}  # fmt: skip


@pytest.mark.parametrize("masks", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(run_node: RunNode, name: str, masks: bool) -> None:
    shape, knobs = CASES[name]
    qk, v = inputs(**shape)
    mask = masked(qk) if masks else None
    actual = run(run_node, qk, v, draws(), key_mask=mask, **knobs)
    assert_is_definition(actual, qk, v, knobs | {"key_mask": mask})
    if mask is not None:
        assert not actual[~mask[:, None].expand(actual.shape[:3])].any()


def assert_is_definition(actual: Tensor, qk: Tensor, v: Tensor, knobs: dict[str, Any]) -> None:
    """In fp64, given the buckets that fp32 finds."""
    buckets = hash_argmax(qk, draws(), 8, impl="reference")
    plain, exact = (
        lsh_attention(
            qk.to(dtype), v.to(dtype), buckets=buckets, n_hashes=ROUNDS, bucket_size=SIZE, scale=0.3, impl="reference",
            **knobs,
        )
        for dtype in (qk.dtype, torch.float64)
    )  # fmt: skip
    assert_as_accurate(actual, plain, exact, "out")


def test_half_inputs_are_accurate_to_their_own_rounding(run_node: RunNode) -> None:
    qk, v = (x.half() for x in inputs())
    knobs = {"is_causal": True, "key_mask": masked(qk)}
    assert_is_definition(run(run_node, qk, v, draws(), **knobs), qk, v, knobs)


def test_what_padding_holds_has_no_effect(run_node: RunNode) -> None:
    qk, v = inputs()
    mask = masked(qk)
    other = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (qk, v)]
    knobs = {"key_mask": mask, "local_window": 10}
    assert torch.equal(run(run_node, qk, v, draws(), **knobs), run(run_node, *other, draws(), **knobs))


def test_a_row_without_another_key_has_its_own_value(run_node: RunNode) -> None:
    qk, v = inputs()
    out = run(run_node, qk, v, draws(), is_causal=True)
    assert torch.equal(out[:, :, 0], v[:, :, 0])


class Attend(torch.nn.Module):
    """Draws what it is not given, or has its draws as a buffer."""

    def __init__(self, rotations: Tensor | None = None, **knobs: Any) -> None:
        super().__init__()
        self.rotations = torch.nn.Buffer(rotations) if rotations is not None else None
        self.knobs = knobs

    def forward(self, qk: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return lsh_attention(
            qk, v, n_hashes=ROUNDS, bucket_size=SIZE, rotations=self.rotations, key_mask=key_mask, **self.knobs
        )


FREE = torch.export.Dim.DYNAMIC
SHAPES = {"qk": {0: FREE, 2: FREE}, "v": {0: FREE, 2: FREE}, "key_mask": {0: FREE, 1: FREE}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_one_file_serves_any_batch_and_length(tmp_path: Path, dtype: torch.dtype) -> None:
    module = Attend(draws(32, heads=2), n_buckets=(4, 28), is_causal=True, local_window=8).eval().to(dtype)

    def sample(batch: int, n: int) -> dict[str, Tensor]:
        qk, v = inputs(batch, 2, n)
        return {"qk": qk.to(dtype), "v": v.to(dtype), "key_mask": masked(qk)}

    path = to_onnx(module, sample(2, 40), tmp_path / "model.onnx", dynamic_shapes=SHAPES)
    (settings,) = json.loads({x.key: x.value for x in onnx.load(path).metadata_props}["fastattn.nodes"])
    assert (settings["op"], settings["n_hashes"], settings["factors"]) == ("LshAttention", ROUNDS, [4, 28])
    for batch, n in ((1, 1), (2, 16), (3, 17), (2, 101)):
        assert check(module, path, sample(batch, n), tolerance=1e-6 if dtype == torch.float32 else 1e-3).ok


def test_draws_are_made_once_and_for_the_length_of_the_example(tmp_path: Path) -> None:
    module = Attend(generator=torch.Generator().manual_seed(5)).eval()
    qk, v = inputs(n=75)
    shapes = {name: SHAPES[name] for name in ("qk", "v")}
    path = to_onnx(module, {"qk": qk, "v": v}, tmp_path / "model.onnx", dynamic_shapes=shapes)
    (settings,) = json.loads({x.key: x.value for x in onnx.load(path).metadata_props}["fastattn.nodes"])
    assert settings["factors"] == [6]
    drawn = torch.randn(2, D, ROUNDS, 3, generator=torch.Generator().manual_seed(5))
    weights = [torch.from_numpy(onnx.numpy_helper.to_array(x).copy()) for x in onnx.load(path).graph.initializer]
    assert any(torch.equal(weight, drawn) for weight in weights if weight.shape == drawn.shape)
    qk, v = inputs(n=130)
    assert check(Attend(drawn).eval(), path, {"qk": qk, "v": v}, tolerance=1e-6).ok


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"merge": "mean"}, "merge='mean'"),
        ({"padding": "hashed"}, "padding='hashed'"),
        ({"dropout_p": 0.5}, r"dropout_p=0\.5"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_options_that_the_node_does_not_know_are_refused_by_name(
    tmp_path: Path, knobs: dict[str, Any], words: str
) -> None:
    qk, v = inputs()
    with pytest.raises(ValueError, match=f"can't be exported to ONNX with {words}"):
        to_onnx(Attend(draws(), **knobs).eval(), {"qk": qk, "v": v}, tmp_path / "model.onnx", dynamic_shapes={})
