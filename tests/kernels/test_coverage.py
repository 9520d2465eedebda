"""What the CPU engine covers beyond plain arithmetic, by the entries of docs/cpu-engine.md's table, against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastattn.kernels.config import Config
from fastattn.kernels.cpu.build import find_compiler
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch, run

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")


def launch(kernel, grid=(1,), **args):
    run([Launch(kernel, grid, args, Config())])


def integers(*shape, low=-9, high=10, dtype=torch.int32):
    return torch.randint(low, high, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


# ---- shapes


@triton.jit
def shape_kernel(x, y, z, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    n: tl.constexpr = A * B * C * D
    flat = tl.load(x + tl.arange(0, n))
    tile = tl.reshape(flat * 2.0, [A, B, C, D])
    turned = tl.permute(tile, [2, 0, 3, 1])  # [C, A, D, B]
    tl.store(y + tl.arange(0, n), tl.reshape(turned, [n]))
    row = tl.sum(tile, 1)  # [A, C, D]
    scaled = tile - row[:, None, :, :]
    a, b, c, d = tl.arange(0, A), tl.arange(0, B), tl.arange(0, C), tl.arange(0, D)
    at = ((a[:, None, None, None] * B + b[None, :, None, None]) * C + c[None, None, :, None]) * D + d
    tl.store(z + at, scaled)


@pytest.mark.parametrize("shape", [(2, 4, 8, 16), (4, 1, 2, 2), (1, 8, 4, 1)], ids=str)
def test_tiles_of_rank_four_are_reshaped_permuted_reduced_and_broadcast(shape):
    x = torch.randn(shape)
    y, z = torch.empty(x.numel()), torch.empty(shape)
    launch(shape_kernel, x=x, y=y, z=z, **dict(zip("ABCD", shape, strict=True)))
    assert torch.equal(y, (2 * x).permute(2, 0, 3, 1).reshape(-1))
    torch.testing.assert_close(z, 2 * x - (2 * x).sum(1, keepdim=True))


@triton.jit
def pair_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    even, odd = tl.split(tl.reshape(tl.load(x + i), [N // 2, 2]))
    swapped = tl.join(odd - even, even * odd)  # [N / 2, 2]
    tl.store(y + i, tl.reshape(swapped, [N]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("n", [2, 16, 64])
def test_halves_are_split_off_and_joined(n, dtype):
    x = integers(n, dtype=torch.int64).to(dtype)
    y = torch.empty_like(x)
    launch(pair_kernel, x=x, y=y, N=n)
    assert torch.equal(y.view(-1, 2), torch.stack([x[1::2] - x[::2], x[::2] * x[1::2]], 1))


@triton.jit
def half_gather_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    even, odd = tl.split(tl.reshape(tl.load(x + tl.arange(0, 2 * N)), [N, 2]))
    tl.store(y + i, tl.gather(odd, N - 1 - i, 0) + even)


def test_a_half_is_gathered_from():
    x, y = integers(32), torch.empty(16, dtype=torch.int32)
    launch(half_gather_kernel, x=x, y=y, N=16)
    assert torch.equal(y, x[1::2].flip(0) + x[::2])


@triton.jit
def gather_kernel(x, index, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    tile = tl.load(x + i[:, None] * N + j[None, :])
    at = k[:, None] * N + j[None, :] if AXIS == 0 else i[:, None] * K + k[None, :]
    tl.store(y + at, tl.gather(tile, tl.load(index + at), AXIS) + 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(8, 32, 64), (4, 2, 2), (16, 16, 1)], ids=str)
def test_elements_are_gathered_along_an_axis(shape, axis):
    m, n, k = shape
    x = integers(m, n)
    index = integers(*((k, n) if axis == 0 else (m, k)), low=0, high=(m, n)[axis])
    y = torch.empty_like(index)
    launch(gather_kernel, x=x, index=index, y=y, M=m, N=n, K=k, AXIS=axis)
    assert torch.equal(y, x.gather(axis, index.long()) + 1)


# ---- reductions and scans


@triton.jit
def larger(value, index, other, other_index):
    keep = (value > other) | ((value == other) & (index < other_index))
    return tl.where(keep, value, other), tl.where(keep, index, other_index)


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def fold_kernel(x, y, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + j[None, :])
    if AXIS == 0:
        size: tl.constexpr = N
        at = tl.broadcast_to(i[:, None], [M, N])
    else:
        size: tl.constexpr = M
        at = tl.broadcast_to(j[None, :], [M, N])
    k = tl.arange(0, size)
    tl.store(y + k, tl.argmax(tile, AXIS))
    tl.store(y + size + k, tl.argmin(tile, AXIS))
    tl.store(y + 2 * size + k, tl.xor_sum(tile, AXIS))
    tl.store(y + 3 * size + k, tl.max(tile, AXIS))
    tl.store(y + 4 * size + k, tl.min(tile, AXIS))
    best, where = tl.reduce((tile, at), AXIS, larger)
    tl.store(y + 5 * size + k, best)
    tl.store(y + 6 * size + k, where)
    tl.store(y + 7 * size + k, tl.reduce(tile > 0, AXIS, both).to(tl.int32))
    tl.store(y + 8 * size + k, tl.reduce(tile > 0, AXIS, either).to(tl.int32))
    tl.store(y + 9 * size + k, tl.sum(tile, AXIS))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(8, 64), (2, 4), (64, 1)], ids=str)
def test_reductions_combine_one_or_several_operands_by_any_region(shape, axis):
    x = integers(*shape, low=-4, high=5)
    y = torch.empty(10, shape[1 - axis], dtype=torch.int32)
    launch(fold_kernel, x=x, y=y, M=shape[0], N=shape[1], AXIS=axis)
    first = [(x == fold(axis, keepdim=True)).int().argmax(axis).int() for fold in (x.amax, x.amin)]
    xor = torch.zeros(shape[1 - axis], dtype=torch.int32)
    for part in x.unbind(axis):
        xor ^= part
    positive = x > 0
    expected = [*first, xor, x.amax(axis), x.amin(axis), x.amax(axis), first[0], positive.all(axis).int()]
    expected += [positive.any(axis).int(), x.sum(axis).int()]
    assert torch.equal(y, torch.stack(expected))


@triton.jit
def nan_kernel(x, y, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, N))
    tl.store(y, tl.max(v, 0))
    tl.store(y + 1, tl.min(v, 0))


@pytest.mark.parametrize("n", [1, 8, 64])
def test_the_largest_of_nothing_but_nan_is_nan_and_else_a_number(n):
    x, y = torch.full((n,), torch.nan), torch.empty(2)
    launch(nan_kernel, x=x, y=y, N=n)
    assert y.isnan().all()
    x[n // 2] = -torch.inf
    launch(nan_kernel, x=x, y=y, N=n)
    assert (y == -torch.inf).all()


@triton.jit
def decay(state, factor, other, other_factor):
    # the composition of x -> factor * x + state: associative, not commutative
    return other_factor * state + other, factor * other_factor


@triton.jit
def scan_kernel(x, y, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.cumsum(tile, AXIS, reverse=REVERSE))
    state, _ = tl.associative_scan((tile, tl.full([M, N], 0.5, tl.float32)), AXIS, decay, reverse=REVERSE)
    tl.store(y + M * N + at, state)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans_run_along_either_axis_either_way(axis, reverse):
    x = integers(8, 32).float()
    y = torch.empty(2, 8, 32)
    launch(scan_kernel, x=x, y=y, M=8, N=32, AXIS=axis, REVERSE=reverse)
    turned = x.flip(axis) if reverse else x
    state, rows = torch.zeros_like(x.select(axis, 0)), []
    for row in turned.unbind(axis):
        state = state * 0.5 + row
        rows.append(state)
    expected = torch.stack([turned.cumsum(axis), torch.stack(rows, axis)])
    torch.testing.assert_close(y, expected.flip(axis + 1) if reverse else expected)


# ---- integers


@triton.jit
def unsigned_kernel(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    p, q = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, (p // q).to(tl.int64))
    tl.store(y + N + i, (p % q).to(tl.int64))
    tl.store(y + 2 * N + i, (p >> 3).to(tl.int64))
    tl.store(y + 3 * N + i, tl.maximum(p, q).to(tl.int64) - tl.minimum(p, q).to(tl.int64))
    tl.store(y + 4 * N + i, (p < q).to(tl.int64) + (p >= q).to(tl.int64) * 2)
    tl.store(y + 5 * N + i, (p.to(tl.float32) * 0.25).to(p.dtype).to(tl.int64))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_unsigned_integers_divide_shift_compare_and_convert_without_sign(bits):
    dtype = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[bits]
    top = 2**bits
    values = torch.tensor([1, 2, 3, 7, top // 2 - 1, top // 2, top - 2, top - 1])
    a, b = values.repeat_interleave(8), values.repeat(8)
    y = torch.empty(6, 64, dtype=torch.int64)
    launch(unsigned_kernel, a=a.to(dtype), b=b.to(dtype), y=y, N=64)
    quarter = (a.float() * 0.25).long()
    expected = [a // b, a % b, a >> 3, (a - b).abs(), (a < b).long() + 2 * (a >= b).long(), quarter]
    assert torch.equal(y, torch.stack(expected))


@triton.jit
def count_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(y + i, tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1))
    tl.store(y + N + i, libdevice.popc(v))
    v = v - ((v.to(tl.uint32, bitcast=True) >> 1).to(tl.int32, bitcast=True) & 0x55555555)
    v = (v & 0x33333333) + ((v.to(tl.uint32, bitcast=True) >> 2).to(tl.int32, bitcast=True) & 0x33333333)
    v = (v + (v.to(tl.uint32, bitcast=True) >> 4).to(tl.int32, bitcast=True)) & 0x0F0F0F0F
    tl.store(y + 2 * N + i, ((v * 0x01010101).to(tl.uint32, bitcast=True) >> 24).to(tl.int32, bitcast=True))


def test_bits_are_counted_however_that_is_spelled():
    x = torch.cat([integers(60, low=-(2**31), high=2**31 - 1), torch.tensor([0, -1, -(2**31), 1], dtype=torch.int32)])
    y = torch.empty(3, 64, dtype=torch.int32)
    launch(count_kernel, x=x, y=y, N=64)
    assert y.tolist() == [[(v % 2**32).bit_count() for v in x.tolist()]] * 3


@triton.jit
def foreign_kernel(x, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(x + i, tl.inline_asm_elementwise("brev.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1))


def test_other_inline_assembly_is_not_covered():
    with pytest.raises(Unsupported, match=r"inline_asm at test_coverage\.py:\d+: foreign code 'brev"):
        launch(foreign_kernel, x=integers(16), N=16)


@triton.jit
def bool_kernel(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    p, q = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, (p & q) | (p ^ q))
    tl.store(y + N + i, ~p)
    tl.store(y + 2 * N + i, p > q)
    tl.store(y + 3 * N + i, tl.where(p, q, p))
    tl.store(y + 4 * N + i, (p.to(tl.int32) + q.to(tl.float32)) == 1)


def test_booleans_are_bytes_in_memory_and_masks_in_the_kernel():
    a, b = torch.tensor([0, 0, 1, 1] * 8).bool(), torch.tensor([0, 1] * 16).bool()
    y = torch.empty(5, 32, dtype=torch.bool)
    launch(bool_kernel, a=a, b=b, y=y, N=32)
    assert torch.equal(y, torch.stack([a | b, ~a, a & ~b, a & b, a ^ b]))


# ---- 16-bit floats


@triton.jit
def half_kernel(a, b, c, y, N: tl.constexpr):
    i = tl.arange(0, N)
    p, q = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, p + q)
    tl.store(y + N + i, p * q)
    tl.store(y + 2 * N + i, p / q)
    tl.store(y + 3 * N + i, tl.load(c + i).to(y.dtype.element_ty))
    tl.store(y + 4 * N + i, tl.maximum(p - q, 0.0))
    tl.store(y + 5 * N + i, p.to(tl.int32).to(y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_after_each_operation(dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(1024) * 10).to(dtype), torch.randn(1024).to(dtype)
    c = torch.randn(1024) * 10.0 ** torch.linspace(-9, 5, 1024)
    y = torch.empty(6, 1024, dtype=dtype)
    launch(half_kernel, a=a, b=b, c=c, y=y, N=1024)
    quotient = (a.float() / b.float()).to(dtype)
    expected = [a + b, a * b, quotient, c.to(dtype), (a - b).clamp(min=0), a.int().to(dtype)]
    torch.testing.assert_close(y, torch.stack(expected), rtol=0, atol=0)


@triton.jit
def move_kernel(x, y, n, other, N: tl.constexpr, CONSTANT: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=3.0 if CONSTANT else other))
    tl.store(y + N + i, tl.load(x + i, mask=i < n, other=0.0))
    tl.store(y + 2 * N + i, tl.load(x + i // N))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_is_only_moved_keeps_its_bits(dtype, constant):
    x = torch.randn(64).to(dtype)
    x[3] = torch.nan
    y = torch.empty(3, 64, dtype=dtype)
    launch(move_kernel, x=x, y=y, n=37, other=3.0, N=64, CONSTANT=constant)
    here = torch.arange(64) < 37
    expected = [torch.where(here, x, 3.0), torch.where(here, x, 0.0), x[:1].expand(64)]
    torch.testing.assert_close(y, torch.stack(expected), rtol=0, atol=0, equal_nan=True)


@triton.jit
def product_kernel(a, b, c, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, T_A: tl.constexpr, T_B: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.trans(tl.load(a + k[:, None] * M + i[None, :])) if T_A else tl.load(a + i[:, None] * K + k[None, :])
    right = tl.trans(tl.load(b + j[:, None] * K + k[None, :])) if T_B else tl.load(b + k[:, None] * N + j[None, :])
    acc = tl.load(c + i[:, None] * N + j[None, :])
    out = tl.dot(left, right, acc, input_precision="tf32", out_dtype=acc.dtype)
    tl.store(y + i[:, None] * N + j[None, :], out + 1)


@pytest.mark.parametrize("t_a", [False, True])
@pytest.mark.parametrize("t_b", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_products_of_every_type_with_either_side_transposed(dtype, t_a, t_b):
    m, n, k = 32, 16, 64
    a, b = (integers(*shape, low=-128, high=128, dtype=torch.int64) for shape in ((m, k), (k, n)))
    if dtype.is_floating_point:
        a, b = a / 64, b / 64
    a, b = a.to(dtype), b.to(dtype)
    c = integers(m, n, low=-99, high=99).to(torch.int32 if dtype == torch.int8 else torch.float32)
    y = torch.empty_like(c)
    launch(product_kernel, a=a.t().contiguous() if t_a else a, b=b.t().contiguous() if t_b else b, c=c, y=y, M=m, N=n,
           K=k, T_A=t_a, T_B=t_b)  # fmt: skip
    expected = a.double() @ b.double() + c.double() + 1
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=0 if dtype == torch.int8 else 1e-4)


@triton.jit
def batch_kernel(a, b, y, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    h, i, j, k = tl.arange(0, B), tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(a + (h[:, None, None] * M + i[None, :, None]) * K + k[None, None, :])
    right = tl.load(b + (h[:, None, None] * N + j[None, :, None]) * K + k[None, None, :])
    out = tl.dot(left, tl.permute(right, [0, 2, 1]), input_precision="ieee")
    tl.store(y + (h[:, None, None] * M + i[None, :, None]) * N + j[None, None, :], out * 2.0)


def test_products_of_a_batch_of_tiles():
    torch.manual_seed(0)
    a, b, y = torch.randn(4, 16, 32), torch.randn(4, 16, 32), torch.empty(4, 16, 16)
    launch(batch_kernel, a=a, b=b, y=y, B=4, M=16, N=16, K=32)
    torch.testing.assert_close(y, (2 * a.double() @ b.double().mT).float(), rtol=1e-5, atol=1e-5)


# ---- control flow and randomness


@triton.jit
def collatz_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    steps = tl.zeros([N], tl.int32)
    rounds = 0
    while tl.max(v, 0) > 1:
        odd = v % 2 == 1
        active = v > 1
        v = tl.where(active, tl.where(odd, 3 * v + 1, v // 2), v)
        steps += active.to(tl.int32)
        rounds += 1
    tl.store(y + i, steps)
    tl.store(y + N, rounds)


def test_a_while_loop_ends_when_its_condition_does():
    def collatz(v):
        return 0 if v <= 1 else 1 + collatz(v // 2 if v % 2 == 0 else 3 * v + 1)

    x = torch.arange(1, 33, dtype=torch.int32)
    y = torch.empty(33, dtype=torch.int32)
    launch(collatz_kernel, x=x, y=y, N=32)
    steps = [collatz(v) for v in x.tolist()]
    assert y.tolist() == [*steps, max(steps)]


@triton.jit
def rand_kernel(y, seed, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.rand(seed, i))
    tl.store(y + 4 * N + i, (tl.randint(seed, i) & 0xFFFFFF).to(tl.float32))


def philox(seed, counter):
    """The first word of Philox 4x32-10 (Salmon et al. 2011, section 2 and table 2), of which tl.rand makes numbers."""
    keys, words = [seed % 2**32, seed >> 32], [counter, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(b >> 32) ^ words[1] ^ keys[0], b % 2**32, (a >> 32) ^ words[3] ^ keys[1], a % 2**32]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words[0]


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 7])
def test_random_numbers_are_those_of_philox(seed):
    y = torch.empty(8 * 64)
    launch(rand_kernel, (4,), y=y, seed=seed, N=64)
    words = torch.tensor([philox(seed, i) for i in range(256)])
    signed = torch.where(words < 2**31, words, words - 2**32)
    torch.testing.assert_close(y[:256], torch.where(signed < 0, -signed - 1, signed) / 2**31, rtol=2e-7, atol=0)
    assert torch.equal(y[256:], (words & 0xFFFFFF).float())


@triton.jit
def pointer_kernel(x, N: tl.constexpr):
    p = x + tl.arange(0, N)
    for _ in range(3):
        tl.store(p, tl.load(p) + 1)
        p += 1


def test_a_tile_of_pointers_carried_through_a_loop_is_a_named_error():
    with pytest.raises(Unsupported, match=r"scf\.for at test_coverage\.py:\d+: a tile of pointers"):
        launch(pointer_kernel, x=torch.zeros(32), N=16)
