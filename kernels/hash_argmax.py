"""Angular LSH: the bucket of a row is the largest of its products with random directions and their opposites.

The rotation and the argmax over [x R, -x R] (Kitaev et al. 2020, section 2) are one kernel: columns go by in tiles with
a running maximum, so no (N, n_buckets) matrix exists. Of a factorised hash, where the bucket is b0 + f0 b1 + f0 f1 b2
+ ..., each factor is one launch, which adds its digit to what those before it left.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .config import SCORE_OPS, Config, Cost, TuningSpace, cdiv, next_power_of_2, padded, products
from .launch import Launch, Lookup, device_kind, exact_precision, run_planned, unit_stride
from .tiles import head_of, load_rows


@triton.jit(do_not_specialize=["n_rounds", "first_column", "half", "weight"])
def digit_kernel(
    x_ptr, rotations_ptr, buckets_ptr,
    x_stride_b, x_stride_h, x_stride_n, rotations_stride_h, rotations_stride_r,
    n_heads, n_rows, n_rounds, first_column, half, weight,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M rows of one head, all rounds
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    head = (pid // n_tiles).to(tl.int64)
    x_ptr = head_of(x_ptr, head, n_heads, 1, x_stride_b, x_stride_h)
    rotations_ptr += head % n_heads * rotations_stride_h + first_column * HEAD_DIM

    rows = pid % n_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    x = load_rows(x_ptr, tl.where(inside, rows, -1), x_stride_n, HEAD_DIM, BLOCK_D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    for r in range(0, n_rounds):
        largest = tl.full([BLOCK_M], -1.0, tl.float32)
        digit = tl.full([BLOCK_M], 0, tl.int32)
        for start in range(0, half, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            own = rotations_ptr + r * rotations_stride_r
            directions = load_rows(own, tl.where(columns < half, columns, -1), HEAD_DIM, HEAD_DIM, BLOCK_D)
            s = tl.dot(directions, tl.trans(x), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            # the largest of [s, -s] is the largest size; its place is the first of either half that has it
            size = tl.abs(s)
            most = tl.max(size, 0)
            row = tl.expand_dims(most, 0)  # [1, BLOCK_M]
            place = tl.where(s == row, columns[:, None], half + columns[:, None])
            first = tl.min(tl.where(size == row, place, 2 * half), 0)
            tied = tl.where(most == largest, tl.minimum(digit, first), digit)
            digit = tl.where(most > largest, first, tied)
            largest = tl.maximum(largest, most)
        digit = tl.where(digit < 2 * half, digit, 0)  # where all is NaN
        at = buckets_ptr + (head * n_rounds + r) * n_rows + rows
        if IS_FIRST:
            tl.store(at, digit, mask=inside)
        else:
            tl.store(at, tl.load(at, mask=inside, other=0) + digit * weight, mask=inside)


TUNING: dict[str, TuningSpace] = {
    "hash_argmax_digit": TuningSpace(
        blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128)}, num_warps=(4, 8), num_stages=(1, 2)
    ),
}
KERNELS = {"hash_argmax_digit": digit_kernel}


def cost(
    kernel: str, *, batch: int, heads: int, length: int, rounds: int, head_dim: int, columns: int,
    element_size: int = 4, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one factor's launch of ``kernel``; columns: half of the factor."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows, directions = batch * heads * length, heads * rounds * columns * head_dim * 4
    own = rows * (head_dim * element_size + 4 * rounds)
    rate = "tf32x3" if head_dim <= 64 else "float32"
    work = Cost(2 * rows * rounds * columns * head_dim, own + directions, 0, rate=rate)
    if config is None:
        return work
    m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    tiles = cdiv(length, m)
    steps = batch * heads * tiles * rounds * cdiv(columns, n)
    return replace(
        work, **products(steps, (n, m, padded(head_dim))), pointwise=steps * SCORE_OPS * m * n, steps=steps,
        loaded=own + batch * directions * tiles,
    )  # fmt: skip


def heuristic(kernel: str, device_type: str, columns: int, head_dim: int) -> Config:
    """The configuration where nothing was tuned. columns: half of the factor. device_type as in block attention's."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    block_n = max(16, next_power_of_2(columns))
    if device_type == "cpu":
        return Config({"BLOCK_M": 64, "BLOCK_N": min(64, block_n)})
    # the largest tiles whose binaries spill nothing on sm_80, sm_90, sm_100 and gfx942
    if head_dim <= 128:
        blocks, warps = {"BLOCK_M": 64 if head_dim <= 64 else 32, "BLOCK_N": min(32, block_n)}, 4
    else:
        blocks, warps = {"BLOCK_M": 32, "BLOCK_N": 16}, 8
    return Config(blocks, num_warps=warps, num_stages=1)


