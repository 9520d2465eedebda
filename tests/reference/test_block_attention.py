"""The definition of block attention, against loops over rows, and its gradient, against finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference.block_attention import block_attention, block_attention_backward
from fastattn.reference.dropout import kept
from tests.ops.cases import Case, Three, cut_after, leaves

SMALL: dict[str, Any] = {
    "heads": 2,
    "kv_heads": 1,
    "n_queries": 9,
    "n_keys": 11,
    "head_dim": 3,
    "value_dim": 2,
    "c_q": 3,
    "c_k": 4,
}
OPTIONS = [
    pytest.param({}, id="own block"),
    pytest.param({"look_back": 1}, id="look back"),
    pytest.param({"look_back": 2, "look_ahead": 1, "wrap": False}, id="no wrap"),
    pytest.param({"look_back": 4, "look_ahead": 3}, id="round the end, some blocks twice"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"self_mode": "exclude", "look_ahead": 1}, id="exclude self"),
    pytest.param({"is_causal": True, "self_mode": "exclude", "scale": 0.7}, id="causal, exclude self, own scale"),
    pytest.param({"correct_duplicates": True}, id="duplicates"),
    pytest.param({"correct_duplicates": True, "look_back": 1, "look_ahead": 1}, id="duplicates, look both ways"),
    pytest.param({"correct_duplicates": True, "look_back": 7, "look_ahead": 6}, id="duplicates, all blocks twice"),
    pytest.param({"correct_duplicates": True, "look_back": 1, "wrap": False}, id="duplicates, no wrap"),
    pytest.param({"bucket": True, "look_back": 1}, id="within buckets"),
    pytest.param({"bucket": True, "look_back": 6, "correct_duplicates": True}, id="duplicates within buckets"),
    pytest.param({"local": True}, id="local round"),
    pytest.param({"local": True, "correct_duplicates": True, "look_ahead": 1}, id="duplicates with a local round"),
    pytest.param({"dropout_p": 0.4, "seed": 2**33 + 1, "look_back": 1}, id="dropout"),
    pytest.param({"used": True, "look_back": 1}, id="some blocks used"),
    pytest.param({"used": True, "look_back": 1, "look_ahead": 1, "wrap": False}, id="some blocks used, no wrap"),
    pytest.param({"used": True, "look_back": 4, "look_ahead": 3, "correct_duplicates": True}, id="used ones twice"),
]
REFORMER = {"self_mode": "last_resort", "is_causal": True, "look_back": 1, "key_mask": True}
SMYRF = {"self_mode": "once", "is_causal": True, "key_mask": True}
OWN_KEY = [  # as many queries as keys
    pytest.param(REFORMER, id="last resort, causal"),
    pytest.param(REFORMER | {"is_causal": False, "bucket": True}, id="last resort within buckets"),
    pytest.param(REFORMER | {"bucket": True, "local": True, "correct_duplicates": True}, id="all that Reformer has"),
    pytest.param(REFORMER | {"dropout_p": 0.4}, id="last resort with dropout"),
    pytest.param(REFORMER | {"used": True, "bucket": True, "correct_duplicates": True}, id="some of Reformer's blocks"),
    pytest.param(SMYRF, id="once, causal"),
    pytest.param(SMYRF | {"local": True, "correct_duplicates": True, "dropout_p": 0.4}, id="all that SMYRF has"),
]


def small(n_keys: int = 11, batch: int = 1) -> tuple[Three, tuple[Tensor, Tensor]]:
    case = Case(**SMALL | {"n_keys": n_keys, "batch": batch})
    return leaves(*case.inputs(torch.float64)), case.indices()


def made(options: dict[str, Any], n_keys: int) -> dict[str, Any]:
    """The options with the tensors that they name."""
    options = dict(options)
    batch = 1
    if options.pop("used", False):
        batch, options["n_used_blocks"] = 3, torch.tensor([2, 3, 1], dtype=torch.int32)
    if options.pop("local", False):
        options["local_index"] = Case(**SMALL | {"n_keys": n_keys, "rounds": 1, "n_blocks": 4, "c_q": 2}).indices(4)
    if options.pop("bucket", False):
        g = torch.Generator().manual_seed(5)
        options |= {
            f"{x}_bucket": torch.randint(2, (batch, 2, 2, n), generator=g) for x, n in (("q", 9), ("k", n_keys))
        }
    if "key_mask" in options:
        options["key_mask"] = torch.arange(n_keys).expand(batch, -1) % 4 != 1
    return options


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, look_back: int = 0, look_ahead: int = 0,
    wrap: bool = True, key_mask: Tensor | None = None, is_causal: bool = False, self_mode: str = "attend",
    q_bucket: Tensor | None = None, k_bucket: Tensor | None = None, local_index: tuple[Tensor, Tensor] | None = None,
    correct_duplicates: bool = False, scale: float | None = None, dropout_p: float = 0.0, seed: int = 0,
    n_used_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Lists the keys that each row meets, one by one, and takes one softmax over the list."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, n_rounds, n_blocks, _ = q_index.shape
    rows, lses = [], []
    for b, h in itertools.product(range(batch), range(heads)):
        met: dict[int, list[tuple[int, int]]] = {}  # of a row: (key, round)
        n_used = n_blocks if n_used_blocks is None else int(n_used_blocks[b])
        for r, c in itertools.product(range(n_rounds), range(n_used)):
            for i in q_index[b, h, r, c].tolist():
                if i < 0:
                    continue
                met.setdefault(i, [])
                for other in range(c - look_back, c + look_ahead + 1):
                    if not wrap and not 0 <= other < n_used:
                        continue
                    k_round, block = divmod((r * n_used + other) % (n_rounds * n_used), n_used)
                    keys = k_index[b, h, k_round, block].tolist()
                    if q_bucket is not None and k_bucket is not None:
                        mine = q_bucket[b, h, r, i]
                        keys = [j for j in keys if k_round == r and j >= 0 and k_bucket[b, h, r, j] == mine]
                    met[i].extend((j, r) for j in keys)
        if local_index is not None:
            for queries, keys in zip(*(index[b, h, 0].tolist() for index in local_index), strict=True):
                for i in queries:
                    if i >= 0:
                        met.setdefault(i, []).extend((j, n_rounds) for j in keys)
        for i in range(q.shape[2]):
            own = i in met and self_mode in ("once", "last_resort") and (key_mask is None or bool(key_mask[b, i]))
            pairs = [(j, r) for j, r in met.get(i, []) if j >= 0 and (key_mask is None or key_mask[b, j])]
            pairs = [(j, r) for j, r in pairs if (j <= i or not is_causal) and (j != i or self_mode == "attend")]
            if correct_duplicates:
                pairs = [pair for at, pair in enumerate(pairs) if pair[0] not in [j for j, _ in pairs[:at]]]
            if self_mode == "once" and own:
                pairs.append((i, n_rounds + (local_index is not None)))
            fallen_back = self_mode == "last_resort" and own and not pairs
            if fallen_back:
                pairs = [(i, -1)]
            if not pairs:
                rows.append(v.new_zeros(v.shape[-1]))
                lses.append(v.new_full((), -math.inf))
                continue
            kv, js = h // (heads // k.shape[1]), [j for j, _ in pairs]
            s = k[b, kv, js] @ q[b, h, i] * factor
            p = torch.softmax(s, 0)
            if dropout_p and not fallen_back:
                p = p * p.new_tensor([weight(dropout_p, seed, b * heads + h, r, i, j) for j, r in pairs])
            rows.append(v[b, kv, i] if fallen_back else p @ v[b, kv, js])
            lses.append(torch.logsumexp(s, 0))
    return torch.stack(rows).view(*q.shape[:3], -1), torch.stack(lses).view(q.shape[:3])


def weight(p: float, seed: int, head: int, round_id: int, i: int, j: int) -> float:
    """What dropout multiplies a probability with."""
    stays = kept(p, seed, torch.tensor(head), round_id, torch.tensor(i), torch.tensor(j))
    return float(stays) / (1 - p)


def check_against_loops(options: dict[str, Any], n_keys: int) -> None:
    """Values by plain loops, and gradients of both, also as written out from (out, lse)."""
    options = made(options, n_keys)
    used = options.get("n_used_blocks")
    inputs, indices = small(n_keys, 1 if used is None else len(used))
    if used is not None:
        indices = cut_after(indices[0], used), cut_after(indices[1], used)
    out, lse = block_attention(*inputs, *indices, **options)
    expected, expected_lse = by_loops(*inputs, *indices, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)
    dout = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, inputs, dout)
    actual = torch.autograd.grad(out, inputs, dout)
    with torch.no_grad():
        written = block_attention_backward(dout, *inputs, *indices, out, lse, **options)
    for gradient, from_lse, exact in zip(actual, written, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-13)
        torch.testing.assert_close(from_lse, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
def test_is_one_softmax_over_all_keys_met(options: dict[str, Any]) -> None:
    check_against_loops(options, 11)


@pytest.mark.parametrize("options", OWN_KEY)
def test_a_row_has_its_own_key_beside_its_blocks(options: dict[str, Any]) -> None:
    check_against_loops(options, 9)


def test_correcting_duplicates_takes_the_logarithm_of_the_count_off_the_logits() -> None:
    (q, k, v), (q_index, k_index) = small()
    count = torch.zeros(1, 2, 9, 11, dtype=torch.float64)
    for h, r, c in itertools.product(range(2), range(2), range(3)):
        for other in (c - 1, c):
            keys = k_index[0, h].flatten(0, 1)[(3 * r + other) % 6]
            for i, j in itertools.product(q_index[0, h, r, c].tolist(), keys.tolist()):
                count[0, h, i, j] += i >= 0 and j >= 0
    s = q @ k.mT * q.shape[-1] ** -0.5
    for corrected in (False, True):
        out, lse = block_attention(q, k, v, q_index, k_index, look_back=1, correct_duplicates=corrected)
        logits = s + torch.log(count) - (torch.log(count.clamp_min(1)) if corrected else 0)
        torch.testing.assert_close(out, torch.softmax(logits, -1) @ v, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, torch.logsumexp(logits, -1), rtol=0, atol=1e-13)
    assert count.max() > 2  # in a window that reaches into the other round, and in that round's own


@pytest.mark.parametrize(
    "options", [{"look_back": 1}, REFORMER | {"local": True, "bucket": True}, SMYRF | {"dropout_p": 0.4}], ids=str
)
def test_derivatives_agree_with_finite_differences(options: dict[str, Any]) -> None:
    inputs, indices = small(9)
    options = made(options, 9)

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_attention(q, k, v, *indices, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, inputs)
    if options == {"look_back": 1}:
        assert torch.autograd.gradgradcheck(lambda *x: both(*x)[0].sum((1, 2)), inputs)


def test_dropout_keeps_the_mean_and_the_wanted_share() -> None:
    n, p = 256, 0.3
    heads, rows = torch.arange(4).view(4, 1, 1), torch.arange(n)
    stays = kept(p, 11, heads, 2, rows.unsqueeze(-1), rows)
    assert stays.shape == (4, n, n)
    share = stays.double().mean((1, 2))
    assert ((share - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p)) / n).all()
    # neither heads, nor rounds, nor seeds, nor a query and a key in each other's place draw alike
    others = (kept(p, 12, heads, 2, rows.unsqueeze(-1), rows), kept(p, 11, heads, 3, rows.unsqueeze(-1), rows))
    for other in (*others, stays.mT, stays.roll(1, 0)):
        assert abs(float((stays == other).double().mean()) - (p * p + (1 - p) ** 2)) < 0.02


@pytest.mark.parametrize("shift", [-4000.0, 4000.0])
def test_scores_of_any_size_neither_vanish_nor_overflow(shift: float) -> None:
    (q, k, v), (q_index, k_index) = small()
    q_index[:, :, 1, 0] = -1  # rows that are in the first round alone
    with torch.no_grad():  # another column adds the same to every score
        q, k = (torch.cat([x, torch.full_like(x[..., :1], c)], -1) for x, c in ((q, 1.0), (k, shift)))
    out, lse = block_attention(q, k, v, q_index, k_index, scale=0.5)
    expected, expected_lse = by_loops(q, k, v, q_index, k_index, scale=0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-10)


def test_a_key_mask_is_as_if_the_key_were_in_no_block() -> None:
    (q, k, v), (q_index, k_index) = small()
    key_mask = torch.arange(11).unsqueeze(0) % 3 != 1
    out, lse = block_attention(q, k, v, q_index, k_index, key_mask=key_mask)
    without = torch.where(torch.isin(k_index, torch.tensor([1, 4, 7, 10])), -1, k_index)
    expected, expected_lse = by_loops(q, k, v, q_index, without)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-13)


def test_rows_that_meet_no_key_are_zero_with_zero_gradients() -> None:
    (q, k, v), (q_index, k_index) = small()
    k_index[:, :, :, 0] = -1  # the first block's queries meet nobody, unless in another round
    q_index[:, :, 1] = q_index[:, :, 0]
    alone = q_index[:, :, 0, 0].long()
    alone = torch.zeros(1, 2, 9).scatter(2, alone.clamp_min(0), (alone >= 0).float()).bool()
    out, lse = block_attention(q, k, v, q_index, k_index)
    dq, dk, dv = torch.autograd.grad(out.square().sum() + lse[~alone].sum(), (q, k, v))
    assert alone.any()
    assert torch.equal(lse == -math.inf, alone)
    assert not out[alone].any() and not dq[alone].any()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv))


def test_rows_in_no_block_may_hold_nan() -> None:
    (q, k, v), (q_index, k_index) = small()
    q_index, k_index = (torch.where(index == 0, -1, index) for index in (q_index, k_index))
    with torch.no_grad():
        clean, clean_lse = block_attention(q, k, v, q_index, k_index, look_back=1)
        for tensor in (q, k, v):
            tensor[:, :, 0] = math.nan
    out, lse = block_attention(q, k, v, q_index, k_index, look_back=1)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)
    assert all(torch.isfinite(gradient).all() for gradient in (dq, dk, dv))
    with torch.no_grad():
        written = block_attention_backward(torch.ones_like(out), q, k, v, q_index, k_index, out, lse, look_back=1)
    assert all(torch.isfinite(gradient).all() for gradient in written)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    case = Case()
    q, k, v = case.inputs(dtype)
    out, lse = block_attention(q, k, v, *case.indices())
    expected, expected_lse = block_attention(q.float(), k.float(), v.float(), *case.indices())
    assert torch.equal(out, expected.to(dtype)) and torch.equal(lse, expected_lse)
    gradients = block_attention_backward(torch.ones_like(out), q, k, v, *case.indices(), out, lse)
    assert [gradient.dtype for gradient in gradients] == [dtype] * 3
