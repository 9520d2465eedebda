"""Gathered block attention as a torch op: ``fastattn::block_attention`` and its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.kernels.rows import check_rows
from fastattn.ops import checks
from fastattn.ops.autocast import cast_inputs, no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op, refuse_gradient
from fastattn.reference import block_attention as reference

SELF_MODES = ("attend", "exclude")

_FLAGS = ("look_back", "look_ahead", "wrap", "is_causal", "exclude_self")


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    look_back: int = 0,
    look_ahead: int = 0,
    wrap: bool = True,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    self_mode: str = "attend",
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Each block of query rows attends to its block of key rows and to neighbouring ones, in several rounds.

    The rounds together are one softmax over all the keys that a row met; a key met several times counts several times.
    This is the attention of SMYRF (Daras et al. 2020, section 3.3) and, with look_back=1, of Reformer (Kitaev et al.
    2020, section 2), once their hashing has chosen the blocks.

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16, any strides.
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv), in q's dtype; H is a multiple of Hkv, and query head h reads key head
            h // (H / Hkv).
        q_index: (B, H, R, nb, Cq) int32: the query rows of each of the nb blocks in each of the R rounds, -1 for
            padding. In a round a row stands in at most one block, else its results are undefined (not checked: that
            would cost a sort). Values of N and more, or below -1, raise before anything is read: ValueError on the CPU,
            a failed device-side assertion elsewhere, where looking at them would make the host wait.
        k_index: (B, H, R, nb, Ck) int32: the same for key rows.
        look_back, look_ahead: how many blocks before and after its own a block of queries attends to as well.
        wrap: blocks are numbered on over all rounds, and neighbours are counted round the end: block 0 of a round looks
            back to the last block of the round before, in round 0 to that of the last round. False: a round's ends have
            no neighbours.
        key_mask: (B, S) bool, True for keys that take part.
        is_causal: a query attends only to keys whose row is not after its own.
        self_mode: "attend", or "exclude": a query does not attend to the key of its own row.
        scale: factor of q . k; None is 1 / sqrt(D).
        impl: None runs the fused kernel, or its PyTorch definition, with one warning, where this machine can't run it;
            "triton" raises :class:`~fastattn.kernels.errors.Unsupported` there; "reference" always runs the definition,
            under plain autograd (fp64 and second derivatives too, memory O(R * N * C)).

    Returns:
        out (B, H, N, Dv) in q's dtype and lse (B, H, N), the logarithm of the softmax's denominator, in fp32 (fp64 for
        fp64), which carries no gradient. A row that met no key has out 0, lse -inf and zero gradients.

    Under autocast q, k and v are cast to its dtype, as by ``scaled_dot_product_attention``.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    checks.check_tensors(q=q, k=k, v=v, q_index=q_index, k_index=k_index)
    checks.check_choice("impl", impl, checks.IMPLS)
    q, k, v = cast_inputs(q, k, v)
    checks.check_qkv(q, k, v, impl)
    _check_index("q_index", q_index, q)
    _check_index("k_index", k_index, q)
    if k_index.shape[2:4] != q_index.shape[2:4]:
        raise ValueError(
            f"k_index must have q_index's numbers of rounds and blocks {tuple(q_index.shape[2:4])}, "
            f"got shape {tuple(k_index.shape)}"
        )
    checks.check_int("look_back", look_back, 0)
    checks.check_int("look_ahead", look_ahead, 0)
    checks.check_bool("wrap", wrap)
    checks.check_bool("is_causal", is_causal)
    checks.check_choice("self_mode", self_mode, SELF_MODES)
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], q.device)
    checks.check_scale(scale)
    if key_mask is not None:
        k_index = reference.fold_key_mask(k_index, key_mask)
    return attend_blocks(
        q,
        k,
        v,
        q_index,
        k_index,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=wrap,
        is_causal=is_causal,
        exclude_self=self_mode == "exclude",
        scale=scale,
        impl=impl,
    )


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    look_back: int = 0,
    look_ahead: int = 0,
    wrap: bool = True,
    is_causal: bool = False,
    exclude_self: bool = False,
    scale: float | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`block_attention` for methods, which have checked their arguments and cast them already."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    flags = (look_back, look_ahead, wrap, is_causal, exclude_self)
    if impl != "reference":
        return _FORWARD(q, k, v, q_index, k_index, *flags, scale, impl is None)
    _check_rows(q, k, q_index, k_index)
    options = _reference_options(flags, scale)
    with no_autocast(q.device.type):
        out, lse = reference.block_attention(q, k, v, q_index, k_index, **options)
    return out, lse.detach()


def _check_index(name: str, index: Tensor, q: Tensor) -> None:
    if index.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {index.dtype}")
    if index.dim() != 5 or index.shape[0] != q.shape[0] or index.shape[1] != q.shape[1]:
        raise ValueError(
            f"{name} must have shape (batch, heads, rounds, blocks, block size) = ({q.shape[0]}, {q.shape[1]}, ...), "
            f"got {tuple(index.shape)}"
        )
    if 0 in index.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(index.shape)}")
    checks.check_device(name, index, q.device)


def _check_rows(q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor) -> None:
    """For the definition; kernels have it done by whoever launches them."""
    check_rows("q_index", q_index, q.shape[2])
    check_rows("k_index", k_index, k.shape[2])


def _reference_options(flags: Sequence[Any], scale: float) -> dict[str, Any]:
    options: dict[str, Any] = dict(zip(_FLAGS, flags, strict=True))
    options["self_mode"] = "exclude" if options.pop("exclude_self") else "attend"
    return options | {"scale": scale}


def _forward(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *flags, scale, fallback = options

    def fused() -> tuple[Tensor, Tensor]:
        rows = (q_index.contiguous(), k_index.contiguous())
        return kernel_room("block_attention").forward(q, k, v, *rows, scale, *flags, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor]:
        _check_rows(q, k, q_index, k_index)
        with no_autocast(q.device.type):
            return reference.block_attention(q, k, v, q_index, k_index, **_reference_options(flags, scale))

    return fused_or_defined("block attention", fused, defined, fallback=fallback)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *flags, scale, fallback = options

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        rows = (q_index.contiguous(), k_index.contiguous())
        room = kernel_room("block_attention")
        return room.backward(dout, q, k, v, *rows, out, lse, scale, *flags, lookup, stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        _check_rows(q, k, q_index, k_index)
        tensors = (dout, q, k, v, q_index, k_index, out, lse)
        with no_autocast(q.device.type):
            return reference.block_attention_backward(*tensors, **_reference_options(flags, scale))

    return fused_or_defined("block attention", fused, defined, fallback=fallback)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n_queries, _ = q.shape
    out = q.new_empty((batch, heads, n_queries, v.shape[3]))
    return out, q.new_empty((batch, heads, n_queries), dtype=torch.float32)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# as _FLAGS, scale, fallback
_OPTIONS = "int look_back, int look_ahead, bool wrap, bool is_causal, bool exclude_self, float scale, bool fallback"
_FORWARD = define_op(
    f"block_attention(Tensor q, Tensor k, Tensor v, Tensor q_index, Tensor k_index, {_OPTIONS})"
    " -> (Tensor out, Tensor lse)",
    _forward,
    fake=_fake_forward,
)
_BACKWARD = define_op(
    "block_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor q_index, Tensor k_index, Tensor out,"
    f" Tensor lse, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    fake=_fake_backward,
)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = below(*args)
        ctx.save_for_backward(*args[:5], out, lse)
        ctx.options = args[5:]
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, q_index, k_index, out, lse = ctx.saved_tensors
        dq, dk, dv = _BACKWARD(grads[0], q, k, v, q_index, k_index, out, lse, *ctx.options)
        return None, dq, dk, dv, *(None for _ in range(2 + len(ctx.options)))


define_autograd(_FORWARD, _BlockAttention)
refuse_gradient(
    _BACKWARD, "block_attention has no second derivative; impl='reference' has one (slower, memory O(rounds * N * C))"
)
