"""Which pairs of a block attention's round count: causality, a query's own key, buckets, pairs that met before; and
which of them dropout keeps."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(n_blocks, n_tiles):
    """(row, block, tile): which of the B * H heads, which of its blocks and which tile of that this program has.

    The programs of a head are consecutive, so that its rows stay cached."""
    pid = tl.program_id(0)
    row = (pid // (n_blocks * n_tiles)).to(tl.int64)
    return row, pid % (n_blocks * n_tiles) // n_tiles, pid % n_tiles


@triton.jit
def neighbour(block, distance, round_id, n_rounds, n_blocks, n_used, WRAP: tl.constexpr):
    """Block number over all rounds of the block that stands ``distance`` after ``block`` in a round, and if it is.

    n_used: how many of its n_blocks blocks each round of this head uses; None: all."""
    n_ring = n_blocks if n_used is None else n_used
    if WRAP:
        total = n_rounds * n_ring
        other = (round_id * n_ring + block + distance) % total
        other = (other + total) % total
        if n_used is not None:
            other += other // n_ring * (n_blocks - n_ring)
        return other, True
    else:
        return round_id * n_blocks + block + distance, (block + distance >= 0) & (block + distance < n_ring)


@triton.jit
def pair_mask(q_rows, k_rows, IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr):
    """Which pairs take part; q_rows and k_rows broadcast against each other."""
    keep = (k_rows >= 0) & (q_rows >= 0)
    if IS_CAUSAL:
        keep = keep & (k_rows <= q_rows)
    if EXCLUDE_SELF:
        keep = keep & (k_rows != q_rows)
    return keep


@triton.jit
def of_round(base, row, n_rounds, round_id, length, rows):
    """What ``base`` (B * H, n_rounds, length) holds of ``rows``; 0 where there is no row."""
    return tl.load(base + (row * n_rounds + round_id) * length + rows, mask=rows >= 0, other=0)


@triton.jit
def share_a_bucket(
    q_bucket_ptr, k_bucket_ptr, row, n_rounds, q_round, k_round, n_queries, n_keys, q_rows, k_rows
):  # fmt: skip
    """Which pairs have equal buckets; none where the query's round is not that of the block which the key stands in."""
    q_bucket = of_round(q_bucket_ptr, row, n_rounds, q_round, n_queries, q_rows)
    k_bucket = of_round(k_bucket_ptr, row, n_rounds, q_round, n_keys, k_rows)
    return (q_bucket == k_bucket) & (q_round == k_round)


@triton.jit
def new_pairs(
    keep, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr, row, q_rows, k_rows, n_queries, n_keys,
    n_rounds, n_ring, look_back, look_ahead, round_id, step, WRAP: tl.constexpr,
):  # fmt: skip
    """``keep`` without the pairs that met before: in a round before ``round_id``, or in that one at an earlier step of
    the query's window than ``step``.

    A query in block c meets a key of block c' at step c' - c + look_back of its window, if that is below the window's
    length. The key may stand in a block of another round that the window reaches into. n_ring: blocks of a round.
    """
    reach_back = 0
    reach = 1  # how many rounds a window touches
    if WRAP:
        reach_back = tl.cdiv(look_back, n_ring)
        reach = 1 + reach_back + tl.cdiv(look_ahead, n_ring)
    turns = tl.where(step > 0, round_id + 1, round_id) * reach
    for turn in range(0, turns):
        earlier = turn // reach
        away = turn % reach - reach_back
        k_round = ((earlier + away) % n_rounds + n_rounds) % n_rounds
        c_q = of_round(q_block_ptr, row, n_rounds, earlier, n_queries, q_rows) - look_back - away * n_ring
        c_k = of_round(k_block_ptr, row, n_rounds, k_round, n_keys, k_rows)
        steps = tl.where(earlier == round_id, step, 1 + look_back + look_ahead)
        met = (c_k >= c_q) & (c_k < c_q + steps)
        if q_bucket_ptr is not None:
            met = met & share_a_bucket(
                q_bucket_ptr, k_bucket_ptr, row, n_rounds, earlier, k_round, n_queries, n_keys, q_rows, k_rows
            )  # fmt: skip
        keep = keep & (met == 0)
    return keep


@triton.jit
def counted(
    q_rows, k_rows, row, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr, n_queries, n_keys, n_rounds, n_ring,
    look_back, look_ahead, q_round, k_round, step,
    IS_CAUSAL: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, IS_LOCAL: tl.constexpr,
):  # fmt: skip
    """Which pairs count when queries of ``q_round`` meet keys of a block of ``k_round`` at ``step`` of their window.

    q_rows and k_rows: of two dimensions, that broadcast against each other."""
    keep = pair_mask(q_rows, k_rows, IS_CAUSAL, EXCLUDE_SELF)
    if q_bucket_ptr is not None and not IS_LOCAL:
        keep = keep & share_a_bucket(
            q_bucket_ptr, k_bucket_ptr, row, n_rounds, q_round, k_round, n_queries, n_keys, q_rows, k_rows
        )  # fmt: skip
    if q_block_ptr is not None:
        keep = new_pairs(
            keep, q_block_ptr, k_block_ptr, q_bucket_ptr, k_bucket_ptr, row, q_rows, k_rows, n_queries, n_keys,
            n_rounds, n_ring, look_back, look_ahead, q_round, step, WRAP,
        )  # fmt: skip
    return keep


@triton.jit
def kept_pairs(seed_ptr, row, round_id, q_rows, k_rows, drop_below):
    """Which pairs dropout keeps, as ``fastattn.reference.dropout.kept`` has it; q_rows and k_rows broadcast."""
    word, _, _, _ = tl.philox(tl.load(seed_ptr), k_rows, q_rows, round_id, row.to(tl.int32))
    return (word >> 8).to(tl.int32) >= drop_below  # 24 bits


@triton.jit
def dropout_weight(seed_ptr, row, round_id, q_rows, k_rows, drop_below, kept_scale):
    """What dropout multiplies the probability of each pair with."""
    return tl.where(kept_pairs(seed_ptr, row, round_id, q_rows, k_rows, drop_below), kept_scale, 0.0)
