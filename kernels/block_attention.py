"""Gathered block attention: each block of query rows attends to its block of key rows, in several rounds.

A round is one launch. It starts from the running (out, lse) of its rows and leaves the new ones, so that after the
last round each row holds one softmax over all the keys that it met, and nothing is kept per round. The backward
recomputes the probabilities from that total lse, as in FlashAttention-2 (Dao 2023, section 3.1): one launch a round
for dq and one for dk, dv. Index blocks partition the rows of a round, so each row has one writer: no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .block_attention_triton import backward_dkv_kernel, backward_dq_kernel, forward_kernel
from .config import READS_SHARED, SCORE_OPS, TIGHT, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .own_key import own_key_backward_kernel, own_key_forward_kernel
from .rows import check_counts, check_rows

LOG2_E = math.log2(math.e)
FAR = 2**29  # blocks away: farther than any window reaches, and twice as far still fits 32 bits
# what results hold before the first launch: that of rows that are in no block
_FORWARD_BEGINS = {"out_ptr": 0.0, "lse_ptr": -math.inf}
_BACKWARD_BEGINS = {"dq_ptr": 0.0, "dk_ptr": 0.0, "dv_ptr": 0.0}
# self_mode, correct_duplicates, dropout_p; no buckets, no local round, every block used
_PLAIN = ("attend", False, 0.0, False, False, False)

_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
# those of own keys read each row once, in order, and have nothing to tune
TUNING: dict[str, TuningSpace] = {
    "block_attention_forward": _SPACE,
    "block_attention_backward_dq": _SPACE,
    "block_attention_backward_dkv": _SPACE,
}
KERNELS = {
    "block_attention_forward": forward_kernel,
    "block_attention_backward_dq": backward_dq_kernel,
    "block_attention_backward_dkv": backward_dkv_kernel,
    "block_attention_own_key_forward": own_key_forward_kernel,
    "block_attention_own_key_backward": own_key_backward_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, rounds: int, n_blocks: int, c_q: int, c_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, neighbours: int = 1, correct_duplicates: bool = False,
    config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of all the rounds of one pass of ``kernel`` (a key of :data:`TUNING`). neighbours: blocks in a window."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    blocks = batch * heads * rounds * n_blocks
    pairs, dims = blocks * c_q * c_k * neighbours, head_dim + value_dim
    # the block numbers of a pair's rows in each round before its own
    numbers = 2 * (rounds - 1) * blocks * (c_q + c_k) if correct_duplicates else 0
    # bytes of a row: of queries, with an index, and of keys
    of_q, of_k = head_dim * element_size + 4, dims * element_size + 4
    if kernel == "block_attention_forward":
        of_q += 8 * (value_dim + 1)  # the running out and lse, read and written
        flops = 2 * pairs * dims
    elif kernel == "block_attention_backward_dq":
        of_q += value_dim * element_size + 8 * head_dim + 8
        flops = 2 * pairs * (2 * head_dim + value_dim)
    else:
        of_q += value_dim * element_size + 8
        of_k += 8 * dims
        flops = 4 * pairs * dims
    work = Cost(flops, blocks * (c_q * of_q + c_k * of_k) + numbers, pairs, launches=rounds)
    if config is None:
        return work
    m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    d, dv = padded(head_dim), padded(value_dim)
    m_tiles, n_tiles = cdiv(c_q, m), cdiv(c_k, n)
    steps = blocks * m_tiles * n_tiles * neighbours
    score, weights = (m, n, d), (m, n, dv)
    if kernel == "block_attention_forward":
        shapes, pointwise = (score, (m, dv, n)), SCORE_OPS * m * n + m * dv
    elif kernel == "block_attention_backward_dq":
        shapes, pointwise = (score, weights, (m, d, n)), SCORE_OPS * m * n
    else:
        shapes, pointwise = (score, weights, (n, d, m), (n, dv, m)), SCORE_OPS * m * n
    # one side's tiles stay with their program; the other side's pass by each of these
    again_q, again_k = (n_tiles * neighbours, 1) if kernel.endswith("dkv") else (1, m_tiles * neighbours)
    return replace(
        work, **products(steps, *shapes), tile_exps=steps * m * n, pointwise=steps * pointwise, steps=steps,
        held=4 * m * n * (1 if kernel.endswith("forward") else 2),  # the scores, and their gradients
        loaded=blocks * (c_q * of_q * again_q + c_k * of_k * again_k) + numbers * max(again_q, again_k),
    )  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Which keys a query meets, beside its block's own: see :func:`forward`."""

    look_back: int = 0
    look_ahead: int = 0
    wrap: bool = True
    is_causal: bool = False
    exclude_self: bool = False
    last_resort: bool = False
    once: bool = False
    correct_duplicates: bool = False
    buckets: bool = False
    dropout: bool = False

    @property
    def own_key(self) -> bool:
        """Whether the blocks leave a query's own key to the kernels of own keys."""
        return self.last_resort or self.once


