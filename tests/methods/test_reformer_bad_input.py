"""Each wrong argument of lsh_attention raises an error that names it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import lsh_attention
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    return {
        "qk": torch.randn(2, 4, 12, 8), "v": torch.randn(2, 2, 12, 6), "key_mask": torch.ones(2, 12, dtype=torch.bool),
        "n_hashes": 3, "bucket_size": 4, "rotations": torch.randn(1, 8, 3, 2),
    }  # fmt: skip


FLAGS = ("is_causal", "across_buckets", "correct_duplicates")
BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in ("qk", "v", "key_mask")),
    *((name, ValueError, "device", lambda a, n=name: a[n].to("meta")) for name in ("v", "key_mask", "rotations")),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in ("qk", "v", "key_mask", "rotations")),
    *((name, ValueError, "no length", lambda a, n=name: a[n][:, :, :0]) for name in ("qk", "v")),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in ("qk", "v", "rotations")),
    *((name, TypeError, "float64", lambda a, n=name: a[n].double()) for name in ("qk", "v")),
    *((name, TypeError, "not a bool", lambda a: 1) for name in FLAGS),
    *((name, ValueError, "negative", lambda a: -1) for name in ("look_back", "look_ahead", "local_window")),
    *((name, ValueError, "zero", lambda a: 0) for name in ("n_hashes", "bucket_size")),
    *((name, TypeError, "float", lambda a: 4.0) for name in ("n_hashes", "bucket_size", "n_buckets", "look_back")),
    ("v", TypeError, "another dtype", lambda a: a["v"].half()),
    ("v", ValueError, "heads that do not divide", lambda a: torch.randn(2, 3, 12, 6)),
    ("v", ValueError, "more heads than qk", lambda a: torch.randn(2, 8, 12, 6)),
    ("v", ValueError, "length", lambda a: a["v"][:, :, :5]),
    ("v", ValueError, "batch", lambda a: a["v"][:1]),
    ("key_mask", ValueError, "length", lambda a: a["key_mask"][:, :5]),
    ("key_mask", TypeError, "additive", lambda a: a["key_mask"].float()),
    ("n_buckets", ValueError, "odd", lambda a: 3),
    ("rotations", ValueError, "other number of buckets", lambda a: a["rotations"][..., :1].repeat(1, 1, 2, 3)),
    ("rotations", ValueError, "other number of rounds", lambda a: a["rotations"][:, :, :2]),
    ("rotations", ValueError, "other head_dim", lambda a: a["rotations"][:, :4]),
    ("rotations", TypeError, "not a tensor", lambda a: 3),
    ("scale", TypeError, "tensor", lambda a: torch.tensor(1.0)),
    ("scale", ValueError, "infinite", lambda a: float("inf")),
    ("merge", ValueError, "unknown", lambda a: "sum"),
    ("padding", ValueError, "unknown", lambda a: "first"),
    ("self_mode", ValueError, "unknown", lambda a: "exclude"),
    ("wrap", TypeError, "not a bool", lambda a: 1),
    ("dropout_p", ValueError, "one", lambda a: 1.0),
    ("dropout_p", TypeError, "string", lambda a: "0.1"),
    ("dense_threshold", ValueError, "negative", lambda a: -1),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
    ("buckets", TypeError, "not a tensor", lambda a: 1),
    ("buckets", TypeError, "int64", lambda a: torch.zeros(2, 4, 3, 12, dtype=torch.int64)),
    ("buckets", ValueError, "other number of rounds", lambda a: torch.zeros(2, 4, 2, 12, dtype=torch.int32)),
    ("buckets", ValueError, "device", lambda a: torch.zeros(2, 4, 3, 12, dtype=torch.int32, device="meta")),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        lsh_attention(**args | {name: change(args)})


def test_a_number_of_buckets_that_rotations_are_not_for_is_named_with_both() -> None:
    with pytest.raises(ValueError, match=r"rotations must .* \(4 or 1, 8, 3, 4\), got \(1, 8, 3, 2\)"):
        lsh_attention(**good() | {"n_buckets": 8})


@pytest.mark.parametrize("knob", [{"local_window": 4}, {"correct_duplicates": True}, {"wrap": True}], ids=str)
def test_knobs_that_the_mean_of_rounds_does_not_take_are_refused(knob: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"merge='mean' takes no"):
        lsh_attention(**good() | {"merge": "mean"} | knob)


def test_a_generator_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"^generator\b"):
        lsh_attention(**good() | {"rotations": None, "generator": 42})


def test_good_input_is_accepted() -> None:
    assert lsh_attention(**good()).shape == (2, 4, 12, 6)
