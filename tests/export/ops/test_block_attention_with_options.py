"""The body of BlockAttentionWithOptions in ONNX Runtime, against the definition in fp64, option by option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.block_attention import block_attention, fold_key_mask
from tests.accuracy import assert_as_accurate
from tests.ops.cases import Case, cut_after

RunNode = Callable[..., list[Tensor]]
SELF_MODES = ("attend", "exclude", "last_resort", "once")
LONG = Case(
    batch=2, heads=4, kv_heads=2, n_queries=37, n_keys=37, head_dim=20, value_dim=12,
    rounds=3, n_blocks=3, c_q=15, c_k=13,
)  # fmt: skip
CROSS = replace(LONG, n_queries=50, n_keys=31, c_q=17)
REFORMER = {"look_back": 1, "self_mode": "last_resort", "is_causal": True, "key_mask": True}
SMYRF = {"self_mode": "once", "is_causal": True, "key_mask": True}
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    "nothing": (LONG, {}),
    "key mask": (LONG, {"key_mask": True}),
    "look both ways": (LONG, {"look_back": 1, "look_ahead": 1}),
    "look back, no wrap": (LONG, {"look_back": 2, "wrap": False}),
    "exclude, causal": (LONG, {"self_mode": "exclude", "is_causal": True}),
    "once, causal": (LONG, SMYRF),
    "once, causal, duplicates, local": (LONG, SMYRF | {"correct_duplicates": True, "local": True}),
    "last resort, causal": (LONG, REFORMER),
    "last resort, causal, duplicates, buckets, local": (
        LONG, REFORMER | {"correct_duplicates": True, "bucket": True, "local": True}
    ),
    "buckets, look both ways": (LONG, {"bucket": True, "look_back": 1, "look_ahead": 1}),
    "duplicates": (LONG, {"correct_duplicates": True}),
    "duplicates, look both ways": (LONG, {"correct_duplicates": True, "look_back": 1, "look_ahead": 1}),
    "duplicates, all blocks twice": (LONG, {"correct_duplicates": True, "look_back": 11, "look_ahead": 8}),
    "duplicates, buckets, look ahead, no wrap": (
        LONG, {"correct_duplicates": True, "bucket": True, "look_ahead": 1, "wrap": False}
    ),
    "duplicates, buckets, one round that looks round its end": (
        replace(LONG, rounds=1), {"correct_duplicates": True, "bucket": True, "look_back": 4}
    ),
    "some blocks used, look both ways": (LONG, {"used": [2, 1], "look_back": 1, "look_ahead": 2}),
    "some blocks used, all of Reformer's": (
        LONG,
        REFORMER | {"used": [2, 1], "look_back": 3, "bucket": True, "local": True, "correct_duplicates": True},
    ),
    "cross, duplicates, local": (CROSS, {"correct_duplicates": True, "local": True, "key_mask": True}),
    "one row": (
        replace(LONG, batch=1, n_queries=1, n_keys=1, rounds=1, n_blocks=1, c_q=1, c_k=1), {"self_mode": "last_resort"}
    ),
}  # fmt: skip


def arguments(case: Case, options: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The tensors q, k, v, q_index, k_index, and the options with the tensors that they name."""
    indices, options = case.indices(), dict(options)
    if used := options.pop("used", None):
        options["n_used_blocks"] = torch.tensor(used, dtype=torch.int32)
        indices = [cut_after(index, options["n_used_blocks"]) for index in indices]
    if options.pop("local", False):
        options["local_index"] = replace(case, rounds=1, n_blocks=6, c_q=7, c_k=5).indices(4)
    if options.pop("bucket", False):
        g = torch.Generator().manual_seed(5)
        for name, length in (("q_bucket", case.n_queries), ("k_bucket", case.n_keys)):
            shape = (case.batch, case.heads, case.rounds, length)
            options[name] = torch.randint(2, shape, generator=g, dtype=torch.int32)
    if options.pop("key_mask", False):
        options["key_mask"] = torch.arange(case.n_keys).expand(case.batch, -1) % 5 != 0
    return [*case.inputs(dtype), *indices], options


