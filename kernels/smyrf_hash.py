"""SMYRF's hash: the rows of two sides, put on one sphere, projected on directions (Daras et al. 2020, section 3.2).

F(q) = [q ; 0 ; sqrt(R2 - |q|^2)] and G(k) = [k ; sqrt(R2 - |k|^2) ; 0] share R2 = max |q|^2 + max |k|^2, so no hash is
done before all rows of both sides were seen. One kernel projects a side and keeps its squares and the largest of each
tile; another, when both sides are there, adds the last coordinate. A row is read once, and neither F nor G, of D + 2
columns, is ever made.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .config import Config, Cost, TuningSpace, cdiv, padded, products
from .launch import Launch, Lookup, device_kind, exact_precision, run_planned, unit_stride
from .tiles import head_of


@triton.jit(do_not_specialize=["n_rounds"])
def project_kernel(
    x_ptr, directions_ptr, mask_ptr, products_ptr, squares_ptr, most_ptr,
    x_stride_b, x_stride_h, x_stride_n, directions_stride_b, directions_stride_h, directions_stride_r,
    n_heads, group_size, n_rows, n_rounds,
    HEAD_DIM: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M rows for one query head, all rounds
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    head = (tl.program_id(0) // n_tiles).to(tl.int64)
    x_ptr = head_of(x_ptr, head, n_heads, group_size, x_stride_b, x_stride_h)
    directions_ptr = head_of(directions_ptr, head, n_heads, 1, directions_stride_b, directions_stride_h)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    place = tl.where(inside, rows, -1)
    square = tl.zeros([BLOCK_M], tl.float32)  # each tile of rounds, mostly there is one, finds it anew
    for first in range(0, n_rounds, BLOCK_R):
        rounds = first + tl.arange(0, BLOCK_R)
        is_round = rounds < n_rounds
        own_directions = tl.where(is_round, rounds, -1)
        s = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_K):
            x = load_part(x_ptr, place, x_stride_n, start, HEAD_DIM, BLOCK_K)  # [BLOCK_M, BLOCK_K]
            directions = load_part(directions_ptr, own_directions, directions_stride_r, start, HEAD_DIM, BLOCK_K)
            square += tl.sum(x * x, 1)
            s = tl.dot(directions, tl.trans(x), s, input_precision=PRECISION)
        at = products_ptr + (head * n_rounds + rounds)[:, None] * n_rows + rows[None, :]
        tl.store(at, s, mask=is_round[:, None] & inside[None, :])
    tl.store(squares_ptr + head * n_rows + rows, square, mask=inside)
    if HAS_MASK:
        takes_part = tl.load(mask_ptr + head // n_heads * n_rows + rows, mask=inside, other=False)
        square = tl.where(takes_part, square, 0.0)
    tl.store(most_ptr + head * n_tiles + tile, tl.max(square, 0))


@triton.jit
def load_part(base, rows, stride, start, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Columns start .. start + BLOCK - 1 of rows, [len(rows), BLOCK] fp32; row -1 and columns from DIM on read as 0."""
    columns = start + tl.arange(0, BLOCK)
    mask = (rows >= 0)[:, None]
    if DIM % BLOCK != 0:
        mask = mask & (columns < DIM)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def largest(most_ptr, n_tiles, BLOCK: tl.constexpr):
    result = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_tiles, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        result = tl.maximum(result, tl.load(most_ptr + tiles, mask=tiles < n_tiles, other=0.0))
    return tl.max(result, 0)


