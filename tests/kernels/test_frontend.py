"""Triton's front end, used without a GPU: its IR as text, or an error that names this Triton."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import triton
import triton.compiler.compiler
import triton.language as tl

from fastattn.kernels.cpu.frontend import TESTED, ttir
from fastattn.kernels.errors import Unsupported


@triton.jit
def product_kernel(x, y, n, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)[:, None]
    tile = tl.load(x + j * n + i[None, :])
    tl.store(y + j * BLOCK + i[None, :], tl.dot(tile, tile, input_precision="ieee"))


@triton.jit
def wrong_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def product_ir(block: int = 16) -> str:
    return ttir(product_kernel, {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": block})


def test_the_ir_holds_the_arguments_the_constants_and_the_lines_of_the_source():
    text = product_ir(32)
    assert "@product_kernel(%x: !tt.ptr<f32>" in text
    assert "tensor<32x32xf32> * tensor<32x32xf32> -> tensor<32x32xf32>" in text
    assert f'test_frontend.py":{product_kernel.starting_line_number + 3}:' in text


def test_several_threads_get_what_one_gets():
    alone = {block: product_ir(block) for block in (16, 32, 64)}
    with ThreadPoolExecutor(4) as pool:
        for block, text in pool.map(lambda block: (block, product_ir(block)), [16, 32, 64] * 4):
            assert text == alone[block]


@pytest.mark.parametrize("arch", ["sm90", "gfx942"])
def test_an_architecture_in_the_environment_changes_nothing(monkeypatch, arch):
    text = product_ir()
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", arch)
    assert product_ir() == text


def test_a_newer_triton_that_works_as_before_is_used(monkeypatch):
    text = product_ir()
    monkeypatch.setattr(triton, "__version__", "99.1.0")
    assert product_ir() == text


def test_a_newer_triton_whose_internals_moved_is_named(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "99.1.0")
    monkeypatch.delattr(triton.compiler.compiler, "make_backend")
    with pytest.raises(Unsupported, match=r"product_kernel from Triton 99\.1\.0.*make_backend"):
        product_ir()


@pytest.mark.parametrize(("version", "error"), [(f"{TESTED[-1]}.0", triton.CompilationError), ("99.1.0", Unsupported)])
def test_a_kernel_that_triton_refuses_is_an_error_of_the_kernel_where_triton_is_known(monkeypatch, version, error):
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.raises(error, match="power of 2"):
        ttir(wrong_kernel, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 17})
