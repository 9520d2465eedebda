"""Each wrong argument of clustered_attention raises an error that names it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import clustered_attention
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    args: dict[str, Any] = {name: torch.randn(2, heads, 12, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    args |= {name: torch.ones(2, 12, dtype=torch.bool) for name in ("key_mask", "query_mask")}
    return args | {"n_clusters": 3, "n_bits": 20, "planes": torch.randn(20, 9), "initial_centroids": torch.arange(3)}


def clusters() -> torch.Tensor:
    return torch.zeros(2, 4, 12, dtype=torch.int32)


TENSORS = (*"qkv", "key_mask", "query_mask", "planes", "initial_centroids")
BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in TENSORS),
    *((name, ValueError, "device", lambda a, n=name: a[n].to("meta")) for name in TENSORS[1:]),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in TENSORS),
    *((name, ValueError, "empty", lambda a, n=name: a[n][:0]) for name in TENSORS),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in (*"qkv", "planes")),
    *((name, ValueError, "none", lambda a: 0) for name in ("n_clusters", "n_bits", "n_iterations")),
    *((name, TypeError, "not an int", lambda a: 4.0) for name in ("n_clusters", "n_bits", "n_iterations")),
    ("n_bits", ValueError, "too many", lambda a: 64),
    ("planes", ValueError, "other number of bits", lambda a: torch.randn(21, 9)),
    ("planes", ValueError, "other head_dim", lambda a: torch.randn(20, 8)),
    ("initial_centroids", TypeError, "floating", lambda a: a["initial_centroids"].float()),
    ("initial_centroids", ValueError, "other number of clusters", lambda a: torch.arange(4)),
    ("initial_centroids", ValueError, "row beyond the last", lambda a: torch.arange(10, 13)),
    ("clusters", TypeError, "not a tensor", lambda a: clusters().tolist()),
    ("clusters", TypeError, "floating", lambda a: clusters().float()),
    ("clusters", ValueError, "device", lambda a: clusters().to("meta")),
    ("clusters", ValueError, "other heads", lambda a: clusters()[:, :2]),
    ("clusters", ValueError, "beyond the last", lambda a: clusters() + 3),
    ("clusters", ValueError, "below -1", lambda a: clusters() - 2),
    ("dropout_p", TypeError, "not a number", lambda a: "0.1"),
    ("dropout_p", ValueError, "one", lambda a: 1.0),
    ("generator", TypeError, "a seed", lambda a: 42),
    ("scale", ValueError, "infinite", lambda a: float("inf")),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        clustered_attention(**args | {name: change(args)})


def test_good_input_is_accepted() -> None:
    assert clustered_attention(**good()).shape == (2, 4, 12, 8)