@triton.jit(do_not_specialize=["n_rounds", "n_tiles", "n_other_tiles", "coordinate"])
def lift_kernel(
    products_ptr, squares_ptr, most_ptr, other_most_ptr, directions_ptr, hashes_ptr,
    directions_stride_b, directions_stride_h, directions_stride_r,
    n_heads, n_rows, n_rounds, n_tiles, n_other_tiles, coordinate, BLOCK_M: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M rows of one head, all rounds; every one of a head finds the radius anew
    n_parts = tl.cdiv(n_rows, BLOCK_M)
    head = (tl.program_id(0) // n_parts).to(tl.int64)
    most = largest(most_ptr + head * n_tiles, n_tiles, BLOCK_M)
    other_most = largest(other_most_ptr + head * n_other_tiles, n_other_tiles, BLOCK_M)
    radius = most + other_most  # pyright: ignore[reportOperatorIssue]
    directions_ptr = head_of(directions_ptr, head, n_heads, 1, directions_stride_b, directions_stride_h) + coordinate

    rows = tl.program_id(0) % n_parts * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    square = tl.load(squares_ptr + head * n_rows + rows, mask=inside, other=0.0)  # [BLOCK_M]
    height = tl.sqrt(tl.maximum(radius - square, 0.0))  # rows that take no part may lie outside
    for r in range(0, n_rounds):
        at = (head * n_rounds + r) * n_rows + rows
        product = tl.load(products_ptr + at, mask=inside, other=0.0)
        hashes = product + tl.load(directions_ptr + r * directions_stride_r) * height
        tl.store(hashes_ptr + at, hashes, mask=inside)  # may be where the products were


TUNING: dict[str, TuningSpace] = {
    "smyrf_hash_project": TuningSpace(
        blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_K": (16, 32, 64, 128)}, num_warps=(2, 4, 8), num_stages=(1, 2)
    ),
    "smyrf_hash_lift": TuningSpace(blocks={"BLOCK_M": (256, 512, 1024, 2048)}, num_warps=(4, 8), num_stages=(1,)),
}
KERNELS = {"smyrf_hash_project": project_kernel, "smyrf_hash_lift": lift_kernel}
_LEAST_ROWS = min(TUNING["smyrf_hash_project"].blocks["BLOCK_M"])
_LIFTED = ("products", "squares", "most", "other_most", "directions", "hashes")
# A tile of rounds: the least that tensor cores take, or on a CPU the usual number, for 16 take 1.2 to 1.9 times as long
_ROUNDS, _CPU_ROUNDS = 16, 4


def cost(
    kernel: str, *, batch: int, heads: int, length: int, rounds: int, head_dim: int = 64, element_size: int = 4,
    config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one side's launch of ``kernel``, with directions that all heads share."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    rows = batch * heads * length
    m = config.blocks["BLOCK_M"] if config else 0
    programs = batch * heads * cdiv(length, m) if config else 0
    if kernel == "smyrf_hash_lift":
        moved = rows * (8 * rounds + 4)
        work = Cost(0, moved, 0)
        if config is None:
            return work
        maxima = 2 * cdiv(length, 64)  # of tiles as the heuristic has them
        return replace(
            work, pointwise=programs * (m * (4 + 2 * rounds) + maxima), steps=programs * rounds, held=4 * m,
            loaded=moved + programs * 4 * maxima,
        )  # fmt: skip
    own, directions = rows * (head_dim * element_size + 4 + 4 * rounds), rounds * head_dim * 4
    work = Cost(2 * rows * rounds * head_dim, own + directions, 0, rate="tf32x3")
    if config is None:
        return work
    k, r_tiles = config.blocks["BLOCK_K"], cdiv(rounds, _ROUNDS)
    steps = programs * r_tiles * cdiv(head_dim, k)
    return replace(
        work, **products(steps, (_ROUNDS, m, k)), pointwise=steps * 2 * m * k, steps=steps,
        held=4 * m * k,  # squares go over the tile too
        loaded=own + rows * (r_tiles - 1) * head_dim * element_size + programs * (directions + 4),
    )  # fmt: skip


def heuristic(kernel: str, device_type: str, head_dim: int = 64) -> Config:
    """The configuration where nothing was tuned. device_type as in block attention's."""
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    if kernel == "smyrf_hash_lift":
        return Config({"BLOCK_M": 1024}, num_stages=1)
    if device_type == "cpu":
        return Config({"BLOCK_M": 64, "BLOCK_K": min(128, padded(head_dim))})
    # the largest tile whose binaries spill nothing, from sm_80 to sm_120 and on gfx942
    return Config({"BLOCK_M": 64, "BLOCK_K": min(32, padded(head_dim))}, num_stages=1)


def project_launch(tensors: Mapping[str, torch.Tensor], device_type: str, config: Config | None = None) -> Launch:
    """Of one side: from x (B, Hx, N, D), directions (B, H, R, D + 2) and, if not all rows take part, mask (B, N), it
    writes products (B, H, R, N), squares (B, H, N) and most, which has a number for every tile of rows or more.

    All but x and directions are contiguous. A direction is D numbers for x, that of a key's and that of a query's last.
    """
    x = tensors["x"]
    batch, heads, n_rounds, n_rows = tensors["products"].shape
    head_dim = x.shape[3]
    config = config or heuristic("smyrf_hash_project", device_type, head_dim)
    names = ("x", "directions", "mask", "products", "squares", "most")
    args: dict[str, Any] = {f"{name}_ptr": tensors.get(name) for name in names}
    for name, letters in (("x", "bhn"), ("directions", "bhr")):
        args |= {f"{name}_stride_{letter}": s for letter, s in zip(letters, tensors[name].stride(), strict=False)}
    args |= {"n_heads": heads, "group_size": heads // x.shape[1], "n_rows": n_rows, "n_rounds": n_rounds}
    args |= {"HEAD_DIM": head_dim, "BLOCK_R": _CPU_ROUNDS if device_type == "cpu" else _ROUNDS}
    args |= {"HAS_MASK": "mask" in tensors}
    args |= {"PRECISION": exact_precision(device_type)}
    return Launch(project_kernel, (batch * heads * cdiv(n_rows, config.blocks["BLOCK_M"]),), args, config)


def lift_launch(
    tensors: Mapping[str, torch.Tensor], tile: int, n_other: int, device_type: str, *, of_queries: bool,
    config: Config | None = None,
) -> Launch:  # fmt: skip
    """Of one side: from products, squares, directions and most of :func:`project_launch`, whose BLOCK_M was ``tile``,
    and other_most, the other side's ``most``, of ``n_other`` rows, writes hashes, which may be the products."""
    products, directions = tensors["products"], tensors["directions"]
    batch, heads, n_rounds, n_rows = products.shape
    config = config or heuristic("smyrf_hash_lift", device_type)
    args: dict[str, Any] = {f"{name}_ptr": tensors[name] for name in _LIFTED}
    args |= {f"directions_stride_{letter}": s for letter, s in zip("bhr", directions.stride(), strict=False)}
    args |= {"n_heads": heads, "n_rows": n_rows, "n_rounds": n_rounds}
    args |= {"n_tiles": cdiv(n_rows, tile), "n_other_tiles": cdiv(n_other, tile)}
    args |= {"coordinate": directions.shape[3] - (1 if of_queries else 2)}
    return Launch(lift_kernel, (batch * heads * cdiv(n_rows, config.blocks["BLOCK_M"]),), args, config)


def smyrf_hash(
    q: torch.Tensor, k: torch.Tensor, directions: torch.Tensor, query_mask: torch.Tensor | None,
    key_mask: torch.Tensor | None, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(q_hash (B, H, R, N), k_hash (B, H, R, S)), fp32, of q (B, H, N, D) and k (B, Hkv, S, D); the arguments are
    checked by ``fastattn.ops.smyrf_hash``.

    directions (B, H, R, D + 2), fp32: turned, so that each is a row; strides of 0 where examples or heads share them.
    lookup: gives tuned configurations; its answers are kept while ``stamp`` stays the same.
    """
    kind, rounds = device_kind(q.device), directions.shape[2]
    tiles = {"rounds": rounds, "head_dim": q.shape[3]}

    def config(kernel: str, dtype: torch.dtype, shape: Mapping[str, int]) -> Config:
        tuned = lookup(kernel, q.device, dtype, shape, {}) if lookup else None
        return tuned or heuristic(kernel, kind, q.shape[3])

    def project(side: Mapping[str, torch.Tensor]) -> Iterator[Launch]:
        yield project_launch(side, kind, config("smyrf_hash_project", q.dtype, tiles))

    def lift(side: Mapping[str, torch.Tensor], n_other: int, of_queries: bool) -> Iterator[Launch]:
        tile = config("smyrf_hash_project", q.dtype, tiles).blocks["BLOCK_M"]
        chosen = config("smyrf_hash_lift", torch.float32, {"rounds": rounds})
        yield lift_launch(side, tile, n_other, kind, of_queries=of_queries, config=chosen)

    sides = [side_of(unit_stride(x), directions, mask) for x, mask in ((q, query_mask), (k, key_mask))]
    for side in sides:
        run_planned(("smyrf_hash_project", stamp), side, lambda side=side: project(side), made=3)
    for own, other, of_queries in ((*sides, True), (*sides[::-1], False)):
        more = {"other_most": other["most"], "hashes": own["products"]}
        side, n_other = {name: (own | more)[name] for name in _LIFTED}, other["products"].shape[3]
        key = ("smyrf_hash_lift", n_other, q.dtype, q.shape[3], of_queries, stamp)
        run_planned(key, side, lambda side=side, n=n_other, of_queries=of_queries: lift(side, n, of_queries))
    return sides[0]["products"], sides[1]["products"]


def side_of(x: torch.Tensor, directions: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of :func:`project_launch`, those that it writes made."""
    batch, heads, rounds = directions.shape[:3]
    given = {"x": x, "directions": directions} | ({} if mask is None else {"mask": mask.contiguous()})

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    n_rows = x.shape[2]
    made = {"products": empty(batch, heads, rounds, n_rows), "squares": empty(batch, heads, n_rows)}
    return given | made | {"most": empty(batch, heads, cdiv(n_rows, _LEAST_ROWS))}


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, rounds: int = 4, is_masked: bool = False,
    device_type: str = "cuda", config: Config | None = None,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    x = torch.empty(1, 2, 128, head_dim, device="meta", dtype=dtype)
    directions = torch.empty(1, 1, rounds, head_dim + 2, device="meta").expand(1, 2, -1, -1)
    side = side_of(x, directions, torch.empty(1, 128, dtype=torch.bool, device="meta") if is_masked else None)
    if kernel == "smyrf_hash_project":
        return project_launch(side, device_type, config)
    tile = heuristic("smyrf_hash_project", device_type, head_dim).blocks["BLOCK_M"]
    side |= {"other_most": side["most"], "hashes": side["products"]}
    return lift_launch(side, tile, 128, device_type, of_queries=True, config=config)
