"""The Triton kernels of linear attention: states of chunks, their scan, and what reads them: outputs and gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .feature_tiles import load_features, load_tile, operand, slope
from .tiles import head_of


@triton.jit
def take_part(rows, length, key_mask_ptr, batch, IS_MASKED: tl.constexpr):
    """Which of ``rows`` are there, and, if they are masked keys', are not masked out."""
    keep = rows < length
    if IS_MASKED:
        keep = tl.load(key_mask_ptr + batch * length + rows, mask=keep, other=0) != 0
    return keep


@triton.jit
def inverse_of(den_ptr, rows, keep):
    """1 / denominator of queries, 0 where that is 0."""
    den = tl.load(den_ptr + rows, mask=keep, other=0.0)
    return tl.where(den == 0.0, 0.0, 1.0 / den)


@triton.jit
def states_kernel(
    other_x_ptr, other_y_ptr, key_mask_ptr, den_ptr, delta_ptr, states_ptr,
    other_x_stride_b, other_x_stride_h, other_x_stride_n, other_y_stride_b, other_y_stride_h, other_y_stride_n,
    n_other_heads, n_other, n_chunks, chunk,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_DV: tl.constexpr, FEATURE_MAP: tl.constexpr, OWN_KEYS: tl.constexpr, OTHER_MASK: tl.constexpr,
    NARROW: tl.constexpr, NARROW_SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = one tile of the state of one chunk
    pid = tl.program_id(0)
    f_tiles: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    dv_tiles: tl.constexpr = (VALUE_DIM + BLOCK_DV - 1) // BLOCK_DV
    dv_start = pid % dv_tiles * BLOCK_DV
    f_start = pid // dv_tiles % f_tiles * BLOCK_F
    chunk_id = pid // (dv_tiles * f_tiles)
    row = (chunk_id // n_chunks).to(tl.int64)
    x_ptr = head_of(other_x_ptr, row, n_other_heads, 1, other_x_stride_b, other_x_stride_h)
    y_ptr = head_of(other_y_ptr, row, n_other_heads, 1, other_y_stride_b, other_y_stride_h)
    den_ptr += row * n_other
    delta_ptr += row * n_other
    first = chunk_id % n_chunks * chunk
    last = tl.minimum(first + chunk, n_other)

    s = tl.zeros([BLOCK_F, BLOCK_DV], tl.float32)
    z = tl.zeros([BLOCK_F], tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        keep = take_part(rows, n_other, key_mask_ptr, row // n_other_heads, OTHER_MASK) & (rows < last)
        phi = load_features(x_ptr, rows, keep, other_x_stride_n, f_start, FEATURE_MAP, FEATURES, BLOCK_F)
        y = load_tile(y_ptr, rows, keep, other_y_stride_n, dv_start, VALUE_DIM, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        if OWN_KEYS:
            inverse = inverse_of(den_ptr, rows, keep)  # [BLOCK_N]
            delta = tl.load(delta_ptr + rows, mask=keep, other=0.0)  # [BLOCK_N]
            phi = phi * inverse[:, None]  # [BLOCK_N, BLOCK_F]
            z -= tl.sum(phi * delta[:, None], 0)
            left, right = operand(phi, other_y_ptr, NARROW_SUMS), operand(y, other_y_ptr, NARROW_SUMS)
        else:
            z += tl.sum(phi, 0)
            left, right = operand(phi, other_y_ptr, NARROW), operand(y, other_y_ptr, NARROW)
        s = tl.dot(tl.trans(left), right, s, input_precision=PRECISION)

    states_ptr += chunk_id.to(tl.int64) * (FEATURES * (VALUE_DIM + 1))
    f, dv = f_start + tl.arange(0, BLOCK_F), dv_start + tl.arange(0, BLOCK_DV)
    tl.store(
        states_ptr + f[:, None] * VALUE_DIM + dv[None, :], s, mask=(f < FEATURES)[:, None] & (dv < VALUE_DIM)[None, :]
    )
    if dv_start == 0:
        tl.store(states_ptr + FEATURES * VALUE_DIM + f, z, mask=f < FEATURES)


@triton.jit
def scan_kernel(
    states_ptr, initial_ptr, before_ptr, final_ptr, n_heads, group_size, n_chunks, size,
    BLOCK_SIZE: tl.constexpr, HAS_INITIAL: tl.constexpr, KEEPS_BEFORE: tl.constexpr, OWN_KEYS: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_SIZE numbers of the states of one head, from the first chunk to the last, or back
    pid = tl.program_id(0)
    n_tiles = tl.cdiv(size, BLOCK_SIZE)
    row = (pid // n_tiles).to(tl.int64)
    at = pid % n_tiles * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = at < size
    if HAS_INITIAL:
        total = tl.load(initial_ptr + row * size + at, mask=mask, other=0.0)  # [BLOCK_SIZE]
    else:
        total = tl.zeros([BLOCK_SIZE], tl.float32)
    for step in range(0, n_chunks):
        chunk_id = n_chunks - 1 - step if OWN_KEYS else step
        state = tl.load(states_ptr + (row // group_size * n_chunks + chunk_id) * size + at, mask=mask, other=0.0)
        if KEEPS_BEFORE:
            # it may stand where the state stood
            tl.store(before_ptr + (row * n_chunks + chunk_id) * size + at, total, mask=mask)
        total += state
    tl.store(final_ptr + row * size + at, total, mask=mask)


@triton.jit
def outputs_kernel(
    own_x_ptr, other_x_ptr, other_y_ptr, key_mask_ptr, before_ptr, den_ptr, result_ptr,
    own_x_stride_b, own_x_stride_h, own_x_stride_n, other_x_stride_b, other_x_stride_h, other_x_stride_n,
    other_y_stride_b, other_y_stride_h, other_y_stride_n,
    n_heads, own_group, other_group, n_own, n_other, n_chunks, eps,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_DV: tl.constexpr, FEATURE_MAP: tl.constexpr, OWN_KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    OWN_MASK: tl.constexpr, OTHER_MASK: tl.constexpr, NARROW: tl.constexpr, NARROW_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M own rows, BLOCK_DV columns of their results: out of queries, dv of keys
    pid = tl.program_id(0)
    dv_tiles: tl.constexpr = (VALUE_DIM + BLOCK_DV - 1) // BLOCK_DV
    m_tiles = tl.cdiv(n_own, BLOCK_M)
    dv_start = pid % dv_tiles * BLOCK_DV
    m_tile = pid // dv_tiles % m_tiles
    row = (pid // (dv_tiles * m_tiles)).to(tl.int64)
    x_ptr = head_of(own_x_ptr, row, n_heads, own_group, own_x_stride_b, own_x_stride_h)
    before_ptr += (row * n_chunks + m_tile if IS_CAUSAL else row) * (FEATURES * (VALUE_DIM + 1))
    den_ptr += row * (n_other if OWN_KEYS else n_own)
    result_ptr += row * n_own * VALUE_DIM
    rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = take_part(rows, n_own, key_mask_ptr, row // n_heads, OWN_MASK)
    dv = dv_start + tl.arange(0, BLOCK_DV)
    if IS_CAUSAL:
        k_ptr = head_of(other_x_ptr, row, n_heads, other_group, other_x_stride_b, other_x_stride_h)
        y_ptr = head_of(other_y_ptr, row, n_heads, other_group, other_y_stride_b, other_y_stride_h)
        other_keep = take_part(rows, n_other, key_mask_ptr, row // n_heads, OTHER_MASK)
        weights = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, FEATURES, BLOCK_F):
        phi = load_features(x_ptr, rows, keep, own_x_stride_n, start, FEATURE_MAP, FEATURES, BLOCK_F)
        f = start + tl.arange(0, BLOCK_F)
        s = tl.load(
            before_ptr + f[:, None] * VALUE_DIM + dv[None, :],
            mask=(f < FEATURES)[:, None] & (dv < VALUE_DIM)[None, :], other=0.0,
        )  # [BLOCK_F, BLOCK_DV]  # fmt: skip
        acc = tl.dot(
            operand(phi, other_y_ptr, NARROW_SUMS), operand(s, other_y_ptr, NARROW_SUMS), acc, input_precision=PRECISION
        )
        if not OWN_KEYS:
            z = tl.load(before_ptr + FEATURES * VALUE_DIM + f, mask=f < FEATURES, other=0.0)  # [BLOCK_F]
            total += tl.sum(phi * z[None, :], 1)
        if IS_CAUSAL:
            other = load_features(k_ptr, rows, other_keep, other_x_stride_n, start, FEATURE_MAP, FEATURES, BLOCK_F)
            weights = tl.dot(
                operand(phi, other_y_ptr, NARROW), tl.trans(operand(other, other_y_ptr, NARROW)), weights,
                input_precision=PRECISION,
            )  # fmt: skip

    if IS_CAUSAL:
        if OWN_KEYS:
            weights = tl.where(rows[:, None] <= rows[None, :], weights, 0.0)
            weights = weights * inverse_of(den_ptr, rows, other_keep)[None, :]
        else:
            weights = tl.where(rows[:, None] >= rows[None, :], weights, 0.0)
            total += tl.sum(weights, 1)
        y = load_tile(y_ptr, rows, other_keep, other_y_stride_n, dv_start, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        acc = tl.dot(
            operand(weights, other_y_ptr, NARROW_SUMS), operand(y, other_y_ptr, NARROW_SUMS), acc,
            input_precision=PRECISION,
        )  # fmt: skip
    if not OWN_KEYS:
        den = total + eps
        if dv_start == 0:
            tl.store(den_ptr + rows, den, mask=keep)
        acc = acc * tl.where(den == 0.0, 0.0, 1.0 / den)[:, None]
    tl.store(
        result_ptr + rows.to(tl.int64)[:, None] * VALUE_DIM + dv[None, :], acc.to(result_ptr.dtype.element_ty),
        mask=(rows < n_own)[:, None] & (dv < VALUE_DIM)[None, :],
    )  # fmt: skip


@triton.jit
def gradients_kernel(
    own_x_ptr, own_y_ptr, other_x_ptr, other_y_ptr, key_mask_ptr, before_ptr, out_ptr, den_ptr, delta_ptr,
    dx_ptr,
    own_x_stride_b, own_x_stride_h, own_x_stride_n, own_y_stride_b, own_y_stride_h, own_y_stride_n,
    other_x_stride_b, other_x_stride_h, other_x_stride_n, other_y_stride_b, other_y_stride_h, other_y_stride_n,
    n_heads, own_group, other_group, n_own, n_other, n_chunks,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_DV: tl.constexpr, FEATURE_MAP: tl.constexpr, OWN_KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    OWN_MASK: tl.constexpr, OTHER_MASK: tl.constexpr, NARROW: tl.constexpr, NARROW_SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_M own rows, BLOCK_F columns of their gradients: dq of queries, dk of keys
    pid = tl.program_id(0)
    f_tiles: tl.constexpr = (FEATURES + BLOCK_F - 1) // BLOCK_F
    m_tiles = tl.cdiv(n_own, BLOCK_M)
    f_start = pid % f_tiles * BLOCK_F
    m_tile = pid // f_tiles % m_tiles
    row = (pid // (f_tiles * m_tiles)).to(tl.int64)
    x_ptr = head_of(own_x_ptr, row, n_heads, own_group, own_x_stride_b, own_x_stride_h)
    y_ptr = head_of(own_y_ptr, row, n_heads, own_group, own_y_stride_b, own_y_stride_h)
    before_ptr += (row * n_chunks + m_tile if IS_CAUSAL else row) * (FEATURES * (VALUE_DIM + 1))
    den_ptr += row * (n_other if OWN_KEYS else n_own)
    delta_ptr += row * (n_other if OWN_KEYS else n_own)
    out_ptr += row * n_own * VALUE_DIM
    dx_ptr += row * n_own * FEATURES
    rows = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    keep = take_part(rows, n_own, key_mask_ptr, row // n_heads, OWN_MASK)
    f = f_start + tl.arange(0, BLOCK_F)
    if IS_CAUSAL:
        k_ptr = head_of(other_x_ptr, row, n_heads, other_group, other_x_stride_b, other_x_stride_h)
        v_ptr = head_of(other_y_ptr, row, n_heads, other_group, other_y_stride_b, other_y_stride_h)
        other_keep = take_part(rows, n_other, key_mask_ptr, row // n_heads, OTHER_MASK)
        weights = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, VALUE_DIM, BLOCK_DV):
        y = load_tile(y_ptr, rows, keep, own_y_stride_n, start, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        dv = start + tl.arange(0, BLOCK_DV)
        s = tl.load(
            before_ptr + f[:, None] * VALUE_DIM + dv[None, :],
            mask=(f < FEATURES)[:, None] & (dv < VALUE_DIM)[None, :], other=0.0,
        )  # [BLOCK_F, BLOCK_DV]  # fmt: skip
        acc = tl.dot(
            operand(y, own_y_ptr, NARROW_SUMS), tl.trans(operand(s, own_y_ptr, NARROW_SUMS)), acc,
            input_precision=PRECISION,
        )  # fmt: skip
        if IS_CAUSAL:
            other = load_tile(v_ptr, rows, other_keep, other_y_stride_n, start, VALUE_DIM, BLOCK_DV)
            weights = tl.dot(y, tl.trans(other), weights, input_precision=PRECISION)  # [BLOCK_M, BLOCK_M]
        if not OWN_KEYS:
            out = load_tile(out_ptr, rows, keep, VALUE_DIM, start, VALUE_DIM, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
            delta += tl.sum(y.to(tl.float32) * out.to(tl.float32), 1)

    # a value has a 1 behind it and dout / denominator a -delta / denominator: what they bring to the denominator
    z = tl.load(before_ptr + FEATURES * VALUE_DIM + f, mask=f < FEATURES, other=0.0)  # [BLOCK_F]
    if OWN_KEYS:
        acc += tl.where(keep, 1.0, 0.0)[:, None] * z[None, :]
    else:
        if f_start == 0:
            tl.store(delta_ptr + rows, delta, mask=keep)  # the keys' pass reads it
        inverse = inverse_of(den_ptr, rows, keep)  # [BLOCK_M]
        acc = (acc - delta[:, None] * z[None, :]) * inverse[:, None]
    if IS_CAUSAL:
        if OWN_KEYS:
            inverse = inverse_of(den_ptr, rows, other_keep)  # [BLOCK_M]
            delta = tl.load(delta_ptr + rows, mask=other_keep, other=0.0)  # [BLOCK_M]
            weights = (weights - delta[None, :]) * inverse[None, :]
            weights = tl.where((rows[:, None] <= rows[None, :]) & keep[:, None], weights, 0.0)
        else:
            weights = (weights - delta[:, None]) * inverse[:, None]
            weights = tl.where(rows[:, None] >= rows[None, :], weights, 0.0)
        phi = load_features(k_ptr, rows, other_keep, other_x_stride_n, f_start, FEATURE_MAP, FEATURES, BLOCK_F)
        acc = tl.dot(
            operand(weights, own_y_ptr, NARROW_SUMS), operand(phi, own_y_ptr, NARROW_SUMS), acc,
            input_precision=PRECISION,
        )  # fmt: skip
    x = load_tile(x_ptr, rows, keep, own_x_stride_n, f_start, FEATURES, BLOCK_F).to(tl.float32)
    dx = (acc * slope(x, FEATURE_MAP)).to(dx_ptr.dtype.element_ty)
    tl.store(
        dx_ptr + rows.to(tl.int64)[:, None] * FEATURES + f[None, :], dx,
        mask=(rows < n_own)[:, None] & (f < FEATURES)[None, :],
    )  # fmt: skip
