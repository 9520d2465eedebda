"""topk_attention and centroid_attention as citizens of PyTorch, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.cluster_members import members
from fastattn.ops.topk_attention import topk_attention
from tests.bad_input import Bad, Change, each_of
from tests.ops.cases import leaves
from tests.ops.test_topk_attention import Case

OPS = torch.ops.fastattn
OPTIONS = (torch.tensor(5), True, 0.25, 0.2, True)  # seed, is_causal, scale, dropout_p, fallback


def lists() -> tuple[Tensor, ...]:
    """order, offsets, topk_index, mass and rest."""
    tensors = Case().tensors()
    return *members(tensors["clusters"], 5), tensors["topk_index"], tensors["mass"], tensors["rest"]


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    tensors = Case().tensors()
    return tensors["q"], tensors["k"], tensors["v"]


class TestOpcheck:
    def test_of_top_k_attention(self) -> None:
        torch.library.opcheck(OPS.topk_attention.default, (*qkv(), *lists(), *OPTIONS))
        torch.library.opcheck(OPS.topk_attention.default, (*leaves(*qkv()), *lists(), *OPTIONS))

    def test_of_its_backward(self) -> None:
        out, lse = OPS.topk_attention(*qkv(), *lists(), *OPTIONS)
        args = (torch.ones_like(out), torch.ones_like(lse), *qkv(), *lists()[:4], lse, *OPTIONS)
        torch.library.opcheck(OPS.topk_attention_backward.default, args)

    def test_of_centroid_attention(self) -> None:
        mask = torch.rand(1, 48, generator=torch.Generator().manual_seed(0)) < 0.7
        seed, options = torch.tensor(5), (8, 0.25, 0.2, True)
        torch.library.opcheck(OPS.centroid_attention.default, (*qkv(), mask, seed, *options))
        torch.library.opcheck(OPS.centroid_attention.default, (*leaves(*qkv()), mask, seed, *options))
        q, k, v = qkv()
        torch.library.opcheck(OPS.centroid_attention.default, (q, k, None, None, seed, *options))
        out, lse, _ = OPS.centroid_attention(q, k, v, mask, seed, *options)
        args = (torch.ones_like(out), torch.ones_like(lse), q, k, v, mask, seed, out, lse, 0.25, 0.2, True)
        torch.library.opcheck(OPS.centroid_attention_backward.default, args)


def test_a_second_derivative_is_refused() -> None:
    tensors = Case().tensors()
    tensors["q"].requires_grad_()
    out, _ = topk_attention(**tensors)
    (dq,) = torch.autograd.grad(out.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="topk_attention has no second derivative; impl='reference' has one"):
        dq.sum().backward()


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in Case().tensors()),
    *(
        (name, ValueError, "wrong device", lambda a, n=name: a[n].to("meta"))
        for name in Case().tensors()
        if name != "q"
    ),
    *((name, ValueError, "wrong rank", lambda a, n=name: a[n][0]) for name in Case().tensors()),
    *((name, TypeError, "another dtype", lambda a, n=name: a[n].half()) for name in "kv"),
    *((name, TypeError, "int64", lambda a, n=name: a[n].long()) for name in ("clusters", "topk_index")),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in ("q", "mass", "rest")),
    ("clusters", ValueError, "length", lambda a: a["clusters"][..., :5]),
    ("clusters", ValueError, "a number too high", lambda a: a["clusters"].clamp_min(5)),
    ("topk_index", ValueError, "heads", lambda a: a["topk_index"][:, :1]),
    ("topk_index", ValueError, "empty", lambda a: a["topk_index"][..., :0]),
    ("mass", ValueError, "clusters", lambda a: a["mass"][..., :2]),
    ("rest", ValueError, "value_dim", lambda a: a["rest"][..., :2]),
    ("is_causal", TypeError, "not a bool", lambda a: 1),
    ("scale", ValueError, "not finite", lambda a: float("nan")),
    ("dropout_p", ValueError, "1", lambda a: 1.0),
    ("seed", ValueError, "negative", lambda a: -1),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_what_is_wrong_is_named(name: str, error: type[Exception], change: Change) -> None:
    args: dict[str, Any] = Case().tensors()
    with pytest.raises(error, match=rf"^{name}\b"):
        topk_attention(**args | {name: change(args)})
