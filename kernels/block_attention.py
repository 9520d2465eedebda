"""Gathered block attention: each block of query rows attends to its block of key rows, in several rounds.

A round is one launch. It starts from the running (out, lse) of its rows and leaves the new ones, so that after the
last round each row holds one softmax over all the keys that it met, and nothing is kept per round. The backward
recomputes the probabilities from that total lse, as in FlashAttention-2 (Dao 2023, section 3.1): one launch a round
for dq and one for dk, dv. Index blocks partition the rows of a round, so each row has one writer: no atomics.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .config import Config, Cost, TuningSpace, cdiv, next_power_of_2
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .tiles import head_of, load_index, load_rows, store_rows

LOG2_E = math.log2(math.e)


@triton.jit
def place(n_blocks, n_tiles):
    """(row, block, tile): which of the B * H heads, which of its blocks and which tile of that this program has.

    The programs of a head are consecutive, so that its rows stay cached."""
    pid = tl.program_id(0)
    row = (pid // (n_blocks * n_tiles)).to(tl.int64)
    return row, pid % (n_blocks * n_tiles) // n_tiles, pid % n_tiles


@triton.jit
def neighbour(block, distance, round_id, n_rounds, n_blocks, WRAP: tl.constexpr):
    """Block number over all rounds of the block that stands ``distance`` after ``block`` in a round, and if it is."""
    first = round_id * n_blocks
    other = first + block + distance
    if WRAP:
        total = n_rounds * n_blocks
        return ((other % total) + total) % total, True
    else:
        return other, (other >= first) & (other < first + n_blocks)


@triton.jit
def pair_mask(q_rows, k_rows, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr):
    """Which pairs take part; q_rows and k_rows broadcast against each other."""
    keep = (k_rows >= 0) & (q_rows >= 0)
    if IS_CAUSAL:
        keep = keep & (k_rows <= q_rows)
    if EXCLUDE_SELF:
        keep = keep & (k_rows != q_rows)
    return keep


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale_log2,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one block
    row, block, m_tile = place(n_blocks, tl.cdiv(c_q, BLOCK_M))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    out_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    q_index_ptr += (row * n_rounds + round_id) * n_blocks * c_q
    k_index_ptr += row * n_rounds * n_blocks * c_k

    q_rows = load_index(q_index_ptr, block, c_q, m_tile * BLOCK_M, True, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    if IS_FIRST:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    else:
        # the earlier rounds stand as one key of logit lse and value out
        lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=float("-inf"))  # [BLOCK_M]
        m = lse * 1.4426950408889634
        total = tl.where(lse == float("-inf"), 0.0, 1.0)
        acc = load_rows(out_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV).to(tl.float32)  # [BLOCK_M, BLOCK_DV]

    n_tiles = tl.cdiv(c_k, BLOCK_N)
    for step in range(0, (1 + look_back + look_ahead) * n_tiles):
        k_block, is_block = neighbour(block, step // n_tiles - look_back, round_id, n_rounds, n_blocks, WRAP)
        k_rows = load_index(k_index_ptr, k_block, c_k, (step % n_tiles) * BLOCK_N, is_block, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
        s = tl.where(pair_mask(q_rows[:, None], k_rows[None, :], IS_CAUSAL, EXCLUDE_SELF), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row without keys: exp2(-inf - 0) = 0, not NaN
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        total = total * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    met = total != 0.0  # also where it is NaN
    total = tl.where(met, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    lse = tl.where(met, (m + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    store_rows(out_ptr, q_rows, VALUE_DIM, out, VALUE_DIM, BLOCK_DV)
    tl.store(lse_ptr + q_rows, lse, mask=q_rows >= 0)


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def backward_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_M queries of one block
    row, block, m_tile = place(n_blocks, tl.cdiv(c_q, BLOCK_M))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    dout_ptr += row * n_queries * VALUE_DIM
    dq_ptr += row * n_queries * HEAD_DIM
    lse_ptr += row * n_queries
    delta_ptr += row * n_queries
    q_index_ptr += (row * n_rounds + round_id) * n_blocks * c_q
    k_index_ptr += row * n_rounds * n_blocks * c_k

    q_rows = load_index(q_index_ptr, block, c_q, m_tile * BLOCK_M, True, BLOCK_M)  # [BLOCK_M]
    q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    dout = load_rows(dout_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634  # [BLOCK_M]
    delta = tl.load(delta_ptr + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
    if IS_FIRST:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:
        dq = load_rows(dq_ptr, q_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    n_tiles = tl.cdiv(c_k, BLOCK_N)
    for step in range(0, (1 + look_back + look_ahead) * n_tiles):
        k_block, is_block = neighbour(block, step // n_tiles - look_back, round_id, n_rounds, n_blocks, WRAP)
        k_rows = load_index(k_index_ptr, k_block, c_k, (step % n_tiles) * BLOCK_N, is_block, BLOCK_N)  # [BLOCK_N]
        k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        keep = pair_mask(q_rows[:, None], k_rows[None, :], IS_CAUSAL, EXCLUDE_SELF)
        p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)  # [BLOCK_M, BLOCK_N]
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None]) * scale
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    store_rows(dq_ptr, q_rows, HEAD_DIM, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["round_id", "n_rounds", "look_back", "look_ahead"])
def backward_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, q_index_ptr, k_index_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    n_heads, group_size, n_queries, n_keys, n_rounds, n_blocks, c_q, c_k, round_id, look_back, look_ahead, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    WRAP: tl.constexpr, IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of BLOCK_N keys of one block, for one query head (heads of a group are summed afterwards)
    row, block, n_tile = place(n_blocks, tl.cdiv(c_k, BLOCK_N))
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    dout_ptr += row * n_queries * VALUE_DIM
    lse_ptr += row * n_queries
    delta_ptr += row * n_queries
    dk_ptr += row * n_keys * HEAD_DIM
    dv_ptr += row * n_keys * VALUE_DIM
    q_index_ptr += row * n_rounds * n_blocks * c_q
    k_index_ptr += (row * n_rounds + round_id) * n_blocks * c_k

    k_rows = load_index(k_index_ptr, block, c_k, n_tile * BLOCK_N, True, BLOCK_N)  # [BLOCK_N]
    k = load_rows(k_ptr, k_rows, k_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, k_rows, v_stride_n, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    if IS_FIRST:
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    else:
        dk = load_rows(dk_ptr, k_rows, HEAD_DIM, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dv = load_rows(dv_ptr, k_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]

    m_tiles = tl.cdiv(c_q, BLOCK_M)
    for step in range(0, (1 + look_back + look_ahead) * m_tiles):
        # the queries that look back to these keys stand after them, and the other way round
        q_block, is_block = neighbour(block, step // m_tiles - look_ahead, round_id, n_rounds, n_blocks, WRAP)
        q_rows = load_index(q_index_ptr, q_block, c_q, (step % m_tiles) * BLOCK_M, is_block, BLOCK_M)  # [BLOCK_M]
        q = load_rows(q_ptr, q_rows, q_stride_n, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_rows(dout_ptr, q_rows, VALUE_DIM, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        lse = tl.load(lse_ptr + q_rows, mask=q_rows >= 0, other=0.0) * 1.4426950408889634  # [BLOCK_M]
        delta = tl.load(delta_ptr + q_rows, mask=q_rows >= 0, other=0.0)  # [BLOCK_M]
        # transposed, so that p and ds are left operands as they come
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)  # [BLOCK_N, BLOCK_M]
        keep = pair_mask(q_rows[None, :], k_rows[:, None], IS_CAUSAL, EXCLUDE_SELF)
        p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        ds = p * (dp - delta[None, :]) * scale
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    store_rows(dk_ptr, k_rows, HEAD_DIM, dk, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, k_rows, VALUE_DIM, dv, VALUE_DIM, BLOCK_DV)


_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2, 3)
)
TUNING: dict[str, TuningSpace] = {
    "block_attention_forward": _SPACE,
    "block_attention_backward_dq": _SPACE,
    "block_attention_backward_dkv": _SPACE,
}
KERNELS = {
    "block_attention_forward": forward_kernel,
    "block_attention_backward_dq": backward_dq_kernel,
    "block_attention_backward_dkv": backward_dkv_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, rounds: int, n_blocks: int, c_q: int, c_k: int,
    head_dim: int, value_dim: int, element_size: int = 4, neighbours: int = 1,
) -> Cost:  # fmt: skip
    """Work of all the rounds of one pass of ``kernel`` (a key of :data:`TUNING`)."""
    blocks = batch * heads * rounds * n_blocks
    pairs = blocks * c_q * c_k * neighbours
    q_rows, k_rows = blocks * c_q, blocks * c_k * neighbours
    in_q, in_k = head_dim, head_dim + value_dim
    if kernel == "block_attention_forward":
        state = 2 * value_dim + 2  # the running out and lse, read and written
        return Cost(2 * pairs * (head_dim + value_dim), (q_rows * in_q + k_rows * in_k) * element_size
                    + q_rows * (4 * state + 4) + k_rows * 4, pairs)  # fmt: skip
    if kernel == "block_attention_backward_dq":
        return Cost(2 * pairs * (2 * head_dim + value_dim),
                    (q_rows * (in_q + value_dim) + k_rows * in_k) * element_size
                    + q_rows * (8 * head_dim + 12) + k_rows * 4, pairs)  # fmt: skip
    if kernel == "block_attention_backward_dkv":
        q_rows, k_rows = blocks * c_q * neighbours, blocks * c_k
        return Cost(2 * pairs * 2 * (head_dim + value_dim),
                    (q_rows * (in_q + value_dim) + k_rows * in_k) * element_size
                    + k_rows * (8 * (head_dim + value_dim) + 4) + q_rows * 12, pairs)  # fmt: skip
    raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")


def heuristic(
    kernel: str, device_type: str, c_q: int, c_k: int, head_dim: int, element_size: int = 4
) -> Config:  # fmt: skip
    """The configuration where nothing was tuned: whole blocks as tiles up to what registers (or the cache) hold.

    device_type: ``"cpu"``, ``"cuda"`` or ``"hip"``. On a GPU these are the largest tiles whose binaries spill nothing,
    on sm_80, sm_90, sm_100 and gfx942; fp32 with head dims above 128 spills on NVIDIA whatever the tiles are.
    """
    backward = kernel != "block_attention_forward"
    warps, stages = 4, 2
    if device_type == "cpu":
        most = (128, 128) if head_dim <= 64 else (64, 64)
    elif device_type == "hip":
        # its registers do not hold a second stage of tiles
        most, stages = ((64, 64) if element_size * head_dim <= 256 else (32, 32) if head_dim <= 128 else (16, 16)), 1
    elif element_size > 2:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        most = ((32, 16) if kernel.endswith("dkv") else (32, 32)) if head_dim <= 64 else (16, 16)
    elif head_dim <= 64:
        most = (64, 64) if backward else (128, 128)
        warps = 4 if backward or min(c_q, c_k) <= 64 else 8
    elif head_dim <= 128:
        most, warps = (64, 64), 8
    else:
        most, warps, stages = (32, 32), 8 if kernel.endswith("dkv") else 4, 1
    m, n = (min(limit, max(16, next_power_of_2(size))) for limit, size in zip(most, (c_q, c_k), strict=True))
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class Pattern:
    """Which keys a query meets, beside its block's own: see :func:`forward`."""

    look_back: int = 0
    look_ahead: int = 0
    wrap: bool = True
    is_causal: bool = False
    exclude_self: bool = False


