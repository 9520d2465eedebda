"""Reformer's LSH attention (Kitaev et al. 2020, "Reformer: The Efficient Transformer", section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.methods.local import local_blocks
from fastattn.ops import checks
from fastattn.ops.argsort import stable_argsort
from fastattn.ops.autocast import cast_inputs, no_autocast
from fastattn.ops.block_attention import attend_blocks, check_dropout
from fastattn.ops.hash_argmax import bucket_rows, check_buckets, check_rotations
from fastattn.ops.library import define_op, refuse_gradient
from fastattn.reference.block_attention import fold_key_mask

MERGES = ("lse", "mean")
SELF_MODES = (None, "last_resort", "attend")
PADDINGS = ("last", "hashed")
_MOST_UNFACTORISED = 128


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    *,
    n_hashes: int = 8,
    bucket_size: int = 64,
    n_buckets: int | Sequence[int] | None = None,
    look_back: int = 1,
    look_ahead: int = 0,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    across_buckets: bool = True,
    correct_duplicates: bool = False,
    local_window: int = 0,
    merge: str = "lse",
    dropout_p: float = 0.0,
    rotations: Tensor | None = None,
    generator: torch.Generator | None = None,
    impl: str | None = None,
    dense_threshold: int | None = None,
    self_mode: str | None = None,
    wrap: bool | None = None,
    padding: str = "last",
    buckets: Tensor | None = None,
) -> Tensor:
    """Attention among rows that a locality-sensitive hash puts next to one another; queries are keys.

    Row i is the query qk_i and the key k_i = qk_i / |qk_i|. Each round hashes rows to the largest of their products
    with random directions and their opposites, sorts them by bucket, then by position, and cuts them into blocks of
    ``bucket_size``; a block attends to itself, ``look_back`` blocks before it and ``look_ahead`` after it. The rounds
    make one softmax over all keys met, where a key met several times counts several times. A row meets its own key only
    as a last resort, where no round offers it another: then its output is its own value. With one block this is dense
    attention with k_i as keys; with more rounds the error falls, and with ``correct_duplicates`` to zero.

    Time is O(n_hashes * N * (log N + bucket_size * (1 + look_back + look_ahead) * (D + Dv))), extra memory
    O(n_hashes * N + N * (D + Dv)), whatever the number of buckets.

    Args:
        qk: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides. A row of zeros is a key of
            zeros, and passes no gradient to itself as a key.
        v: (B, Hkv, N, Dv) in qk's dtype; H is a multiple of Hkv, and head h of qk reads head h // (H / Hkv).
        n_hashes: rounds. Nothing else depends on it: evaluate with more than a model was trained with.
        bucket_size: rows of a block; padded where it does not divide N.
        n_buckets: of the hash, in each round: an even number, or even factors of it, (f0, f1, ...), for a factorised
            hash, which is cheaper (see :func:`fastattn.ops.hash_argmax.hash_argmax`). None: twice the last dimension of
            ``rotations`` where they are given, else N / bucket_size, rounded up to an even number; above 128 it is
            factorised into the power of two at or above its square root and about what remains. A graph of
            ``torch.export`` has, for every length, as many as the example that it was made from.
        look_back, look_ahead: neighbouring blocks that a block attends to. The paper has 1 and 0; take 1 and 1 where
            attention is not causal.
        is_causal: a row attends only to keys at its own position or before. No value and no gradient of a later one
            enters, but which earlier keys a row meets depends on later rows, for they take part in the sort.
        key_mask: (B, N) bool, True for rows that take part; the others give 0, and what they hold has no effect.
        scale: factor of qk_i . k_j; None is 1 / sqrt(D), as in reformer-pytorch. Models of trax and of Hugging Face
            have the 1 / sqrt(D) in their keys' norm: for those, scale=1.0.
        across_buckets: False: a row attends only to keys of its own bucket among those that it meets.
        correct_duplicates: count a key that a row meets several times once. Not in the originals as it is here.
        local_window: also a round whose blocks are so many consecutive positions (of the rows that take part); 0 is
            none. Not in the originals.
        merge: "lse": one softmax over all rounds. "mean": the mean of the rounds' own softmaxes, for comparison with
            fast-transformers only; rounds do not wrap then, and self_mode is "attend" if not said otherwise.
        dropout_p: probability with which an attention weight is set to 0, after the softmax; the others are divided by
            1 - dropout_p.
        rotations: (H or 1, D, n_hashes, n_buckets / 2 or half the sum of its factors): the directions, used in fp32
            (fp64 for fp64 inputs).
        generator: draws the directions, standard normal, for each head its own, where they are not given, then the seed
            of the dropout.
        impl: None, "triton" or "reference"; see :func:`fastattn.ops.block_attention.block_attention`.
        dense_threshold: up to so many rows every row meets every key, once, and nothing is hashed. None: bucket_size,
            where there is one block anyway (0 if a bucket's limits count, with ``across_buckets=False``).
        self_mode: "last_resort", or "attend": a row's own key is a key like others. None: "last_resort", or "attend"
            with merge="mean".
        wrap: block 0 of a round looks back to the last block of the round before (of the last round, in round 0), as in
            the originals; and the other way round with look_ahead. None: True, or False with merge="mean".
        padding: where rows stand in a round that do not take part. "last": after all others, as in trax and Hugging
            Face. "hashed": where their own hash puts them, as in reformer-pytorch, so that what they hold decides who
            meets whom: for comparison only.
        buckets: (B, H, n_hashes, N) int32, from 0 to below 2^24: of an earlier call, instead of hashing (as a
            reversible layer needs, whose second forward has other roundings).

    Returns:
        out (B, H, N, Dv) in qk's dtype.

    Rows that take no part have no effect at all: the others give, to rounding, what they give without them. Only what
    is left to the length N counts them as well: the default number of buckets, and a ``dense_threshold`` that is above
    ``bucket_size``. Dropout draws by position. Under autocast qk and v are cast to its dtype. Routing is not
    differentiated. Exported graphs (``torch.export``) hold the whole method as one node, ``fastattn::lsh_attention``,
    but for dropout; what is drawn while they are made is constant in them.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    qk, v = check_lsh_inputs(qk, v, scale, impl)
    for name, value, least in (
        ("n_hashes", n_hashes, 1), ("bucket_size", bucket_size, 1), ("look_back", look_back, 0),
        ("look_ahead", look_ahead, 0), ("local_window", local_window, 0),
    ):  # fmt: skip
        checks.check_int(name, value, least)
    for name, value in (
        ("is_causal", is_causal), ("across_buckets", across_buckets), ("correct_duplicates", correct_duplicates)
    ):  # fmt: skip
        checks.check_bool(name, value)
    checks.check_choice("merge", merge, MERGES)
    checks.check_choice("self_mode", self_mode, SELF_MODES)
    checks.check_choice("padding", padding, PADDINGS)
    checks.check_mask("key_mask", key_mask, qk.shape[0], qk.shape[2], qk.device)
    check_dropout(dropout_p, 0, qk.device)
    if dense_threshold is not None:
        checks.check_int("dense_threshold", dense_threshold, 0)
    if wrap is not None:
        checks.check_bool("wrap", wrap)
    if merge == "mean" and (local_window or correct_duplicates or wrap):
        raise ValueError("merge='mean' takes no local_window, correct_duplicates or wrap: it is for comparison only")
    factors = factors_for(n_buckets, rotations, _length(qk), bucket_size)
    if buckets is not None:
        _check_given(buckets, qk, n_hashes)
    elif rotations is None:
        shape = (qk.shape[1], qk.shape[3], n_hashes, sum(factors) // 2)
        rotations = common.draw_normal(shape, generator, qk.device)
    else:
        check_rotations(rotations, qk, factors, n_hashes)
    self_mode = self_mode or ("last_resort" if merge == "lse" else "attend")
    wrap = merge == "lse" if wrap is None else wrap
    scale = 1 / math.sqrt(qk.shape[3]) if scale is None else float(scale)
    dense_threshold = dense_length(dense_threshold, bucket_size, across_buckets)
    args = (qk, v, rotations, buckets, key_mask, bucket_size, list(factors), look_back, look_ahead, wrap)
    knobs = (is_causal, scale, across_buckets, correct_duplicates, local_window, merge, dense_threshold)
    if torch.compiler.is_exporting() and impl is None and dropout_p == 0:
        return _OP(*args, *knobs, self_mode, padding)
    dropout = {"dropout_p": dropout_p, "seed": common.draw_seed(generator, qk.device)} if dropout_p > 0 else {}
    return _attend(*args, *knobs, self_mode, padding, impl=impl, **dropout)


def _attend(
    qk: Tensor,
    v: Tensor,
    rotations: Tensor | None,
    buckets: Tensor | None,
    key_mask: Tensor | None,
    bucket_size: int,
    factors: Sequence[int],
    look_back: int,
    look_ahead: int,
    wrap: bool,
    is_causal: bool,
    scale: float,
    across_buckets: bool,
    correct_duplicates: bool,
    local_window: int,
    merge: str,
    dense_threshold: int,
    self_mode: str,
    padding: str,
    **how: Any,
) -> Tensor:
    """how: dropout_p, seed and impl of block attention."""
    hashed = qk
    if key_mask is not None:
        qk = qk.masked_fill(~key_mask[:, None, :, None], 0.0)  # NaN in padding would get into gradients of the norm
    k, v = unit_rows(qk), v.repeat_interleave(qk.shape[1] // v.shape[1], 1) if v.shape[1] < qk.shape[1] else v
    options: dict[str, Any] = {"is_causal": is_causal, "self_mode": self_mode, "scale": scale, **how}
    if qk.shape[2] <= dense_threshold:
        index, _ = local_blocks(qk.shape[2], qk, key_mask, key_mask)
        return attend_blocks(qk, k, v, index, index, **options)[0]
    with no_autocast(qk.device.type):
        if buckets is None:
            assert rotations is not None
            buckets = bucket_rows(hashed, rotations, tuple(factors), how.get("impl"))
            n_distinct = math.prod(factors)
        else:
            n_distinct = _MOST_GIVEN
        index = _cut(sort_by_bucket(buckets, n_distinct, key_mask if padding == "last" else None), bucket_size)
        if key_mask is not None:
            index = fold_key_mask(index, key_mask)
    short = None
    if key_mask is not None and padding == "last":
        n_real = key_mask.sum(-1)
        options["n_used_blocks"] = ((n_real + (bucket_size - 1)) // bucket_size).clamp_min(1).to(torch.int32)
        if dense_threshold > 0:
            # by itself an example of so few rows is dense; its one block is that too, but for buckets and a local round
            short = (n_real <= min(dense_threshold, bucket_size))[:, None, None, None]
    options |= {"look_back": look_back, "look_ahead": look_ahead, "wrap": wrap}
    own_buckets = None
    if not across_buckets:
        own_buckets = buckets if short is None else buckets.masked_fill(short, 0)
    if merge == "mean":
        return _mean_of_rounds(qk, k, v, index, own_buckets, options)
    if local_window:
        local_index, _ = local_blocks(local_window, qk, key_mask, key_mask)
        if short is not None:
            local_index = local_index.masked_fill(short.unsqueeze(-1), -1)
        options["local_index"] = (local_index, local_index)
    options |= {"q_bucket": own_buckets, "k_bucket": own_buckets, "correct_duplicates": correct_duplicates}
    return attend_blocks(qk, k, v, index, index, **options)[0]


_MOST_GIVEN = 2**24  # up to which fp32 holds every integer


def dense_length(dense_threshold: int | None, bucket_size: int, across_buckets: bool) -> int:
    """The most rows that meet one another without a hash."""
    if dense_threshold is not None:
        return dense_threshold
    return bucket_size if across_buckets else 0


def default_factors(n: int, bucket_size: int) -> tuple[int, ...]:
    """The number of buckets for n rows, as one even factor or as two: n / bucket_size, rounded up to an even number."""
    n_buckets = 2 * -(-n // (2 * bucket_size))
    if n_buckets <= _MOST_UNFACTORISED:
        return (n_buckets,)
    first = 1 << math.ceil(math.log2(math.sqrt(n_buckets)))
    return first, 2 * (n_buckets // (2 * first))


def _length(qk: Tensor) -> int:
    """N; where ``torch.export`` leaves it free, that of the example that it traces."""
    n = qk.shape[2]
    return n if isinstance(n, int) or not torch.compiler.is_exporting() else n.node.hint


def sort_by_bucket(buckets: Tensor, n_buckets: int, key_mask: Tensor | None) -> Tensor:
    """Rows (B, H, h, N), int32, by bucket and then by position; those that are not in key_mask (B, N) last."""
    # one pass of a radix sort will do where 16 bits hold the keys
    keys = buckets.to(torch.int16 if n_buckets < 2**15 else torch.float32)
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask[:, None, None], n_buckets)
    return stable_argsort(keys)


def factors_for(n_buckets: Any, rotations: Any, n: int, bucket_size: int) -> tuple[int, ...]:
    if n_buckets is not None:
        return check_buckets(n_buckets)
    if rotations is None:
        return default_factors(n, bucket_size)
    checks.check_tensors(rotations=rotations)
    return (2 * rotations.shape[-1],) if rotations.dim() else (2,)


def _cut(order: Tensor, size: int) -> Tensor:
    """Sorted rows (B, H, h, N) as blocks (B, H, h, nb, C), -1 in the places left over."""
    n = order.shape[-1]
    n_blocks = -(-n // size)
    if n < n_blocks * size:
        order = torch.nn.functional.pad(order, (0, n_blocks * size - n), value=-1)
    return order.unflatten(-1, (n_blocks, size))


def unit_rows(x: Tensor) -> Tensor:
    """x / |x|, computed in fp32; rows of zeros stay what they are, with gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    is_zero = norm == 0
    return (x * norm.masked_fill(is_zero, 1.0).reciprocal().masked_fill(is_zero, 0.0)).to(x.dtype)


def _mean_of_rounds(
    qk: Tensor, k: Tensor, v: Tensor, index: Tensor, buckets: Tensor | None, options: dict[str, Any]
) -> Tensor:
    seed = options.pop("seed", 0)
    total = torch.zeros((), device=qk.device)
    for r in range(index.shape[2]):
        own = index[:, :, r : r + 1]
        bucket = None if buckets is None else buckets[:, :, r : r + 1]
        out, _ = attend_blocks(qk, k, v, own, own, q_bucket=bucket, k_bucket=bucket, seed=seed + r, **options)
        total = total + out / index.shape[2]
    return total.to(qk.dtype)


def check_lsh_inputs(qk: Any, v: Any, scale: Any, impl: Any) -> tuple[Tensor, Tensor]:
    """qk (B, H, N, D) and v (B, Hkv, N, Dv), checked, in autocast's dtype if it is on."""
    checks.check_tensors(qk=qk, v=v)
    checks.check_choice("impl", impl, checks.IMPLS)
    qk, v = cast_inputs(qk, v)
    for name, tensor in (("qk", qk), ("v", v)):
        shape = tuple(tensor.shape)
        if tensor.dim() != 4 or 0 in shape:
            raise ValueError(f"{name} must have shape (batch, heads, length, head_dim), none 0, got {shape}")
        checks.check_dtype(name, tensor, impl)
    if v.device != qk.device:
        raise ValueError(f"v must be on qk's device {qk.device}, got {v.device}")
    if v.dtype != qk.dtype:
        raise TypeError(f"v must have qk's dtype {qk.dtype}, got {v.dtype}")
    if v.shape[0] != qk.shape[0] or v.shape[2] != qk.shape[2] or qk.shape[1] % v.shape[1]:
        raise ValueError(
            f"v must have qk's batch size {qk.shape[0]}, a number of heads that divides its {qk.shape[1]}, and its "
            f"length {qk.shape[2]}, got shape {tuple(v.shape)}"
        )
    checks.check_scale(scale)
    return qk, v


def _check_given(buckets: Any, qk: Tensor, n_hashes: int) -> None:
    checks.check_tensors(buckets=buckets)
    if buckets.dtype != torch.int32:
        raise TypeError(f"buckets must be torch.int32, got {buckets.dtype}")
    shape = (qk.shape[0], qk.shape[1], n_hashes, qk.shape[2])
    if tuple(buckets.shape) != shape:
        raise ValueError(
            f"buckets must have shape (batch, heads, n_hashes, length) = {shape}, got {tuple(buckets.shape)}"
        )
    checks.check_device("buckets", buckets, qk.device)


def _fake_op(qk: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return qk.new_empty((*qk.shape[:3], v.shape[3]))


# rotations: None where buckets are given
_OP = define_op(
    "lsh_attention(Tensor qk, Tensor v, Tensor? rotations, Tensor? buckets, Tensor? key_mask, int bucket_size,"
    " int[] factors, int look_back, int look_ahead, bool wrap, bool is_causal, float scale,"
    " bool across_buckets, bool correct_duplicates, int local_window, str merge, int dense_threshold, str self_mode,"
    " str padding) -> Tensor",
    _attend,
    fake=_fake_op,
)
refuse_gradient(
    _OP, "fastattn::lsh_attention is for exported graphs: inference only. Train with fastattn.lsh_attention"
)
