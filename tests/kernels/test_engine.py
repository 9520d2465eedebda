"""The CPU engine gives what Triton's language means, or says by name what it doesn't cover."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.cpu.build import find_compiler
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch, run

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")


def launch(kernel, grid, **args):
    run([Launch(kernel, grid, args, Config())])


@triton.jit
def copy_kernel(x, y, n, stride, other, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets * stride, mask=offsets < n, other=other), mask=offsets < n + 2)


@needs_compiler
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("stride", [1, 3])
def test_masked_lanes_take_other_and_nothing_beyond_the_mask_is_written(n, stride):
    x = torch.arange(1.0, 1 + n * stride)
    y = torch.full((n + 300,), -1.0)
    launch(copy_kernel, (triton.cdiv(n + 2, 64),), x=x, y=y, n=n, stride=stride, other=7.0, BLOCK=64)
    assert torch.equal(y[:n], x[::stride])
    assert torch.equal(y[n : n + 2], torch.full((2,), 7.0))
    assert (y[n + 2 :] == -1).all()


@triton.jit
def unary_kernel(x, y, KIND: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    if KIND == "exp":
        v = tl.exp(v)
    elif KIND == "exp2":
        v = tl.exp2(v)
    elif KIND == "log":
        v = tl.log(v)
    elif KIND == "log2":
        v = tl.log2(v)
    elif KIND == "sqrt":
        v = tl.sqrt(v)
    elif KIND == "rsqrt":
        v = tl.rsqrt(v)
    elif KIND == "abs":
        v = tl.abs(v)
    tl.store(y + offsets, v)


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.5, 89.0, 127.9, 128.0, 200.0, 1e30]
SMALL = [-87.0, -88.0, -100.0, -126.5, -140.0, -149.0, -151.0, -1e30, 1e-30, 1e-40]


@needs_compiler
@pytest.mark.parametrize("kind", ["exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs"])
def test_functions_agree_with_torch_also_on_infinities_nan_and_the_smallest_numbers(kind):
    x = torch.cat([torch.tensor(SPECIAL + SMALL), torch.linspace(-20, 20, 512 - len(SPECIAL + SMALL))])
    y = torch.empty_like(x)
    launch(unary_kernel, (1,), x=x, y=y, KIND=kind, BLOCK=512)
    exact = getattr(torch, kind)(x.double())
    expected = exact.float()
    assert torch.equal(y.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(y[expected.isinf()], expected[expected.isinf()])
    # 3e-7 is 5 units in the last place; numbers below 2^-126 have fewer places
    assert ((y - exact).abs() <= 3e-7 * exact.abs() + 1.5e-45)[finite].all()


@triton.jit
def minmax_kernel(a, b, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p, q = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, tl.maximum(p, q))
    tl.store(y + BLOCK + i, tl.minimum(p, q))
    tl.store(y + 2 * BLOCK + i, tl.maximum(p, q, propagate_nan=tl.PropagateNan.ALL))
    tl.store(y + 3 * BLOCK + i, tl.minimum(p, q, propagate_nan=tl.PropagateNan.ALL))


@needs_compiler
def test_maximum_and_minimum_drop_or_keep_nan_as_asked():
    values = torch.tensor([1.0, -2.0, math.nan, math.inf])
    a, b = values.repeat_interleave(4), values.repeat(4)
    y = torch.empty(4, 16)
    launch(minmax_kernel, (1,), a=a, b=b, y=y, BLOCK=16)
    expected = torch.stack([torch.fmax(a, b), torch.fmin(a, b), torch.maximum(a, b), torch.minimum(a, b)])
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=0, atol=0)


@triton.jit
def compare_kernel(a, b, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p, q = tl.load(a + i), tl.load(b + i)
    bits = (p < q).to(tl.int32) + (p <= q).to(tl.int32) * 2 + (p == q).to(tl.int32) * 4 + (p != q).to(tl.int32) * 8
    bits += (p > q).to(tl.int32) * 16 + (p >= q).to(tl.int32) * 32 + (~(p < q)).to(tl.int32) * 64
    tl.store(y + i, bits)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_comparisons_agree_with_torch(dtype):
    values = torch.tensor([1.0, -2.0, math.nan, math.inf] if dtype.is_floating_point else [1, -2, 0, 2**31 - 1])
    a, b = values.to(dtype).repeat_interleave(4), values.to(dtype).repeat(4)
    y = torch.empty(16, dtype=torch.int32)
    launch(compare_kernel, (1,), a=a, b=b, y=y, BLOCK=16)
    parts = [a < b, a <= b, a == b, a != b, a > b, a >= b, ~(a < b)]
    assert torch.equal(y, sum(part.int() << at for at, part in enumerate(parts)))


@triton.jit
def integer_kernel(a, b, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p, q = tl.load(a + i), tl.load(b + i)
    tl.store(y + i, p // q)
    tl.store(y + BLOCK + i, p % q)
    tl.store(y + 2 * BLOCK + i, (p & q) | (p ^ 5))
    tl.store(y + 3 * BLOCK + i, (p << 3) + (p >> 2))
    tl.store(y + 4 * BLOCK + i, tl.maximum(p, q) - tl.minimum(p, q))
    tl.store(y + 5 * BLOCK + i, tl.where(p > q, p, q).to(tl.float32).to(p.dtype))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_divide_towards_zero_and_shift_with_their_sign(dtype):
    torch.manual_seed(0)
    a = torch.randint(-1000, 1000, (64,), dtype=dtype)
    b = torch.randint(1, 50, (64,), dtype=dtype) * torch.tensor([1, -1], dtype=dtype).repeat(32)
    y = torch.empty(6, 64, dtype=dtype)
    launch(integer_kernel, (1,), a=a, b=b, y=y, BLOCK=64)
    expected = [a.div(b, rounding_mode="trunc"), torch.fmod(a, b), (a & b) | (a ^ 5), (a << 3) + (a >> 2)]
    assert torch.equal(y, torch.stack([*expected, torch.maximum(a, b) - torch.minimum(a, b), torch.maximum(a, b)]))


@triton.jit
def reduce_kernel(x, rows, columns, everything, M: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + j[None, :])  # [M, N]
    if KIND == "sum":
        r, c = tl.sum(tile, 1), tl.sum(tile, 0)
        e = tl.sum(c, 0)
    elif KIND == "max":
        r, c = tl.max(tile, 1), tl.max(tile, 0)
        e = tl.max(c, 0)
    else:
        r, c = tl.min(tile, 1), tl.min(tile, 0)
        e = tl.min(r, 0)
    tl.store(rows + i, r)
    tl.store(columns + j, c)
    tl.store(everything, e)


@needs_compiler
@pytest.mark.parametrize("shape", [(8, 64), (1, 16), (16, 1), (32, 2)], ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("sum", torch.float32), ("max", torch.float32), ("sum", torch.int32), ("min", torch.int32)]
)
def test_reductions_along_either_axis(shape, kind, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape) if dtype.is_floating_point else torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype)
    x = x if kind != "sum" or dtype.is_floating_point else x // 2**16
    rows, columns, everything = (torch.empty(n, dtype=dtype) for n in (shape[0], shape[1], 1))
    launch(reduce_kernel, (1,), x=x, rows=rows, columns=columns, everything=everything, M=shape[0], N=shape[1],
           KIND=kind)  # fmt: skip
    fold = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[kind]
    torch.testing.assert_close(rows, fold(x, 1).to(dtype))
    torch.testing.assert_close(columns, fold(x, 0).to(dtype))
    torch.testing.assert_close(everything[0], fold(x).to(dtype))


@triton.jit
def dot_kernel(a, b, c, y, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, T_A: tl.constexpr, T_B: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.trans(tl.load(a + k[:, None] * M + i[None, :])) if T_A else tl.load(a + i[:, None] * K + k[None, :])
    right = tl.trans(tl.load(b + j[:, None] * K + k[None, :])) if T_B else tl.load(b + k[:, None] * N + j[None, :])
    acc = tl.load(c + i[:, None] * N + j[None, :])
    out = tl.dot(left, right, acc * 2.0, input_precision="ieee")
    tl.store(y + i[:, None] * N + j[None, :], tl.where(out > 0, out, out * 0.5) + 1.0)


@needs_compiler
@pytest.mark.parametrize("t_a", [False, True])
@pytest.mark.parametrize("t_b", [False, True])
@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 32, 16), (16, 128, 64)], ids=str)
def test_products_with_either_side_transposed_a_start_and_a_tail(shape, t_a, t_b):
    m, n, k = shape
    torch.manual_seed(0)
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    y = torch.full((m, n), math.nan)
    launch(dot_kernel, (1,), a=a.t().contiguous() if t_a else a, b=b.t().contiguous() if t_b else b, c=c, y=y, M=m, N=n,
           K=k, T_A=t_a, T_B=t_b)  # fmt: skip
    exact = a.double() @ b.double() + 2 * c.double()
    torch.testing.assert_close(y, (torch.where(exact > 0, exact, exact / 2) + 1).float(), rtol=2e-6, atol=2e-5)


@triton.jit
def carried_kernel(y, n, BLOCK: tl.constexpr):
    # values that change places: no order of plain assignments is right
    i = tl.arange(0, BLOCK)
    a, b, total, count = i, i * 10, i * 0, 0
    for step in range(n):
        a, b = b, a + 1
        total += a
        count += step
    tl.store(y + i, a)
    tl.store(y + BLOCK + i, b)
    tl.store(y + 2 * BLOCK + i, total + count)


@needs_compiler
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_loop_carried_values_are_assigned_at_once(n):
    y = torch.empty(3, 16, dtype=torch.int32)
    launch(carried_kernel, (1,), y=y, n=n, BLOCK=16)
    i = torch.arange(16, dtype=torch.int32)
    a, b, total = i, i * 10, i * 0
    for _ in range(n):
        a, b = b, a + 1
        total = total + a
    assert torch.equal(y, torch.stack([a, b, total + n * (n - 1) // 2]))


@triton.jit
def float_carried_kernel(x, y, n, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    old = tl.load(x + i[:, None] * N + j[None, :])
    outer = old * 0.0
    for _ in range(n):
        inner = old  # the inner loop starts from a value of the outer one each time
        for _ in range(2):
            new = tl.exp(-inner * inner)
            inner = new + tl.sum(inner, 1)[:, None] * 0.25  # reads the old value across its row
        outer = outer + inner
    tl.store(y + i[:, None] * N + j[None, :], outer)


@needs_compiler
@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_carried_tile_keeps_its_old_value_as_long_as_it_is_read(n):
    torch.manual_seed(0)
    x, y = torch.randn(8, 32), torch.empty(8, 32)
    launch(float_carried_kernel, (1,), x=x, y=y, n=n, M=8, N=32)
    inner = x.double()
    for _ in range(2):
        inner = torch.exp(-inner * inner) + inner.sum(1, keepdim=True) * 0.25
    torch.testing.assert_close(y, (inner * n).float(), rtol=1e-5, atol=1e-5)


@triton.jit
def branch_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    pid = tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.program_id(2)
    if pid % 2 == 0:
        w = v * 2.0
        scale = 3.0
    else:
        w = v - 1.0
        scale = 1.0
    tl.store(y + pid * BLOCK + i, w * scale + tl.num_programs(1))


@needs_compiler
def test_branches_and_the_numbers_of_programs_on_three_axes():
    x, y = torch.randn(32), torch.full((300, 32), math.nan)
    launch(branch_kernel, (3, 2, 2), x=x, y=y, BLOCK=32)
    for p in (100 * c + 10 * b + a for a in range(3) for b in range(2) for c in range(2)):
        torch.testing.assert_close(y[p], (x * 6 if p % 2 == 0 else x - 1) + 2, rtol=0, atol=1e-6)
    assert int((~y.isnan()).all(1).sum()) == 12


@triton.jit
def overlap_kernel(x, BLOCK: tl.constexpr):
    # loads come before the store, though the store overwrites what later lanes load
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(x + i + 1, v)
    tl.store(x + i, tl.load(x + i) + 100.0)


@needs_compiler
def test_memory_is_read_and_written_in_program_order():
    x = torch.arange(129.0)
    launch(overlap_kernel, (1,), x=x, BLOCK=128)
    assert torch.equal(x, torch.cat([torch.tensor([100.0]), torch.arange(127.0) + 100, torch.tensor([127.0])]))


@triton.jit
def atomic_kernel(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def early_return_kernel(x, n, BLOCK: tl.constexpr):
    if n > 3:
        return
    tl.store(x + tl.arange(0, BLOCK), 1.0)


@needs_compiler
def test_what_is_not_covered_is_an_error_that_names_the_operation_and_the_line():
    x = torch.zeros(16)
    with pytest.raises(Unsupported, match=r"tt\.atomic_rmw at test_engine\.py:\d+"):
        launch(atomic_kernel, (1,), x=x, BLOCK=16)
    with pytest.raises(Unsupported, match=r"cf\.cond_br at test_engine\.py:\d+"):
        launch(early_return_kernel, (1,), x=x, n=2, BLOCK=16)
    with pytest.raises(Unsupported, match="f64"):
        launch(copy_kernel, (1,), x=x.double(), y=x.double(), n=16, stride=1, other=0.0, BLOCK=16)
    assert (x == 0).all()


@triton.jit
def square_kernel(x, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tile = tl.load(x + at)
    tl.store(x + at, tile / tl.sum(tile, 1)[:, None])


@needs_compiler
def test_tiles_that_no_stack_holds_are_an_error_and_not_a_crash():
    x = torch.ones(512, 512)
    launch(square_kernel, (1,), x=x, N=512)
    assert (x == 1 / 512).all()
    with pytest.raises(Unsupported, match=r"the tiles of square_kernel take 4\d\d\d KiB, more than 2048"):
        launch(square_kernel, (1,), x=torch.ones(1024, 1024), N=1024)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_program_runs_once_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y = torch.randn(64 * 1000), torch.zeros(64 * 1000 + 2)
        launch(copy_kernel, (1000,), x=x, y=y, n=64 * 1000, stride=1, other=0.0, BLOCK=64)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y[:-2], x)
