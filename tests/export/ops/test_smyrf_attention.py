"""SMYRF in ONNX Runtime, against the definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import fastattn
from fastattn.export import check, to_onnx
from fastattn.ops.block_attention import SELF_MODES
from fastattn.reference import smyrf as smyrf_reference

RunNode = Callable[..., list[Tensor]]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OPTIONS = {"is_causal": True, "correct_duplicates": True, "local_window": 10}
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "self-masked": {"masked": True},
    "self-shorter-than-a-cluster": {"n": 7},
    "self-one-token": {"n": 1},
    "grouped-queries": {"n": 77, "kv_heads": 2, "masked": True},
    "cross": {"n": 90, "s": 57},
    "cross-masked": {"n": 90, "s": 57, "masked": True},
    "cross-few-keys": {"n": 90, "s": 3},
    "cross-given-key-clusters": {"n": 64, "s": 32, "k_cluster_size": 8},
    "causal": {"is_causal": True},
    "duplicates-once": {"correct_duplicates": True},
    "local-window-two-masks": {"local_window": 16, "masked": True, "two_masks": True},
    "causal-duplicates-once-local-window": OPTIONS,
    "causal-duplicates-once-local-window-masked-grouped": {"n": 77, "kv_heads": 2, "masked": True} | OPTIONS,
    "causal-local-window-one-token": {"n": 1} | OPTIONS,
    "cross-masked-duplicates-once": {"n": 90, "s": 57, "masked": True, "correct_duplicates": True},
}


HALF = ("grouped-queries", "cross-masked", "causal-duplicates-once-local-window-masked-grouped")
RUNS = [(name, torch.float32) for name in CASES] + [(name, torch.float16) for name in HALF]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_is_its_definition(run_node: RunNode, name: str, dtype: torch.dtype) -> None:
    case = dict(CASES[name])
    n, kv_heads, masked, two_masks = (
        case.pop(*x) for x in (("n", 100), ("kv_heads", 4), ("masked", 0), ("two_masks", 0))
    )
    s, k_cluster_size = case.pop("s", n), case.pop("k_cluster_size", None)
    q, k, v = (randn(2, 4, n, 16), randn(2, kv_heads, s, 16, seed=1), randn(2, kv_heads, s, 8, seed=2))
    q, k, v, projections = q.to(dtype), k.to(dtype), v.to(dtype), randn(18, 3)
    g = torch.Generator().manual_seed(3)
    key_mask = torch.rand(2, s, generator=g) > 0.3 if masked else None
    query_mask = torch.rand(2, n, generator=g) > 0.3 if masked and (n != s or two_masks) else None
    if key_mask is not None:
        key_mask[1] = False  # an example without keys
    group = 4 // kv_heads
    wanted, wanted_lse = smyrf_reference.smyrf_attention(
        q.float(), k.float().repeat_interleave(group, 1), v.float().repeat_interleave(group, 1), projections,
        q_cluster_size=16, k_cluster_size=k_cluster_size, key_mask=key_mask, query_mask=query_mask, scale=0.25, **case,
    )  # fmt: skip

    everyone = torch.ones(1, 1, dtype=torch.bool)
    key_keep = everyone if key_mask is None else key_mask
    query_keep = query_mask if query_mask is not None else key_keep if n == s else everyone
    attributes: dict[str, Any] = {
        "q_cluster_size": 16, "k_cluster_size": k_cluster_size or 0, "scale": 0.25,
        "packed": int(n == s and not two_masks),
    }  # fmt: skip
    if case:
        options = {"is_causal": False, "correct_duplicates": False, "local_window": 0} | case
        attributes |= {name: int(value) for name, value in options.items()}
        attributes["self_mode"] = SELF_MODES.index("once" if options["is_causal"] else "attend")
    out, lse = run_node(
        "SmyrfAttentionWithOptions" if case else "SmyrfAttention",
        {"q": q, "k": k, "v": v, "projections": projections, "key_mask": key_keep, "query_mask": query_keep},
        {"out": (dtype, 4), "lse": (torch.float32, 3)},
        **attributes,
    )
    taking_part = query_keep.expand(2, n)[:, None].expand(2, 4, n)
    assert (out[~taking_part] == 0).all() and (lse[~taking_part] == -torch.inf).all()
    # Two tokens whose hashes differ in the last bit only may swap across a cluster's edge, and then all rows of these
    # two clusters differ. That is rare (never seen at these lengths) and can't be excluded: one such pair is allowed.
    off = ((out - wanted).abs().amax(-1) > (1e-5 if dtype == torch.float32 else 4e-3)) & taking_part
    assert off.sum() <= 2 * 16
    assert_close(lse[taking_part & ~off], wanted_lse[taking_part & ~off], atol=1e-5, rtol=1e-5)


class Attend(torch.nn.Module):
    def __init__(self, **knobs: Any) -> None:
        super().__init__()
        self.projections = torch.nn.Buffer(randn(18, 2))
        self.knobs = knobs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        knobs = {"n_hashes": 2, "q_cluster_size": 16, "projections": self.projections, "key_mask": key_mask}
        out = fastattn.smyrf_attention(q, k, v, **knobs, **self.knobs)
        assert isinstance(out, Tensor)
        return out


def inputs(batch: int, n: int) -> dict[str, Tensor]:
    q, k, v = randn(batch, 4, n, 16), randn(batch, 2, n, 16, seed=1), randn(batch, 2, n, 12, seed=2)
    return {
        "q": q,
        "k": k,
        "v": v,
        "key_mask": torch.arange(n).expand(batch, -1) < torch.tensor([[n], [n // 2]])[:batch],
    }


def test_options_come_through_export_for_any_batch_and_length(tmp_path: Path) -> None:
    free = torch.export.Dim.DYNAMIC
    shapes = {name: {0: free, 2: free} for name in "qkv"} | {"key_mask": {0: free, 1: free}}
    module = Attend(**OPTIONS).eval()
    path = to_onnx(module, inputs(2, 40), tmp_path / "model.onnx", dynamic_shapes=shapes, portable=False)
    (settings,) = json.loads({x.key: x.value for x in onnx.load(path).metadata_props}["fastattn.nodes"])
    assert settings["op"] == "SmyrfAttentionWithOptions"
    assert (settings["n_hashes"], settings["is_causal"], settings["local_window"]) == (2, 1, 10)
    for batch, n in ((1, 1), (2, 33), (1, 100)):
        report = check(module, path, inputs(batch, n))
        assert report.errors[0].relative < 1e-5 or report.errors[0].rows_off * 4 * batch * n <= 32, report


@pytest.mark.parametrize(
    ("knobs", "words"),
    [({"directions": "principal"}, "directions='principal'"), ({"dropout_p": 0.5}, r"dropout_p=0\.5")],
    ids=["principal", "dropout"],
)
def test_what_the_node_does_not_know_is_refused_by_name(tmp_path: Path, knobs: dict[str, Any], words: str) -> None:
    class Draws(torch.nn.Module):
        def forward(self, q: Tensor) -> Any:
            return fastattn.smyrf_attention(q, q, q, n_hashes=2, q_cluster_size=8, **knobs)

    with pytest.raises(ValueError, match=f"can't be exported to ONNX with {words}"):
        to_onnx(Draws().eval(), {"q": randn(2, 2, 20, 8)}, tmp_path / "model.onnx", dynamic_shapes={})


def test_draws_that_are_not_given_are_made_once(tmp_path: Path) -> None:
    class Draws(torch.nn.Module):
        def forward(self, q: Tensor) -> Any:
            generator = torch.Generator().manual_seed(5)
            return fastattn.smyrf_attention(q, q, q, n_hashes=2, q_cluster_size=8, generator=generator)

    sample = {"q": randn(2, 2, 20, 8)}
    path = to_onnx(Draws().eval(), sample, tmp_path / "model.onnx", dynamic_shapes={})
    assert not any("Random" in node.op_type for node in onnx.load(path).graph.node)
    assert check(Draws().eval(), path, sample, tolerance=1e-5).ok
