"""Cubins are what the launcher takes them for, are compiled once, and say by name what can't be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn.export.ort import cubins, cuda_kernels
from fastattn.export.ort.variants import Variant
from fastattn.kernels.ahead import Compiled
from fastattn.kernels.config import Config
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch

PTX = """
.extern .func __assertfail (.param .b64 __assertfail_param_0);
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .f32 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3,
	.param .u64 .ptr .global .align 1 kernel_param_4
)
.reqntid 128
"""
TYPES = ["*fp16", "i32", "fp32"]


def compiled(**changes: object) -> Compiled:
    fields = {
        "target": "cuda:80", "name": "kernel", "binary": b"", "asm": {"ptx": PTX}, "shared_bytes": 163 * 1024,
        "num_warps": 4, "registers": 32, "spill_bytes": 0, "scratch_bytes": 0,
    }  # fmt: skip
    return Compiled(**(fields | changes))  # pyright: ignore[reportArgumentType]


def examples() -> list[Variant]:
    """Of small kernels, quick to compile."""
    return [Variant(*example) for example in cuda_kernels.examples()]


def broken() -> Variant:
    """A kernel that no GPU can run: a tile of more elements than Triton allows."""
    narrow = dict(cuda_kernels.examples())["narrow"]
    return Variant("narrow", replace(narrow, config=Config({"BLOCK": 2**22}, 4, 1)))


class TestABinaryIsRefused:
    def test_not_where_all_is_as_the_launcher_has_it(self) -> None:
        cubins.check(compiled(), TYPES)

    @pytest.mark.parametrize("types", [TYPES[:2], [*TYPES, "i32"], ["*fp16", "i64", "fp32"], ["i32", "*fp16", "fp32"]])
    def test_with_other_parameters(self, types: list[str]) -> None:
        with pytest.raises(ValueError, match=r"kernel must take parameters \[.*\], got \['u64', 'u32', 'f32', 'u64'"):
            cubins.check(compiled(), types)

    def test_with_a_type_that_the_launcher_does_not_know(self) -> None:
        with pytest.raises(ValueError, match="no fp64"):
            cubins.check(compiled(), ["*fp16", "i32", "fp64"])

    def test_without_an_entry_of_its_name(self) -> None:
        with pytest.raises(ValueError, match=r"got \[\]"):
            cubins.check(compiled(name="other"), TYPES)

    def test_with_more_shared_memory_than_there_is(self) -> None:
        with pytest.raises(ValueError, match="166913 bytes of shared memory, more than 166912"):
            cubins.check(compiled(shared_bytes=163 * 1024 + 1), TYPES)

    def test_with_a_wish_for_scratch_memory(self) -> None:
        with pytest.raises(ValueError, match="128 bytes of scratch memory"):
            cubins.check(compiled(scratch_bytes=128), TYPES)


class TestWhatIsTakenToDivideBy16:
    @staticmethod
    def of(head_dim: int) -> tuple[str, ...]:
        from fastattn.export.ort import needs

        call = needs.Call("BlockAttention", torch.float16, head_dim, head_dim, torch.float16)
        return cubins.multiples_of_16(needs.variants([call], "cuda:80")[0])

    def test_is_every_address_and_each_stride_of_whole_rows(self) -> None:
        strides = [f"{name}_stride_{axis}" for name in "qkv" for axis in "bhn"]
        pointers = ["q_ptr", "k_ptr", "v_ptr", "q_index_ptr", "k_index_ptr", "out_ptr", "lse_ptr"]
        assert self.of(32) == (*pointers, *strides)

    def test_is_no_stride_of_odd_rows(self) -> None:
        assert not [name for name in self.of(40) if "stride" in name]

    @pytest.mark.parametrize("head_dim", [14, 64])
    def test_is_no_stride_of_directions_which_are_two_numbers_longer(self, head_dim: int) -> None:
        from fastattn.export.ort import needs

        variants = needs.variants([needs.Call("SmyrfHash", torch.float16, head_dim)], "cuda:80")
        assert [variant.kernel for variant in variants] == ["smyrf_hash_project", "smyrf_hash_lift"]
        for variant in variants:
            assert "directions_ptr" in cubins.multiples_of_16(variant)
            assert "directions_stride_r" not in cubins.multiples_of_16(variant)


class TestObjects:
    def test_are_compiled_once_and_one_that_fails_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
        said: list[str] = []
        named = r"1 kernels for GPUs can't be compiled: narrow\(.*BLOCK=4194304\) for sm_80: \w+Error"
        with pytest.raises(Unsupported, match=named):
            cubins.objects({"cuda:80": [broken()]}, workers=1, on_built=said.append)
        assert said == [f"{variant.described()} for sm_80" for variant in examples()]
        assert len(cubins.objects({"cuda:80": []}, on_built=said.append)) == len(said) == len(examples())

    def test_of_another_compiler_or_architecture_are_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        variant = examples()[0]
        names = {cubins.recipe(variant, target).file_name() for target in ("cuda:80", "cuda:86", "cuda:90")}
        monkeypatch.setattr(cubins, "machine_compiler", lambda arch: "ptxas 1.0")
        names.add(cubins.recipe(variant, "cuda:80").file_name())
        assert len(names) == 4


class TestTables:
    def test_of_nothing_are_empty(self) -> None:
        text = cubins.tables({})
        assert "kTargets[] = {{}};" in text and "kTargetCount = 0;" in text

    def test_say_which_cubins_run_on_no_successor(self) -> None:
        text = cubins.tables({"cuda:80": [], "cuda:90": []})
        assert "kTargets[] = {{8, 0, false, sm_80_variants, 7}, {9, 0, true, sm_90_variants, 7}};" in text


@pytest.mark.parametrize("name", ["sm_75", "90", "cuda:90", ""])
def test_an_unknown_architecture_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"architecture must be one of sm_80, .*, got '{name}'"):
        cubins.target_of(name)


def test_a_known_architecture_is_a_target() -> None:
    assert [cubins.target_of(name) for name in ("sm_80", "sm_120")] == ["cuda:80", "cuda:120"]


def test_every_launch_of_the_device_takes_more_than_32_bits_count() -> None:
    for _, launch in cuda_kernels.examples():
        assert isinstance(launch, Launch) and launch.args["n"] > 2**32
