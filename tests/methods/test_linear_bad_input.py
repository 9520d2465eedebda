"""Each wrong argument of linear attention and its step raises an error that names it, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import linear_attention, linear_attention_step
from fastattn.methods.linear import LinearState, empty_state
from tests.bad_input import Bad, Change, each_of


def good() -> dict[str, Any]:
    args: dict[str, Any] = {name: torch.randn(2, heads, 12, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    args |= {"key_mask": torch.ones(2, 12, dtype=torch.bool), "omega": torch.randn(8, 5), "feature_map": "grf"}
    return args | {"initial_state": empty_state(2, 4, 5, 8)}


def state(**changes: Any) -> LinearState:
    return empty_state(2, 4, 5, 8)._replace(**changes)


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in ("q", "k", "v", "key_mask")),
    *((name, ValueError, "wrong device", lambda a, n=name: a[n].to("meta")) for name in ("k", "key_mask", "omega")),
    ("k", ValueError, "head_dim", lambda a: a["k"][..., :4]),
    ("k", ValueError, "heads that do not divide", lambda a: torch.randn(2, 3, 12, 8)),
    ("v", ValueError, "length", lambda a: a["v"][:, :, :5]),
    ("q", TypeError, "float64", lambda a: a["q"].double()),
    ("key_mask", TypeError, "not bool", lambda a: a["key_mask"].float()),
    ("key_mask", ValueError, "length", lambda a: a["key_mask"][:, :5]),
    ("feature_map", ValueError, "unknown", lambda a: "softmax"),
    ("feature_map", TypeError, "no tensor comes out", lambda a: lambda x: None),
    ("is_causal", TypeError, "not a bool", lambda a: 1),
    ("return_state", TypeError, "not a bool", lambda a: None),
    ("eps", ValueError, "negative", lambda a: -1e-6),
    ("eps", ValueError, "NaN", lambda a: float("nan")),
    ("eps", TypeError, "tensor", lambda a: torch.tensor(1e-6)),
    ("omega", ValueError, "other head_dim", lambda a: torch.randn(7, 5)),
    ("omega", ValueError, "no directions", lambda a: torch.randn(8, 0)),
    ("omega", TypeError, "integers", lambda a: torch.ones(8, 5, dtype=torch.int32)),
    ("omega", ValueError, "none beside a state", lambda a: None),
    ("initial_state", TypeError, "a tensor", lambda a: torch.zeros(2)),
    ("initial_state", ValueError, "other features", lambda a: empty_state(2, 4, 8, 8)),
    ("initial_state", ValueError, "heads of keys", lambda a: empty_state(2, 2, 5, 8)),
    ("initial_state.z", TypeError, "half", lambda a: state(z=torch.zeros(2, 4, 5, dtype=torch.float16))),
    ("initial_state.s", ValueError, "wrong device", lambda a: state(s=torch.zeros(2, 4, 5, 8, device="meta"))),
    ("generator", TypeError, "a number", lambda a: 42),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    changed = {name.partition(".")[0]: change(args)}
    if name == "feature_map":
        changed["omega"] = None
    with pytest.raises(error, match=rf"^{name}\b"):
        linear_attention(**args | changed)


def test_omega_belongs_to_random_features_alone() -> None:
    with pytest.raises(ValueError, match=r"^omega must be None but for 'favor', 'rff', 'grf', got it for 'elu'"):
        linear_attention(**good() | {"feature_map": "elu"})


def test_causal_attention_refuses_other_lengths() -> None:
    args = good() | {"initial_state": None, "is_causal": True}
    args |= {name: args[name][:, :, :7] for name in "q"}
    with pytest.raises(ValueError, match=r"^k must have q's length 7 with is_causal=True, got 12"):
        linear_attention(**args)


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_step_takes_one_token(name: str) -> None:
    args = {x: torch.randn(1, 2, 1, 4) for x in "qkv"}
    args |= {x: torch.randn(1, 2, 3, 4) for x in ("kv" if name == "k" else "q")}
    with pytest.raises(ValueError, match=rf"^{name} must have length 1, got 3"):
        linear_attention_step(**args, state=empty_state(1, 2, 4, 4))


def test_a_step_names_its_state() -> None:
    args = {x: torch.randn(1, 2, 1, 4) for x in "qkv"}
    with pytest.raises(ValueError, match=r"^state\.s must have shape"):
        linear_attention_step(**args, state=empty_state(1, 2, 4, 5))


def test_good_input_is_accepted() -> None:
    assert linear_attention(**good()).shape == (2, 4, 12, 8)