def heuristic(
    kernel: str, device_type: str, c_q: int, c_k: int, head_dim: int, element_size: int = 4,
    pattern: Pattern | None = None,
) -> Config:  # fmt: skip
    """The configuration where nothing was tuned: whole blocks as tiles up to what registers (or the cache) hold.

    device_type: as :func:`~fastattn.kernels.launch.device_kind` says it; ``"cuda"`` or ``"hip"`` is any GPU of that
    vendor. On a GPU these are the largest tiles whose binaries spill nothing, on sm_80 to sm_120 and gfx942; fp32 with
    head dims above 128 spills on NVIDIA whatever the tiles are.
    """
    if "own_key" in kernel:
        return Config({"BLOCK_M": max(16, 4096 // next_power_of_2(head_dim))}, num_stages=1)
    backward = kernel != "block_attention_forward"
    warps, stages = 4, 2
    if device_type == "cpu":
        most = (128, 128) if head_dim <= 64 else (64, 64)
    elif device_type.startswith("hip"):
        # its registers do not hold a second stage of tiles
        most, stages = ((64, 64) if element_size * head_dim <= 256 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((32, 16) if kernel.endswith("dkv") else (32, 32)) if head_dim <= 64 else (16, 16)
    elif kernel.endswith("dkv") and head_dim <= 64:
        is_padded = head_dim < next_power_of_2(head_dim)
        most = (32, 32 if device_type in TIGHT and is_padded else 64)
        if device_type in READS_SHARED and not (pattern and pattern.dropout):  # draws take registers
            most = (64, 64)
    elif head_dim <= 64:
        most = (64, 64) if backward else (128, 128)
        warps = 4 if backward or min(c_q, c_k) <= 64 else 8
    elif head_dim <= 128:
        most, warps = (64, 64), 8
    else:
        most, warps, stages = (32, 32), 8 if kernel.endswith("dkv") else 4, 1
    is_exact_dq = kernel.endswith("dq") and element_size > 2
    if pattern and device_type.startswith("cuda") and (pattern.correct_duplicates or (pattern.dropout and is_exact_dq)):
        warps = 8  # the mask that is carried through the rounds before, and draws beside exact dots, take registers
    if pattern and pattern.correct_duplicates and device_type != "cpu":
        stages = 1  # the loop over the rounds before ends the pipeline
        most = (min(32, most[0]), most[1]) if kernel.endswith("dkv") else most
    m, n = (min(limit, max(16, next_power_of_2(size))) for limit, size in zip(most, (c_q, c_k), strict=True))
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def launches_of(
    kernel: str, tensors: Mapping[str, torch.Tensor], pattern: Pattern, scale: float, config: Mapping[str, Config],
    dropout_p: float = 0.0,
) -> Iterator[Launch]:  # fmt: skip
    """The launches of ``kernel`` on ``tensors``, named as the kernel's pointer arguments without ``_ptr``; there may be
    more than it takes, and those of options that are off are left out. One launch a round, and one for the local round
    if its index is there; a kernel of own keys has one in all.

    config: by kernel; where blocks of the local round have another size, the heuristic's serves there.
    """
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    _, _, n_rounds, n_blocks, c_q = tensors["q_index"].shape
    c_k = tensors["k_index"].shape[4]
    device, is_dkv = device_kind(q.device), kernel == "block_attention_backward_dkv"
    chosen = config.get(kernel) or heuristic(kernel, device, c_q, c_k, head_dim, q.element_size(), pattern)
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items() if not name.startswith("local_")}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries}
    if is_dkv or pattern.correct_duplicates or pattern.buckets:
        args["n_keys"] = n_keys
    args |= {"n_rounds": n_rounds, "n_blocks": n_blocks, "c_q": c_q, "c_k": c_k}
    args |= {"look_back": pattern.look_back, "look_ahead": pattern.look_ahead}
    args |= {"scale": scale, "scale_log2": scale * LOG2_E}
    if pattern.dropout:
        args |= {"drop_below": round(dropout_p * 2**24), "kept_scale": 1 / (1 - dropout_p)}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim))}
    args |= {"IS_CAUSAL": pattern.is_causal, "EXCLUDE_SELF": pattern.exclude_self, "WRAP": pattern.wrap}
    args |= {"OWN_KEY": pattern.own_key, "LAST_RESORT": pattern.last_resort, "PRECISION": dot_precision(q.dtype)}
    # None: an argument of an option that is off
    args = {name: args.get(name) for name in KERNELS[kernel].arg_names if name not in chosen.blocks}
    local = [tensors[name] for name in ("local_index_q", "local_index_k") if name in tensors]
    if "own_key" in kernel:
        grid = (batch * heads * cdiv(n_queries, chosen.blocks["BLOCK_M"]),)
        yield Launch(KERNELS[kernel], grid, args | {"n_draws": n_rounds + bool(local)}, chosen)
        return

    def grid_of(n_blocks: int, c_q: int, c_k: int, chosen: Config) -> tuple[int]:
        size, tile = (c_k, chosen.blocks["BLOCK_N"]) if is_dkv else (c_q, chosen.blocks["BLOCK_M"])
        return (batch * heads * n_blocks * cdiv(size, tile),)

    grid, rows = grid_of(n_blocks, c_q, c_k, chosen), {"q_index_ptr": n_queries, "k_index_ptr": n_keys}
    is_backward = kernel != "block_attention_forward"
    for round_id in range(n_rounds):
        # the backward of own keys comes before, and leaves gradients to be added to
        is_first = round_id == 0 and not (is_backward and pattern.own_key)
        yield Launch(KERNELS[kernel], grid, args | {"round_id": round_id, "IS_FIRST": is_first}, chosen, rows)
    if local:
        n_local, local_c_q, local_c_k = *local[0].shape[3:], local[1].shape[4]
        if (local_c_q, local_c_k) != (c_q, c_k):
            chosen = heuristic(kernel, device, local_c_q, local_c_k, head_dim, q.element_size(), pattern)
        args |= {"local_index_q_ptr": local[0], "local_index_k_ptr": local[1], "q_index_ptr": None, "k_index_ptr": None}
        args |= {"n_local_blocks": n_local, "c_q": local_c_q, "c_k": local_c_k, "round_id": n_rounds, "IS_FIRST": False}
        rows = {"local_index_q_ptr": n_queries, "local_index_k_ptr": n_keys}
        yield Launch(KERNELS[kernel], grid_of(n_local, local_c_q, local_c_k, chosen), args, chosen, rows)


