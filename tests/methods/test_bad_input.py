"""Each wrong argument of smyrf_attention raises an error that names it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import smyrf_attention
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    args: dict[str, Any] = {name: torch.randn(2, heads, 12, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    masks = {name: torch.ones(2, 12, dtype=torch.bool) for name in ("key_mask", "query_mask")}
    return args | masks | {"q_cluster_size": 4, "projections": torch.randn(10, 4)}


def changed(**changes: Any) -> dict[str, Any]:
    return good() | changes


MASKS = ("key_mask", "query_mask")
BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in (*"qkv", *MASKS, "projections")),
    *((name, ValueError, "device", lambda a, n=name: a[n].to("meta")) for name in (*"kv", *MASKS, "projections")),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in (*"qkv", *MASKS, "projections")),
    *((name, ValueError, "no length", lambda a, n=name: a[n][:, :, :0]) for name in "qkv"),
    *((name, ValueError, "no batch", lambda a, n=name: a[n][:0]) for name in "qkv"),
    *((name, ValueError, "no width", lambda a, n=name: a[n][..., :0]) for name in "qkv"),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in "qkv"),
    *((name, TypeError, "another dtype", lambda a, n=name: a[n].half()) for name in "kv"),
    *((name, TypeError, "float64", lambda a, n=name: a[n].double()) for name in "qkv"),
    *((name, ValueError, "batch", lambda a, n=name: a[n][:1]) for name in (*"kv", *MASKS)),
    *((name, ValueError, "length", lambda a, n=name: a[n][:, :5]) for name in MASKS),
    *((name, TypeError, "additive", lambda a, n=name: a[n].float()) for name in MASKS),
    *((name, TypeError, "0 and 1", lambda a, n=name: a[n].int()) for name in MASKS),
    ("k", ValueError, "head_dim", lambda a: a["k"][..., :4]),
    ("k", ValueError, "heads that do not divide", lambda a: torch.randn(2, 3, 12, 8)),
    ("k", ValueError, "more heads than q", lambda a: torch.randn(2, 8, 12, 8)),
    ("v", ValueError, "other heads than k", lambda a: a["v"][:, :1]),
    ("v", ValueError, "length", lambda a: a["v"][:, :, :5]),
    ("n_hashes", ValueError, "zero", lambda a: 0),
    ("n_hashes", TypeError, "float", lambda a: 4.0),
    ("n_hashes", TypeError, "bool", lambda a: True),
    ("q_cluster_size", ValueError, "zero", lambda a: 0),
    ("q_cluster_size", TypeError, "None", lambda a: None),
    ("k_cluster_size", ValueError, "negative", lambda a: -4),
    ("k_cluster_size", TypeError, "string", lambda a: "4"),
    ("k_cluster_size", ValueError, "other number of clusters", lambda a: 3),
    ("scale", TypeError, "tensor", lambda a: torch.tensor(1.0)),
    ("scale", ValueError, "infinite", lambda a: float("inf")),
    ("projections", ValueError, "other number of rounds", lambda a: torch.randn(10, 3)),
    ("projections", ValueError, "other head_dim", lambda a: torch.randn(8, 4)),
    ("projections", TypeError, "integers", lambda a: torch.ones(10, 4, dtype=torch.int32)),
    ("is_causal", TypeError, "not a bool", lambda a: 1),
    ("correct_duplicates", TypeError, "not a bool", lambda a: None),
    ("local_window", ValueError, "negative", lambda a: -1),
    ("local_window", TypeError, "float", lambda a: 8.0),
    ("local_window", TypeError, "bool", lambda a: True),
    ("directions", ValueError, "unknown", lambda a: "learned"),
    ("dropout_p", ValueError, "one", lambda a: 1.0),
    ("dropout_p", ValueError, "negative", lambda a: -0.1),
    ("dropout_p", TypeError, "string", lambda a: "0.1"),
    ("seed", ValueError, "negative", lambda a: -1),
    ("seed", TypeError, "float", lambda a: 1.0),
    ("return_lse", TypeError, "not a bool", lambda a: 1),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        smyrf_attention(**args | {name: change(args)})


def test_both_cluster_sizes_are_named_when_they_disagree() -> None:
    with pytest.raises(ValueError, match=r"12 queries .* q_cluster_size=4 are 3, 12 keys .* k_cluster_size=3 are 4"):
        smyrf_attention(**changed(k_cluster_size=3))


def test_a_generator_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"^generator\b"):
        smyrf_attention(**changed(projections=None, generator=42))


@pytest.mark.parametrize("option", [{"is_causal": True}, {"local_window": 4}])
def test_options_of_positions_need_as_many_keys_as_queries(option: dict[str, Any]) -> None:
    keys = {"k": torch.randn(2, 2, 9, 8), "v": torch.randn(2, 2, 9, 8), "key_mask": None}
    with pytest.raises(ValueError, match=rf"^{next(iter(option))} needs as many keys as queries, got 12 .* 9 keys"):
        smyrf_attention(**changed(**keys, **option))


def test_principal_directions_take_no_projections_and_are_only_so_many() -> None:
    with pytest.raises(ValueError, match=r"^projections .* must be None with directions='principal'"):
        smyrf_attention(**changed(directions="principal"))
    with pytest.raises(ValueError, match=r"^n_hashes must be at most head_dim \+ 1 = 9 .* got 10"):
        smyrf_attention(**changed(directions="principal", projections=None, n_hashes=10))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="heads"):
        smyrf_attention(**changed(heads=4))


def test_good_input_is_accepted() -> None:
    assert smyrf_attention(**good(), return_lse=False).shape == (2, 4, 12, 8)