def launches_of(
    kernel: str, tensors: Mapping[str, torch.Tensor], pattern: Pattern, scale: float, config: Mapping[str, Config]
) -> Iterator[Launch]:
    """One launch a round of ``kernel`` on ``tensors``, named as the kernel's pointer arguments without ``_ptr``; there
    may be more than it takes."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, n_queries, head_dim = q.shape
    n_keys, value_dim = v.shape[2:]
    _, _, n_rounds, n_blocks, c_q = tensors["q_index"].shape
    c_k = tensors["k_index"].shape[-1]
    chosen = config.get(kernel) or heuristic(kernel, device_kind(q.device), c_q, c_k, head_dim, q.element_size())
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensor.stride(), strict=False))
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "n_queries": n_queries, "n_keys": n_keys}
    args |= {"n_rounds": n_rounds, "n_blocks": n_blocks, "c_q": c_q, "c_k": c_k}
    args |= {"look_back": pattern.look_back, "look_ahead": pattern.look_ahead}
    args |= {"scale": scale, "scale_log2": scale * LOG2_E}
    args |= {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim}
    args |= {"BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"BLOCK_DV": max(16, next_power_of_2(value_dim))}
    args |= {"IS_CAUSAL": pattern.is_causal, "EXCLUDE_SELF": pattern.exclude_self, "WRAP": pattern.wrap}
    args |= {"PRECISION": dot_precision(q.dtype)}
    args = {name: args[name] for name in KERNELS[kernel].arg_names if name in args}
    is_dkv = kernel == "block_attention_backward_dkv"
    size, tile = (c_k, chosen.blocks["BLOCK_N"]) if is_dkv else (c_q, chosen.blocks["BLOCK_M"])
    grid = (batch * heads * n_blocks * cdiv(size, tile),)
    rows = {"q_index_ptr": n_queries, "k_index_ptr": n_keys}
    for round_id in range(n_rounds):
        yield Launch(KERNELS[kernel], grid, args | {"round_id": round_id, "IS_FIRST": round_id == 0}, chosen, rows)


def _run(
    kernels: tuple[str, ...], tensors: dict[str, torch.Tensor], made: int, flags: tuple[Any, ...], scale: float,
    lookup: Lookup | None, stamp: Hashable,
) -> None:  # fmt: skip
    """All rounds of each of ``kernels``, one kernel after the other; see ``run_planned`` for ``made``."""

    def launches() -> Iterator[Launch]:
        q, pattern = tensors["q"], Pattern(*flags)
        batch, heads, rounds, n_blocks, c_q = tensors["q_index"].shape
        shape = {"batch": batch, "heads": heads, "rounds": rounds, "n_blocks": n_blocks, "c_q": c_q}
        shape |= {"c_k": tensors["k_index"].shape[4], "head_dim": q.shape[3], "value_dim": tensors["v"].shape[3]}
        for kernel in kernels:
            config = lookup(kernel, q.device, q.dtype, shape, vars(pattern)) if lookup else None
            yield from launches_of(kernel, tensors, pattern, scale, {kernel: config} if config else {})

    run_planned((kernels, flags, scale, torch.get_float32_matmul_precision(), stamp), tensors, launches, made=made)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, exclude_self: bool = False,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse) of block attention; the arguments but for the index values are checked by
    ``fastattn.ops.block_attention``.

    q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); q_index (B, H, R, nb, Cq), k_index (B, H, R, nb, Ck), int32
    and contiguous, -1 is padding. Block c of round r meets the key blocks c - look_back .. c + look_ahead, numbered on
    over the rounds and round the end with ``wrap``, cut off at the round's ends without. A causal query meets keys at
    its own row or before; ``exclude_self`` leaves out its own. lookup: gives tuned configurations; its answers are kept
    while ``stamp`` stays the same. Returns out (B, H, N, Dv) in q's dtype and lse (B, H, N) in fp32; a row that meets
    no key has 0 and -inf. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, _ = q.shape
    # what fp32 tensors are made from: to name the dtype for each costs 0.5 to 1 us
    fp32 = q if q.dtype == torch.float32 else q.new_empty((), dtype=torch.float32)
    # between rounds the running out is fp32, whatever the inputs are
    out = (fp32 if q_index.shape[2] > 1 else q).new_zeros((batch, heads, n_queries, v.shape[3]))
    lse = fp32.new_full((batch, heads, n_queries), -math.inf)
    tensors = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index, "out": out, "lse": lse}
    flags = (look_back, look_ahead, wrap, is_causal, exclude_self)
    _run(("block_attention_forward",), tensors, 2, flags, scale, lookup, stamp)
    return (out if out.dtype == q.dtype else out.to(q.dtype)), lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_index: torch.Tensor,
    k_index: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float,
    look_back: int = 0, look_ahead: int = 0, wrap: bool = True, is_causal: bool = False, exclude_self: bool = False,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv) from dout (B, H, N, Dv) and what :func:`forward` returned; the same options."""
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    dout, lse = dout.contiguous(), lse.contiguous()
    batch, heads, _, head_dim = q.shape
    kv_heads, n_keys, value_dim = v.shape[1:]
    delta = torch.linalg.vecdot(dout.float(), out.float())  # [B, H, N]
    dq = q.new_zeros(q.shape, dtype=torch.float32)
    dk = k.new_zeros((batch, heads, n_keys, head_dim), dtype=torch.float32)
    dv = v.new_zeros((batch, heads, n_keys, value_dim), dtype=torch.float32)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index, "lse": lse, "delta": delta}
    tensors |= {"dq": dq, "dk": dk, "dv": dv}
    flags = (look_back, look_ahead, wrap, is_causal, exclude_self)
    kernels = ("block_attention_backward_dq", "block_attention_backward_dkv")
    _run(kernels, tensors, 4, flags, scale, lookup, stamp)
    if kv_heads != heads:
        dk, dv = (x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int, value_dim: int | None = None, c_q: int = 64, c_k: int = 64,
    device_type: str = "cuda", pattern: Pattern | None = None, config: Config | None = None, first: bool = False,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    value_dim = value_dim or head_dim
    config = config or heuristic(kernel, device_type, c_q, c_k, head_dim, dtype.itemsize)
    meta = {"device": "meta", "dtype": dtype}
    state = {"device": "meta", "dtype": torch.float32}
    x, y = torch.empty(1, 1, c_q, head_dim, **meta), torch.empty(1, 1, c_k, value_dim, **meta)
    q_index, k_index = (torch.empty(1, 1, 2, 1, c, device="meta", dtype=torch.int32) for c in (c_q, c_k))
    tensors = {"q": x, "k": x, "v": y, "q_index": q_index, "k_index": k_index}
    if kernel == "block_attention_forward":
        tensors |= {"out": y.to(torch.float32), "lse": torch.empty(1, 1, c_q, **state)}
    else:
        tensors = {"dout": y} | tensors
        tensors |= {"lse": torch.empty(1, 1, c_q, **state), "delta": torch.empty(1, 1, c_q, **state)}
        grads = ("dq",) if kernel == "block_attention_backward_dq" else ("dk", "dv")
        tensors |= {name: torch.empty(1, 1, c_q, head_dim, **state) for name in grads}
    launches = launches_of(kernel, tensors, pattern or Pattern(), 1.0, {kernel: config})
    return [*launches][0 if first else 1]
