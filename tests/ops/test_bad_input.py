"""Each wrong argument of block_attention raises an error that names it, before anything runs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastattn.ops.block_attention import block_attention
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    index = torch.arange(12, dtype=torch.int32).view(1, 1, 1, 3, 4).expand(2, 4, 2, 3, 4)
    args = {name: torch.randn(2, heads, 12, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return args | {"q_index": index, "k_index": index, "key_mask": torch.ones(2, 12, dtype=torch.bool)}


def local(a: dict[str, Any]) -> torch.Tensor:
    return a["q_index"][:, :, :1]


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in good()),
    *((name, ValueError, "wrong device", lambda a, n=name: a[n].to("meta")) for name in good() if name != "q"),
    *((name, ValueError, "wrong rank", lambda a, n=name: a[n][0]) for name in good()),
    *((name, ValueError, "empty", lambda a, n=name: a[n][:, :, :0]) for name in good() if name != "key_mask"),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in "qkv"),
    *((name, TypeError, "another dtype", lambda a, n=name: a[n].half()) for name in "kv"),
    *((name, TypeError, "float64", lambda a, n=name: a[n].double()) for name in "qkv"),
    *((name, ValueError, "batch", lambda a, n=name: a[n][:1]) for name in ("k", "v", "q_index", "k_index", "key_mask")),
    *((name, TypeError, "int64", lambda a, n=name: a[n].long()) for name in ("q_index", "k_index")),
    *((name, ValueError, "heads", lambda a, n=name: a[n][:, :2]) for name in ("q_index", "k_index")),
    ("k", ValueError, "head_dim", lambda a: a["k"][..., :4]),
    ("k", ValueError, "heads that do not divide", lambda a: torch.randn(2, 3, 12, 8)),
    ("v", ValueError, "other heads than k", lambda a: a["v"][:, :1]),
    ("v", ValueError, "length", lambda a: a["v"][:, :, :5]),
    ("k_index", ValueError, "rounds", lambda a: a["k_index"][:, :, :1]),
    ("k_index", ValueError, "blocks", lambda a: a["k_index"][:, :, :, :1]),
    ("key_mask", TypeError, "not bool", lambda a: a["key_mask"].float()),
    ("key_mask", ValueError, "length", lambda a: a["key_mask"][:, :5]),
    ("look_back", ValueError, "negative", lambda a: -1),
    ("look_back", TypeError, "not an int", lambda a: 1.0),
    ("look_ahead", ValueError, "negative", lambda a: -1),
    ("look_ahead", TypeError, "bool", lambda a: True),
    ("wrap", TypeError, "not a bool", lambda a: 1),
    ("is_causal", TypeError, "not a bool", lambda a: None),
    ("self_mode", ValueError, "unknown", lambda a: "last_resort?"),
    ("q_bucket", ValueError, "missing beside the other's", lambda a: None),
    ("q_bucket", TypeError, "int64", lambda a: a["q_bucket"].long()),
    ("k_bucket", ValueError, "rounds", lambda a: a["k_bucket"][:, :, :1]),
    ("k_bucket", ValueError, "length", lambda a: a["k_bucket"][..., :5]),
    ("local_index", TypeError, "a list", lambda a: [local(a), local(a)]),
    ("local_index", TypeError, "one tensor", lambda a: (local(a),)),
    ("local_index", ValueError, "blocks", lambda a: (local(a), local(a)[:, :, :, :2])),
    (r"local_index[0]", ValueError, "rounds", lambda a: (a["q_index"], local(a))),
    (r"local_index[1]", TypeError, "int64", lambda a: (local(a), local(a).long())),
    ("n_used_blocks", TypeError, "a number", lambda a: 2),
    ("n_used_blocks", TypeError, "int64", lambda a: torch.tensor([1, 2])),
    ("n_used_blocks", ValueError, "batch", lambda a: torch.tensor([1, 2, 3], dtype=torch.int32)),
    ("n_used_blocks", ValueError, "wrong device", lambda a: torch.empty(2, dtype=torch.int32, device="meta")),
    ("correct_duplicates", TypeError, "not a bool", lambda a: 1),
    ("dropout_p", TypeError, "not a number", lambda a: "0.1"),
    ("dropout_p", ValueError, "negative", lambda a: -0.1),
    ("dropout_p", ValueError, "all", lambda a: 1.0),
    ("seed", TypeError, "not an int", lambda a: 1.5),
    ("seed", ValueError, "negative", lambda a: -1),
    ("seed", ValueError, "of more than 63 bits", lambda a: 2**63),
    ("seed", TypeError, "tensor of int32", lambda a: torch.tensor(1, dtype=torch.int32)),
    ("seed", ValueError, "tensor with dimensions", lambda a: torch.tensor([1])),
    ("scale", TypeError, "not a number", lambda a: "auto"),
    ("scale", ValueError, "not finite", lambda a: float("nan")),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    buckets = torch.zeros(2, 4, 2, 12, dtype=torch.int32)
    args |= {"q_bucket": buckets, "k_bucket": buckets}
    with pytest.raises(error, match=f"^{re.escape(name)}(?![a-z_])"):
        block_attention(**args | {name.partition("[")[0]: change(args)})


@pytest.mark.parametrize("self_mode", ["last_resort", "once"])
def test_an_own_key_needs_as_many_keys_as_queries(self_mode: str) -> None:
    args = good()
    fewer = {name: args[name][:, :, :7] for name in "kv"} | {"key_mask": args["key_mask"][:, :7]}
    with pytest.raises(ValueError, match=r"^self_mode='.*' needs as many keys as queries, got 12 queries and 7 keys"):
        block_attention(**args | fewer, self_mode=self_mode)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "its neighbours masked"])
@pytest.mark.parametrize("value", [12, -2])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_out_of_range_are_refused_before_anything_is_made_of_them(
    side: int, value: int, masked: bool, impl: str | None
) -> None:
    args = good() | {"key_mask": torch.arange(12).expand(2, -1) % 11 > 0} if masked else good()
    bad = args["q_index"].clone()
    bad[0, 0, 0, 0, 0] = value
    name = ("q_index", "k_index")[side]
    with pytest.raises(ValueError, match=f"^{name} must hold"):
        block_attention(**args | {name: bad}, correct_duplicates=True, impl=impl)
    pair = [local(args), local(args)]
    pair[side] = bad[:, :, :1]
    with pytest.raises(ValueError, match=f"^local_index_{name[0]} must hold"):
        block_attention(**args, local_index=(pair[0], pair[1]), correct_duplicates=True, impl=impl)


def test_good_input_is_accepted() -> None:
    out, lse = block_attention(**good())
    assert out.shape == (2, 4, 12, 8) and torch.isfinite(lse).all()