def pattern_of(
    look_back: int, look_ahead: int, wrap: bool, is_causal: bool, self_mode: str, correct_duplicates: bool,
    dropout_p: float, buckets: bool,
) -> Pattern:  # fmt: skip
    return Pattern(
        look_back, look_ahead, wrap, is_causal, exclude_self=self_mode != "attend",
        last_resort=self_mode == "last_resort", once=self_mode == "once",
        correct_duplicates=correct_duplicates, buckets=buckets, dropout=dropout_p > 0,
    )  # fmt: skip


def _run(
    kernels: tuple[str, ...], tensors: dict[str, torch.Tensor], made: int, flags: tuple[Any, ...], scale: float,
    lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """All launches of each of ``kernels``, one kernel after the other; see ``run_planned`` for ``made``. flags: the
    arguments of :func:`pattern_of`, and whatever else tells which tensors are there."""

    def launches() -> Iterator[Launch]:
        q, pattern, dropout_p = tensors["q"], pattern_of(*flags[:8]), flags[6]
        fill = dict(_FORWARD_BEGINS if "block_attention_forward" in kernels else _BACKWARD_BEGINS)
        batch, heads, rounds, n_blocks, c_q = tensors["q_index"].shape
        shape = {"batch": batch, "heads": heads, "rounds": rounds, "n_blocks": n_blocks, "c_q": c_q}
        shape |= {"c_k": tensors["k_index"].shape[4], "head_dim": q.shape[3], "value_dim": tensors["v"].shape[3]}
        for kernel in kernels:
            tuned = lookup(kernel, q.device, q.dtype, shape, vars(pattern)) if lookup and kernel in TUNING else None
            config = {kernel: tuned} if tuned else {}
            for launch in launches_of(kernel, tensors, pattern, scale, config, dropout_p):
                begun = [name for name in fill if launch.args.get(name) is not None]
                yield replace(launch, fill={name: fill.pop(name) for name in begun})

    run_planned((kernels, flags, scale, torch.get_float32_matmul_precision(), stamp), tensors, launches, made=made)


def block_numbers(name: str, index: torch.Tensor, length: int) -> torch.Tensor:
    """In which block each row stands in each round, (B, H, R, length) int32, from ``index`` (B, H, R, nb, C); the
    absent are so far off that they stand in no window."""
    check_rows(name, index, length)
    rows = index.flatten(3).long()
    n_blocks, size = index.shape[3:]
    numbers = torch.arange(n_blocks, dtype=torch.int32, device=index.device).repeat_interleave(size)
    absent = index.new_full((*rows.shape[:3], length + 1), FAR if name == "q_index" else -FAR)
    return absent.scatter_(3, rows.masked_fill_(rows < 0, length), numbers.expand_as(rows))[..., :-1].contiguous()


def _of_options(
    tensors: dict[str, torch.Tensor], flags: tuple[Any, ...], key_mask: torch.Tensor | None, *given: torch.Tensor | None
) -> int:
    """Adds to ``tensors`` what options need beside them. given: the last six tensors of :func:`forward`. Returns how
    many of them follow from the others."""
    names = ("q_bucket", "k_bucket", "local_index_q", "local_index_k", "seed", "n_used_blocks")
    for name, tensor in zip(names, given, strict=True):
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    if "n_used_blocks" in tensors:
        check_counts("n_used_blocks", tensors["n_used_blocks"], tensors["q_index"].shape[3])
    if flags[4] in ("last_resort", "once"):
        batch, n_keys = tensors["k"].shape[0], tensors["k"].shape[2]
        no_mask = tensors["q_index"].new_ones((batch, n_keys), dtype=torch.bool)
        tensors["own_mask"] = no_mask if key_mask is None else key_mask.contiguous()
    if not flags[5]:
        return 0
    for side, x in (("q", tensors["q"]), ("k", tensors["k"])):
        tensors[f"{side}_block"] = block_numbers(f"{side}_index", tensors[f"{side}_index"], x.shape[2])
    return 2


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, self_mode: str = "attend",
    correct_duplicates: bool = False, dropout_p: float = 0.0, key_mask: torch.Tensor | None = None,
    q_bucket: torch.Tensor | None = None, k_bucket: torch.Tensor | None = None,
    local_index_q: torch.Tensor | None = None, local_index_k: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, n_used_blocks: torch.Tensor | None = None, *,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of block attention; the arguments but for the index values are checked by
    ``fastattn.ops.block_attention``, which says what they mean.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); q_index (B, H, R, nb, Cq), k_index (B, H, R, nb, Ck), int32
    and contiguous, -1 is padding. key_mask: folded into the indices already; here it says whose own key takes part.
    seed: int64, without dimensions, where ``dropout_p`` is not 0. n_used_blocks: (B,) int32. lookup: gives tuned
    configurations; its answers are kept while ``stamp`` stays the same. Returns out (B, H, N, Dv) in q's dtype and lse
    (B, H, N) in fp32; a row that meets no key has 0 and -inf. In the lowest bit of lse, "last_resort" tells the
    backward which rows fell back on their own key. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, _ = q.shape
    tensors = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}
    options = (self_mode, correct_duplicates, dropout_p, q_bucket is not None, local_index_q is not None)
    options += (n_used_blocks is not None,)
    flags = (look_back, look_ahead, wrap, is_causal, *options)
    kernels, made = ("block_attention_forward",), 2
    if options != _PLAIN:
        given = (key_mask, q_bucket, k_bucket, local_index_q, local_index_k, seed, n_used_blocks)
        made += _of_options(tensors, flags, *given)
        if self_mode in ("last_resort", "once"):
            kernels += ("block_attention_own_key_forward",)
    # what fp32 tensors are made from: to name the dtype for each costs 0.5 to 1 us
    fp32 = q if q.dtype == torch.float32 else q.new_empty((), dtype=torch.float32)
    # between launches the running out is fp32, whatever the inputs are
    is_one_launch = q_index.shape[2] == 1 and local_index_q is None and len(kernels) == 1
    # sizes one by one: as a tuple they take 0.4 us more
    out = (q if is_one_launch else fp32).new_empty(batch, heads, n_queries, v.shape[3])
    lse = fp32.new_empty(batch, heads, n_queries)
    tensors["out"], tensors["lse"] = out, lse
    _run(kernels, tensors, made, flags, scale, lookup, stamp)
    return (out if is_one_launch or fp32 is q else out.to(q.dtype)), lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor,
    k_index: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, self_mode: str = "attend",
    correct_duplicates: bool = False, dropout_p: float = 0.0, key_mask: torch.Tensor | None = None,
    q_bucket: torch.Tensor | None = None, k_bucket: torch.Tensor | None = None,
    local_index_q: torch.Tensor | None = None, local_index_k: torch.Tensor | None = None,
    seed: torch.Tensor | None = None, n_used_blocks: torch.Tensor | None = None, *,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) from dout (B, H, N, Dv) and what :func:`forward` returned; the same options."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    dout, lse = dout.contiguous(), lse.contiguous()
    batch, heads, _, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index, "lse": lse}
    flags = (look_back, look_ahead, wrap, is_causal, self_mode, correct_duplicates, dropout_p)
    flags += (q_bucket is not None, local_index_q is not None, n_used_blocks is not None)
    kernels, made = ("block_attention_backward_dq", "block_attention_backward_dkv"), 4
    if flags[4:] != _PLAIN:
        given = (key_mask, q_bucket, k_bucket, local_index_q, local_index_k, seed, n_used_blocks)
        made += _of_options(tensors, flags, *given)
        if self_mode in ("last_resort", "once"):
            kernels = ("block_attention_own_key_backward", *kernels)
    tensors["delta"] = torch.linalg.vecdot(dout.float(), out.float())  # [B, H, N]
    tensors["dq"] = q.new_empty(q.shape, dtype=torch.float32)
    tensors["dk"] = dk = k.new_empty((batch, heads, n_keys, head_dim), dtype=torch.float32)
    tensors["dv"] = dv = v.new_empty((batch, heads, n_keys, value_dim), dtype=torch.float32)
    _run(kernels, tensors, made, flags, scale, lookup, stamp)
    if kv_heads != heads:
        dk, dv = (x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for x in (dk, dv))
    return tensors["dq"].to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int, value_dim: int | None = None, c_q: int = 64, c_k: int = 64,
    device_type: str = "cuda", pattern: Pattern | None = None, config: Config | None = None, first: bool = False,
    local: bool = False, n_used_blocks: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see.

    first: of the first round. local: of the local round, which has the same block sizes here. n_used_blocks: whether
    it is given."""
    value_dim = value_dim or head_dim
    pattern = pattern or Pattern(once="own_key" in kernel)
    sizes = (c_q, c_k, head_dim, dtype.itemsize)
    config = config or heuristic(kernel, device_type, *sizes, pattern)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, device="meta", dtype=dtype)

    x, y = empty(1, 1, c_q, head_dim, dtype=dtype), empty(1, 1, c_k, value_dim, dtype=dtype)
    q_index, k_index = (empty(1, 1, 2, 1, c, dtype=torch.int32) for c in (c_q, c_k))
    tensors = {"q": x, "k": x, "v": y, "q_index": q_index, "k_index": k_index}
    if n_used_blocks:
        tensors["n_used_blocks"] = empty(1, dtype=torch.int32)
    if local:
        tensors |= {"local_index_q": q_index[:, :, :1], "local_index_k": k_index[:, :, :1]}
    if pattern.correct_duplicates:
        tensors |= {"q_block": q_index[..., 0, :], "k_block": k_index[..., 0, :]}
    if pattern.buckets:
        tensors |= {"q_bucket": q_index[..., 0, :], "k_bucket": k_index[..., 0, :]}
    if pattern.dropout:
        tensors["seed"] = empty(dtype=torch.int64)
    if pattern.own_key:
        tensors["own_mask"] = empty(1, c_k, dtype=torch.bool)
    tensors["lse"] = empty(1, 1, c_q)
    if kernel.endswith("_forward"):
        tensors["out"] = empty(1, 1, c_q, value_dim)
    else:
        tensors |= {"dout": y, "delta": empty(1, 1, c_q), "dq": empty(1, 1, c_q, head_dim)}
        tensors |= {"dk": empty(1, 1, c_k, head_dim), "dv": empty(1, 1, c_k, value_dim)}
    dropout_p = 0.5 if pattern.dropout else 0.0
    launches = [*launches_of(kernel, tensors, pattern, 1.0, {kernel: config}, dropout_p)]
    return launches[-1] if local or "own_key" in kernel else launches[0 if first else 1]
