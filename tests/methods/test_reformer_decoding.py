"""One-token decoding with cached buckets, against its rule written out token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import lsh_attention, lsh_attention_step, lsh_decoding_state
from fastattn.ops.hash_argmax import hash_argmax
from tests.ops.cases import IMPLS

D, DV, ROUNDS = 8, 5, 2


def tokens(n: int, batch: int = 2, heads: int = 2, v_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, n, D, generator=g), torch.randn(batch, v_heads, n, DV, generator=g)


def draws(n_buckets: int = 8) -> Tensor:
    return torch.randn(1, D, ROUNDS, n_buckets // 2, generator=torch.Generator().manual_seed(1))


def decode(qk: Tensor, v: Tensor, prefix: int, *, state: dict[str, Any] | None = None, **knobs: Any) -> Tensor:
    """Outputs of the tokens after the first ``prefix``."""
    now = lsh_decoding_state(qk[:, :, :prefix], v[:, :, :prefix], n_hashes=ROUNDS, rotations=draws(), **(state or {}))
    out = []
    for t in range(prefix, qk.shape[2]):
        y, now = lsh_attention_step(qk[:, :, t : t + 1], v[:, :, t : t + 1], now, **knobs)
        out.append(y)
        assert now.length == t + 1 <= now.capacity
    return torch.cat(out, 2)


def defined(
    qk: Tensor, v: Tensor, prefix: int, most: int, *, scale: float = D**-0.5, across_buckets: bool = True,
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rule, in fp64: earlier tokens ordered by (shares a bucket, position), the last ``most`` of them."""
    buckets = hash_argmax(qk, draws(), 8)
    qk, v = qk.double(), v.double()
    group = qk.shape[1] // v.shape[1]
    out = torch.zeros(*qk.shape[:2], qk.shape[2] - prefix, v.shape[3], dtype=torch.float64)
    for b in range(qk.shape[0]):
        for h in range(qk.shape[1]):
            values = v[b, h // group]
            for t in range(prefix, qk.shape[2]):
                shares = [bool((buckets[b, h, :, j] == buckets[b, h, :, t]).any()) for j in range(t)]
                earlier = [j for j in range(t) if real is None or real[b, j]]
                if not across_buckets:
                    earlier = [j for j in earlier if shares[j]]
                keys = sorted(earlier, key=lambda j: (shares[j], j))[-most:]
                if not keys:
                    out[b, h, t - prefix] = values[t]
                    continue
                k = qk[b, h, keys] / qk[b, h, keys].norm(dim=-1, keepdim=True)
                out[b, h, t - prefix] = torch.softmax(k @ qk[b, h, t] * scale, 0) @ values[keys]
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "knobs", [{}, {"across_buckets": False}, {"scale": 1.0, "look_back": 0}, {"v_heads": 1}], ids=str
)
def test_a_step_is_its_rule(knobs: dict[str, Any], impl: str) -> None:
    knobs = dict(knobs)
    x = tokens(40, v_heads=knobs.pop("v_heads", 2))
    most = ROUNDS * 4 * (1 + knobs.get("look_back", 1))
    assert most < 30
    out = decode(*x, 3, bucket_size=4, impl=impl, **knobs)
    knobs.pop("look_back", None)
    torch.testing.assert_close(out.double(), defined(*x, 3, most, **knobs), rtol=0, atol=2e-6)


def test_without_sharers_a_token_has_itself() -> None:
    """One that points the other way from all earlier ones is in another bucket in every round."""
    qk, v = tokens(3, batch=1, heads=1, v_heads=1)
    qk[:, :, 1], qk[:, :, 2] = 2.0 * qk[:, :, 0], -qk[:, :, 0]
    state = lsh_decoding_state(qk[:, :, :2], v[:, :, :2], n_hashes=ROUNDS, rotations=draws())
    out, _ = lsh_attention_step(qk[:, :, 2:], v[:, :, 2:], state, across_buckets=False)
    assert torch.equal(out, v[:, :, 2:])


