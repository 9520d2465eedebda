"""Each wrong argument of block_attention raises an error that names it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.ops.block_attention import block_attention
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    index = torch.arange(12, dtype=torch.int32).view(1, 1, 1, 3, 4).expand(2, 4, 2, 3, 4)
    args = {name: torch.randn(2, heads, 12, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return args | {"q_index": index, "k_index": index, "key_mask": torch.ones(2, 12, dtype=torch.bool)}


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
    ("scale", TypeError, "not a number", lambda a: "auto"),
    ("scale", ValueError, "not finite", lambda a: float("nan")),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        block_attention(**args | {name: change(args)})


def test_good_input_is_accepted() -> None:
    out, lse = block_attention(**good())
    assert out.shape == (2, 4, 12, 8) and torch.isfinite(lse).all()
