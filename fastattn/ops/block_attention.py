"""Gathered block attention as a torch op: ``fastattn::block_attention`` and its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.autotune.choice import lookup, stamp
from fastattn.kernels.rows import check_counts, check_rows
from fastattn.ops import checks
from fastattn.ops.autocast import cast_inputs, no_autocast
from fastattn.ops.fallback import fused_or_defined, kernel_room
from fastattn.ops.library import define_autograd, define_op, refuse_gradient
from fastattn.reference import block_attention as reference

SELF_MODES = ("attend", "exclude", "last_resort", "once")
LocalIndex = tuple[Tensor, Tensor]


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
    q_bucket: Tensor | None = None,
    k_bucket: Tensor | None = None,
    local_index: LocalIndex | None = None,
    n_used_blocks: Tensor | None = None,
    correct_duplicates: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
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
        self_mode: what a query has of the key of its own row. "attend": it is a key like others. "exclude": nothing.
            "last_resort": out = v_i and lse = scale * q_i . k_i where no round offers another key, whose gradient goes
            to v_i alone (Reformer). "once": it counts exactly once, whatever the blocks are. In both, a row that is in
            no block, or whose own key is masked, has no own key; N must be S.
        q_bucket: (B, H, R, N) and k_bucket: (B, H, R, S), int32: where given, a pair counts only where its buckets are
            equal. A key's is that of the round whose block it stands in; with ``wrap`` this may be a neighbouring
            round, whose buckets equal none of this one's.
        local_index: (q_index (B, H, 1, nb', Cq'), k_index (B, H, 1, nb', Ck')): one more round after the others, of
            blocks of another size, which look neither back nor ahead and ask for no bucket.
        n_used_blocks: (B,) int32, from 1 to nb: where given, a round of example b ends after its first
            n_used_blocks[b] blocks, as if there were no others: what looks round its end comes from those to the next
            round. The others must hold -1 alone, else results are undefined (not checked).
        correct_duplicates: a key met several times, in several rounds or in one window round the end, counts once: as
            if the logarithm of how often it is met were taken off its logits. Takes O(R * (N + S)) memory.
        scale: factor of q . k; None is 1 / sqrt(D).
        dropout_p: the probability with which each attention probability is set to 0, in [0, 1); the others are divided
            by 1 - dropout_p, and lse is not changed. The only key of a row in "last_resort" stays.
        seed: of dropout, from 0 to 2^63 - 1, or such a number in an int64 tensor without dimensions. The draw is a
            function of (seed, batch index, head, round, query row, key row), the same on every device and in the
            definition (Philox, see :mod:`fastattn.reference.dropout`).
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
    if self_mode in ("last_resort", "once") and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"self_mode={self_mode!r} needs as many keys as queries, got {q.shape[2]} queries and {k.shape[2]} keys"
        )
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], q.device)
    if (q_bucket is None) != (k_bucket is None):
        missing, given = ("q_bucket", "k_bucket") if q_bucket is None else ("k_bucket", "q_bucket")
        raise ValueError(f"{missing} must be given where {given} is, got None")
    if q_bucket is not None and k_bucket is not None:
        _check_bucket("q_bucket", q_bucket, q_index, q.shape[2])
        _check_bucket("k_bucket", k_bucket, k_index, k.shape[2])
    _check_local_index(local_index, q)
    _check_used(n_used_blocks, q)
    checks.check_bool("correct_duplicates", correct_duplicates)
    checks.check_scale(scale)
    check_dropout(dropout_p, seed, q.device)
    return attend_blocks(
        q,
        k,
        v,
        q_index,
        k_index,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=wrap,
        key_mask=key_mask,
        is_causal=is_causal,
        self_mode=self_mode,
        q_bucket=q_bucket,
        k_bucket=k_bucket,
        local_index=local_index,
        n_used_blocks=n_used_blocks,
        correct_duplicates=correct_duplicates,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
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
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    self_mode: str = "attend",
    q_bucket: Tensor | None = None,
    k_bucket: Tensor | None = None,
    local_index: LocalIndex | None = None,
    n_used_blocks: Tensor | None = None,
    correct_duplicates: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`block_attention` for methods, which have checked their arguments and cast them already."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if key_mask is not None:
        k_index = reference.fold_key_mask(k_index, key_mask)
        if local_index is not None:
            local_index = (local_index[0], reference.fold_key_mask(local_index[1], key_mask))
        if self_mode in ("attend", "exclude"):
            key_mask = None  # the indices hold all there is of it
    draw = None
    if dropout_p > 0:
        draw = seed if isinstance(seed, Tensor) else q.new_full((), seed, dtype=torch.int64)
    flags = (look_back, look_ahead, wrap, is_causal, self_mode, correct_duplicates, dropout_p)
    tensors = (key_mask, q_bucket, k_bucket, *(local_index or (None, None)), draw, n_used_blocks)
    if impl != "reference":
        options = ()
        if flags != _DEFAULTS or any(tensor is not None for tensor in tensors):
            options = (*flags, *tensors)  # where left out, they cost nothing on their way through torch
        return _FORWARD(q, k, v, q_index, k_index, scale, impl is None, *options)
    named = _define(q, k, q_index, k_index, scale, flags, tensors)
    with no_autocast(q.device.type):
        out, lse = reference.block_attention(q, k, v, q_index, k_index, **named)
    return out, lse.detach()


def check_dropout(dropout_p: object, seed: object, device: torch.device) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or a torch.int64 tensor, got {seed.dtype}")
        if seed.dim() != 0:
            raise ValueError(f"seed must have no dimensions as a tensor, got shape {tuple(seed.shape)}")
        checks.check_device("seed", seed, device)
        return
    checks.check_int("seed", seed, 0)
    if isinstance(seed, int) and seed >= 2**63:
        raise ValueError(f"seed must be below 2^63, got {seed}")


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


def _check_local_index(local_index: object, q: Tensor) -> None:
    if local_index is None:
        return
    if not isinstance(local_index, tuple) or len(local_index) != 2:
        raise TypeError(f"local_index must be a tuple (q_index, k_index) or None, got {type(local_index).__name__}")
    for at, index in enumerate(local_index):
        checks.check_tensors(**{f"local_index[{at}]": index})
        _check_index(f"local_index[{at}]", index, q)
        if index.shape[2] != 1:
            raise ValueError(f"local_index[{at}] must have one round, got shape {tuple(index.shape)}")
    if local_index[0].shape[3] != local_index[1].shape[3]:
        shapes = " and ".join(str(tuple(index.shape)) for index in local_index)
        raise ValueError(f"local_index must have as many blocks of keys as of queries, got shapes {shapes}")


def _check_bucket(name: str, bucket: object, index: Tensor, length: int) -> None:
    checks.check_tensors(**{name: bucket})
    assert isinstance(bucket, Tensor)
    if bucket.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {bucket.dtype}")
    if bucket.shape != (*index.shape[:3], length):
        raise ValueError(
            f"{name} must have shape (batch, heads, rounds, length) = {(*index.shape[:3], length)}, "
            f"got {tuple(bucket.shape)}"
        )
    checks.check_device(name, bucket, index.device)


def _check_used(n_used_blocks: object, q: Tensor) -> None:
    if n_used_blocks is None:
        return
    checks.check_tensors(n_used_blocks=n_used_blocks)
    assert isinstance(n_used_blocks, Tensor)
    if n_used_blocks.dtype != torch.int32:
        raise TypeError(f"n_used_blocks must be torch.int32, got {n_used_blocks.dtype}")
    if n_used_blocks.shape != q.shape[:1]:
        raise ValueError(f"n_used_blocks must have shape (batch,) = ({q.shape[0]},), got {tuple(n_used_blocks.shape)}")
    checks.check_device("n_used_blocks", n_used_blocks, q.device)


# what a call has besides its five tensors, scale and fallback, in the op's order
_FLAGS = ("look_back", "look_ahead", "wrap", "is_causal", "self_mode", "correct_duplicates", "dropout_p")
_DEFAULTS = (0, 0, True, False, "attend", False, 0.0)
_TENSORS = ("key_mask", "q_bucket", "k_bucket", "local_index_q", "local_index_k", "seed", "n_used_blocks")
_N_SCALARS = 2 + len(_FLAGS)


def _define(
    q: Tensor, k: Tensor, q_index: Tensor, k_index: Tensor, scale: float, flags: Sequence[Any], tensors: Sequence[Any]
) -> dict[str, Any]:
    """The options of the definition, whose numbers of rows and blocks are checked here; kernels have it done by who
    launches them."""
    options: dict[str, Any] = {}
    options |= zip(_FLAGS, flags, strict=False)
    options |= zip(_TENSORS, tensors, strict=False)
    indices = {"q_index": (q_index, q), "k_index": (k_index, k)}
    local = options.pop("local_index_q", None), options.pop("local_index_k", None)
    if local[0] is not None:
        options["local_index"] = local
        indices |= {"local_index_q": (local[0], q), "local_index_k": (local[1], k)}
    for name, (index, x) in indices.items():
        check_rows(name, index, x.shape[2])
    if options.get("n_used_blocks") is not None:
        check_counts("n_used_blocks", options["n_used_blocks"], q_index.shape[3])
    if options.get("seed") is None:
        options.pop("seed", None)
    return options | {"scale": scale}


def _forward(q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    scale, fallback, *others = options

    def fused() -> tuple[Tensor, Tensor]:
        rows, room = (q_index.contiguous(), k_index.contiguous()), kernel_room("block_attention")
        return room.forward(q, k, v, *rows, scale, *others, lookup=lookup, stamp=stamp())

    def defined() -> tuple[Tensor, Tensor]:
        flags, tensors = options[2:_N_SCALARS], options[_N_SCALARS:]
        named = _define(q, k, q_index, k_index, scale, flags, tensors)
        with no_autocast(q.device.type):
            return reference.block_attention(q, k, v, q_index, k_index, **named)

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
    scale, fallback, *flags = options[:_N_SCALARS]
    tensors = options[_N_SCALARS:]

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        rows, room = (q_index.contiguous(), k_index.contiguous()), kernel_room("block_attention")
        return room.backward(dout, q, k, v, *rows, out, lse, scale, *flags, *tensors, lookup=lookup, stamp=stamp())

    def defined() -> tuple[Tensor, Tensor, Tensor]:
        named = _define(q, k, q_index, k_index, scale, flags, tensors)
        given = (dout, q, k, v, q_index, k_index, out, lse)
        with no_autocast(q.device.type):
            return reference.block_attention_backward(*given, **named)

    return fused_or_defined("block attention", fused, defined, fallback=fallback)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n_queries, _ = q.shape
    out = q.new_empty((batch, heads, n_queries, v.shape[3]))
    return out, q.new_empty((batch, heads, n_queries), dtype=torch.float32)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# scale, fallback, as _FLAGS, as _TENSORS
_OPTIONS = (
    "float scale, bool fallback, int look_back=0, int look_ahead=0, bool wrap=True, bool is_causal=False,"
    " str self_mode='attend', bool correct_duplicates=False, float dropout_p=0.0, Tensor? key_mask=None,"
    " Tensor? q_bucket=None, Tensor? k_bucket=None, Tensor? local_index_q=None, Tensor? local_index_k=None,"
    " Tensor? seed=None, Tensor? n_used_blocks=None"
)
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
        ctx.options = args[5 : 5 + _N_SCALARS]
        ctx.save_for_backward(*args[:5], out, lse, *args[5 + _N_SCALARS :])
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, q_index, k_index, out, lse, *tensors = ctx.saved_tensors
        options = (*ctx.options, *tensors)
        dq, dk, dv = _BACKWARD(grads[0], q, k, v, q_index, k_index, out, lse, *options)
        return None, dq, dk, dv, *(None for _ in range(2 + len(options)))


define_autograd(_FORWARD, _BlockAttention)
refuse_gradient(
    _BACKWARD, "block_attention has no second derivative; impl='reference' has one (slower, memory O(rounds * N * C))"
)