def test_with_room_for_all_it_is_causal_shared_qk_attention() -> None:
    """And so what lsh_attention gives below its threshold, token by token."""
    x = tokens(30)
    dense = lsh_attention(*x, is_causal=True, dense_threshold=30)
    torch.testing.assert_close(decode(*x, 1, bucket_size=8), dense[:, :, 1:], rtol=0, atol=2e-6)


def test_padding_of_the_prefix_is_never_met() -> None:
    qk, v = tokens(24)
    real = torch.ones(2, 24, dtype=torch.bool)
    real[0, :7] = False
    mask = real[:, :10]
    clean = decode(qk, v, 10, state={"key_mask": mask}, bucket_size=4)
    torch.testing.assert_close(clean.double(), defined(qk, v, 10, 16, real=real), rtol=0, atol=2e-6)
    qk[0, :, :7], v[0, :, :7] = math.nan, math.nan
    assert torch.equal(decode(qk, v, 10, state={"key_mask": mask}, bucket_size=4), clean)


def test_a_prefix_without_tokens_that_take_part_leaves_a_token_to_itself() -> None:
    qk, v = tokens(3)
    mask = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(decode(qk, v, 2, state={"key_mask": mask}), v[:, :, 2:])


def test_the_room_that_a_state_has_changes_nothing() -> None:
    x = tokens(30)
    expected = decode(*x, 4, bucket_size=4)
    assert torch.equal(decode(*x, 4, state={"capacity": 64}, bucket_size=4), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_states_stay_half(dtype: torch.dtype) -> None:
    qk, v = (x.to(dtype) for x in tokens(20))
    out = decode(qk, v, 4, bucket_size=4, impl="reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), defined(qk, v, 4, 16), rtol=0, atol=8 * torch.finfo(dtype).eps)


BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("state", TypeError, {"state": None}),
    ("qk", ValueError, {"qk": torch.randn(2, 2, 2, D), "v": torch.randn(2, 2, 2, DV)}),
    ("state", ValueError, {"qk": torch.randn(2, 2, 1, D + 1)}),
    ("state", ValueError, {"v": torch.randn(2, 2, 1, DV + 1)}),
    ("state", TypeError, {"qk": torch.randn(2, 2, 1, D).half(), "v": torch.randn(2, 2, 1, DV).half()}),
    ("bucket_size", ValueError, {"bucket_size": 0}),
    ("look_back", TypeError, {"look_back": 1.0}),
    ("across_buckets", TypeError, {"across_buckets": 1}),
    ("scale", ValueError, {"scale": math.inf}),
    ("impl", ValueError, {"impl": "cuda"}),
]


@pytest.mark.parametrize(("name", "error", "change"), BAD)
def test_bad_input_of_a_step_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    qk, v = tokens(5)
    state = lsh_decoding_state(qk, v, n_hashes=ROUNDS, rotations=draws())
    args: dict[str, Any] = {"qk": qk[:, :, :1], "v": v[:, :, :1], "state": state}
    with pytest.raises(error, match=rf"^{name}\b"):
        lsh_attention_step(**args | change)


@pytest.mark.parametrize(
    ("name", "error", "change"),
    [("capacity", ValueError, {"capacity": 4}), ("n_hashes", ValueError, {"n_hashes": 0}),
     ("rotations", ValueError, {"n_hashes": 3}), ("key_mask", ValueError, {"key_mask": torch.ones(2, 4).bool()})],
)  # fmt: skip
def test_bad_input_of_a_state_is_named(name: str, error: type[Exception], change: dict[str, Any]) -> None:
    qk, v = tokens(5)
    with pytest.raises(error, match=rf"^{name}\b"):
        lsh_decoding_state(qk, v, **{"n_hashes": ROUNDS, "rotations": draws()} | change)
