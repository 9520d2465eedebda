"""Compiling for GPUs that are not here: what is read from the binaries, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastattn.kernels.ahead import Compiled, compile_ahead, shared_memory_limit
from fastattn.kernels.config import Config


@pytest.fixture(autouse=True, scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, n, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, SIZE)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, n, BLOCK):
        a = tl.load(a_ptr + rows[:, None] * n + start + columns[None, :])  # [SIZE, BLOCK]
        b = tl.load(b_ptr + (start + columns)[:, None] * SIZE + rows[None, :])  # [BLOCK, SIZE]
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * SIZE + rows[None, :], total)


@triton.jit
def asserting_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0.0, "x must be positive")


def compile_product(target: str = "cuda:80", dtype: str = "fp16", size: int = 64, warps: int = 4) -> Compiled:
    types = {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "c_ptr": "*fp32", "n": "i32"}
    return compile_ahead(product_kernel, types, {"SIZE": size}, target, Config({"BLOCK": 64}, warps, 2))


class TestTheReport:
    def test_of_an_nvidia_binary(self) -> None:
        compiled = compile_product()
        assert compiled.name == "product_kernel"
        assert compiled.binary.startswith(b"\x7fELF")
        assert ".target sm_80" in compiled.asm["ptx"]
        assert compiled.registers is not None and 16 < compiled.registers <= 255
        assert compiled.spill_bytes == 0
        assert 2 * 64 * 64 * 2 <= compiled.shared_bytes <= 4 * 64 * 64 * 2
        assert compiled.sass is not None and "HMMA" in compiled.sass
        # 64 x 64 x 64 over 4 warps, 16 x 8 x 16 an instruction
        assert compiled.tensor_core_instructions == {"HMMA": 32}
        assert 100 < compiled.instructions.total() < 2000
        assert compiled.scratch_bytes == 0

    def test_of_an_amd_binary(self) -> None:
        compiled = compile_product("hip:gfx942")
        assert "gfx942" in compiled.asm["amdgcn"]
        assert compiled.sass is None
        assert compiled.registers is not None and 16 < compiled.registers <= 512
        assert compiled.spill_bytes == 0
        assert set(compiled.tensor_core_instructions) == {"v_mfma_f32_32x32x8_f16"}
        assert compiled.instructions["s_endpgm"] == 1

    @pytest.mark.parametrize(("target", "size"), [("cuda:80", 128), ("hip:gfx942", 256)])
    def test_tells_when_registers_spill(self, target: str, size: int) -> None:
        spilled = compile_product(target, size=size, warps=2).spill_bytes
        assert spilled is not None and spilled > 0

    def test_tells_when_tensor_cores_are_not_used(self) -> None:
        compiled = compile_product(dtype="fp32", size=16)
        assert not compiled.tensor_core_instructions
        assert compiled.instructions["FFMA"] > 0

    def test_needs_no_file_beside_tritons_cache(self, triton_cache: Path) -> None:
        compile_product()
        assert any(triton_cache.rglob("*.cubin"))


class TestRefuses:
    @pytest.mark.parametrize("target", ["h100", "cuda", "cuda:sm_90", "hip:90", "cpu", ""])
    def test_an_unknown_target(self, target: str) -> None:
        with pytest.raises(ValueError, match="target must"):
            compile_product(target)
        with pytest.raises(ValueError, match="target must"):
            shared_memory_limit(target)

    def test_an_argument_without_a_type(self) -> None:
        types = {"a_ptr": "*fp16", "c_ptr": "*fp32"}
        with pytest.raises(ValueError, match=r"a type for \['b_ptr', 'n'\]"):
            compile_ahead(product_kernel, types, {"SIZE": 16}, "cuda:80", Config({"BLOCK": 16}))

    def test_an_argument_that_the_kernel_does_not_have(self) -> None:
        types = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32", "n": "i32"}
        with pytest.raises(ValueError, match=r"got also \['WIDTH'\]"):
            compile_ahead(product_kernel, types, {"SIZE": 16, "WIDTH": 1}, "cuda:80", Config({"BLOCK": 16}))


@pytest.mark.parametrize("debug", [False, True])
def test_assertions_are_in_the_binary_of_a_kernel_that_is_to_be_debugged(debug: bool) -> None:
    kernel = triton.jit(debug=debug)(asserting_kernel.fn)
    compiled = compile_ahead(kernel, {"x_ptr": "*fp32"}, {}, "cuda:80", Config({}, 1, 1))
    assert ("__assertfail" in compiled.asm["ptx"]) == debug