def run(run_node: RunNode, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """(out, lse) of the node that stands for block_attention(*tensors, scale=0.3, **options)."""
    q, k, v, q_index, k_index = tensors
    nowhere, alike = torch.full((1, 1, 1, 1, 1), -1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    local_q_index, local_k_index = options.get("local_index", (nowhere, nowhere))
    key_mask = options.get("key_mask", torch.ones(1, 1, dtype=torch.bool))
    if "key_mask" in options:
        k_index = fold_key_mask(k_index, key_mask)
        if "local_index" in options:
            local_k_index = fold_key_mask(local_k_index, key_mask)
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "q_index": q_index,
        "k_index": k_index,
        "local_q_index": local_q_index,
        "local_k_index": local_k_index,
        "q_bucket": options.get("q_bucket", alike),
        "k_bucket": options.get("k_bucket", alike),
        "n_used_blocks": options.get("n_used_blocks", torch.tensor([q_index.shape[3]], dtype=torch.int32)),
        "own_mask": options.get("own_mask", key_mask),
    }
    flags = {name: int(options.get(name, False)) for name in ("look_back", "look_ahead", "is_causal")}
    return run_node(
        "BlockAttentionWithOptions",
        inputs,
        {"out": (q.dtype, 4), "lse": (torch.float32, 3)},
        scale=0.3,
        wrap=int(options.get("wrap", True)),
        self_mode=SELF_MODES.index(options.get("self_mode", "attend")),
        across_buckets=int("q_bucket" not in options),
        correct_duplicates=int(options.get("correct_duplicates", False)),
        **flags,
    )


def assert_is_the_definition(run_node: RunNode, tensors: list[Tensor], options: dict[str, Any]) -> None:
    out, lse = run(run_node, tensors, options)
    indices = tensors[3:]
    plain, exact = (
        block_attention(*(x.to(dtype) for x in tensors[:3]), *indices, scale=0.3, **options)
        for dtype in (tensors[0].dtype, torch.float64)
    )
    assert_as_accurate(out, plain[0], exact[0], "out")
    empty = exact[1] == -math.inf
    assert torch.equal(lse == -math.inf, empty) and not out[empty].any()
    assert_as_accurate(*(x.masked_fill(empty, 0.0) for x in (lse, plain[1], exact[1])), "lse")


@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(run_node: RunNode, name: str) -> None:
    assert_is_the_definition(run_node, *arguments(*CASES[name], torch.float32))


@pytest.mark.parametrize("name", ["once, causal, duplicates, local", "last resort, causal", "cross, duplicates, local"])
def test_half_inputs_are_accurate_to_their_own_rounding(run_node: RunNode, name: str) -> None:
    assert_is_the_definition(run_node, *arguments(*CASES[name], torch.float16))


@pytest.mark.parametrize("self_mode", SELF_MODES)
def test_what_masked_keys_hold_has_no_effect(run_node: RunNode, self_mode: str) -> None:
    tensors, options = arguments(LONG, {"self_mode": self_mode, "key_mask": True, "local": True}, torch.float32)
    key_mask = options["key_mask"]
    wanted = run(run_node, tensors, options)
    for x in tensors[1:3]:
        x.masked_fill_(~key_mask[:, None, :, None], math.nan)
    actual = run(run_node, tensors, options)
    # the mask is in the indices; own_mask is not read where an own key is a key like others, or none
    open_to_all = run(run_node, tensors, options | {"own_mask": torch.ones(1, 1, dtype=torch.bool)})
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))
    if self_mode in ("attend", "exclude"):
        assert all(torch.equal(a, w) for a, w in zip(open_to_all, wanted, strict=True))