def launches_of(
    tensors: Mapping[str, torch.Tensor], factors: tuple[int, ...], config: Mapping[int, Config]
) -> Iterator[Launch]:
    """One launch a factor, on tensors named x, rotations and buckets; config: by half a factor."""
    x, rotations, buckets = tensors["x"], tensors["rotations"], tensors["buckets"]
    batch, heads, n_rows, head_dim = x.shape
    kind = device_kind(x.device)
    args: dict[str, Any] = {"x_ptr": x, "rotations_ptr": rotations, "buckets_ptr": buckets}
    args |= dict(zip(("x_stride_b", "x_stride_h", "x_stride_n"), x.stride(), strict=False))
    # rotations of one head serve all
    args |= {"rotations_stride_h": rotations.stride(0) if rotations.shape[0] > 1 else 0}
    args |= {"rotations_stride_r": rotations.stride(1)}
    args |= {"n_heads": heads, "n_rows": n_rows, "n_rounds": rotations.shape[1]}
    args |= {"HEAD_DIM": head_dim, "BLOCK_D": max(16, next_power_of_2(head_dim))}  # 16: the least that tl.dot takes
    args |= {"PRECISION": _precision(kind, head_dim)}
    first_column, weight = 0, 1
    for factor in factors:
        half = factor // 2
        chosen = config.get(half) or heuristic("hash_argmax_digit", kind, half, head_dim)
        own = {"first_column": first_column, "half": half, "weight": weight, "IS_FIRST": weight == 1}
        grid = (batch * heads * cdiv(n_rows, chosen.blocks["BLOCK_M"]),)
        yield Launch(digit_kernel, grid, args | own, chosen)
        first_column, weight = first_column + half, weight * factor


def _precision(kind: str, head_dim: int) -> str:
    """Products of wider rows leave no registers for the halves of their operands."""
    return exact_precision(kind) if head_dim <= 64 else "ieee"


def hash_argmax(
    x: torch.Tensor, rotations: torch.Tensor, factors: tuple[int, ...], lookup: Lookup | None = None,
    stamp: Hashable = None,
) -> torch.Tensor:  # fmt: skip
    """buckets (B, H, h, N) int32 of x (B, H, N, D); the arguments are checked by ``fastattn.ops.hash_argmax``.

    rotations (H or 1, h, sum of factors / 2, D), fp32 and contiguous: turned, so that directions are rows. factors:
    even numbers. lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.
    """
    x = unit_stride(x)
    batch, heads, n_rows, head_dim = x.shape
    buckets = torch.empty((batch, heads, rotations.shape[1], n_rows), dtype=torch.int32, device=x.device)
    tensors = {"x": x, "rotations": rotations, "buckets": buckets}

    def launches() -> Iterator[Launch]:
        config: dict[int, Config] = {}
        for half in dict.fromkeys(factor // 2 for factor in factors):
            shape = {"rounds": rotations.shape[1], "head_dim": head_dim, "columns": half}
            found = lookup("hash_argmax_digit", x.device, x.dtype, shape, {}) if lookup else None
            if found is not None:
                config[half] = found
        yield from launches_of(tensors, factors, config)

    run_planned(("hash_argmax", factors, stamp), tensors, launches, made=1)
    return buckets


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, columns: int = 64, first: bool = True,
    device_type: str = "cuda", config: Config | None = None,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    config = config or heuristic(kernel, device_type, columns, head_dim)
    x = torch.empty(1, 2, 128, head_dim, device="meta", dtype=dtype)
    factors = (2 * columns,) if first else (2, 2 * columns)
    tensors = {"x": x, "rotations": torch.empty(2, 2, sum(factors) // 2, head_dim, device="meta")}
    tensors["buckets"] = torch.empty(1, 2, 2, 128, device="meta", dtype=torch.int32)
    *_, launch = launches_of(tensors, factors, {columns: config})
    return Launch(launch.kernel, launch.grid, launch.args | {"PRECISION": _precision(device_type, head_dim)}, config)
