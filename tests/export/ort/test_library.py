"""The library as a file: what it has in it and shows, what it asks of a machine, and that it is built once."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.export import custom_ops_library
from fastattn.export.ort import needs
from fastattn.export.ort.library import build_library
from fastattn.export.ort.needs import Call
from fastattn.kernels.cpu import build, machine
from fastattn.kernels.cpu.build import find_compiler
from tests.export.ort.nodes import NODE_OF_HASHES, library

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
LEVELS = ", ".join(level.name for level in machine.LEVELS)
ONE = [Call("ClusterSums", head_dim=16, attributes={"n_clusters": 5})]  # one small kernel


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_exports_one_function() -> None:
    symbols = said("nm", "-D", "--defined-only", str(library())).split("\n")
    assert [line.split()[-1] for line in symbols if line] == ["RegisterCustomOps"]


def test_it_is_linked_with_the_c_and_cpp_runtimes_alone() -> None:
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", said("readelf", "-d", str(library())))
    assert set(needed) <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "ld-linux-x86-64"}


def test_a_second_build_builds_nothing() -> None:
    built: list[str] = []
    variants = needs.variants(ONE)
    path = build_library(variants, on_built=built.append)
    del built[:]
    assert build_library(variants, on_built=built.append) == path and built == []


def test_one_library_serves_several_levels_and_runs_the_best(tmp_path: Path) -> None:
    levels = [machine.AVX2, machine.BASELINE]
    if machine.AVX2 not in machine.supported_levels():
        levels = [machine.BASELINE]
    path = build_library(needs.variants([NODE_OF_HASHES.call()]), levels)
    names = said("strings", "-n", "4", str(path)).split()
    assert all(level.name in names for level in levels)
    (got,) = NODE_OF_HASHES.run(path)
    # another level sums in another order: two buckets that are nearly as large may change places
    assert (got != NODE_OF_HASHES.expected[0]).float().mean() < 0.01


def test_a_processor_that_has_no_level_of_it_is_told_so() -> None:
    lacking = machine.Level("another", 4, (), frozenset({"a_feature_of_none"}))
    path = build_library(needs.variants(ONE), [lacking])
    with pytest.raises(Exception, match="this library was built for processors with another"):
        NODE_OF_HASHES.session(path)


def test_it_loads_where_there_is_no_torch_no_triton_and_no_gpu(tmp_path: Path) -> None:
    path = build_library(needs.variants(ONE))
    code = f"""
import sys
sys.modules["torch"] = sys.modules["triton"] = None
import onnxruntime
onnxruntime.SessionOptions().register_custom_ops_library({str(path)!r})
print(any("libcuda" in line for line in open("/proc/self/maps")))
"""
    assert said(sys.executable, "-c", code).strip() == "False"


def test_an_onnx_runtime_before_1_17_is_refused_with_a_status() -> None:
    messages: list[bytes] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, text: messages.append(text) or 4096 + code
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version < 17 else None
    )
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p).value, None)
    # a copy, for the table that a library was given first is its own for ever
    register = ctypes.CDLL(str(build_library(needs.variants(ONE)))).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 4096 + 9  # ORT_NOT_IMPLEMENTED
    assert messages == [b"fastattn's custom ops need ONNX Runtime 1.17 or newer"]


def test_output_gets_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "every_call", lambda dims, dtypes: ONE)
    path = custom_ops_library(output=tmp_path / "new")
    assert path == tmp_path / "new" / "libfastattn_ort.so" and os.listdir(tmp_path / "new") == [path.name]
    assert custom_ops_library(output=tmp_path / "new") == path


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtypes": ["bf16"]}, "dtype must be one of fp32, fp16, got 'bf16'"),
        ({"head_dims": [0]}, "head_dim must be an int from 1 to 256, got 0"),
        ({"head_dims": [257]}, "head_dim must be an int from 1 to 256, got 257"),
        ({"levels": ["avx1024"]}, f"level must be some of {LEVELS}, got avx1024"),
        ({"levels": []}, f"level must be some of {LEVELS}, got none"),
    ],
)
def test_bad_options_are_refused_before_anything_is_built(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        custom_ops_library(**options)


def test_every_op_has_its_kernels_for_every_type_and_dim() -> None:
    for dtype in needs.DTYPES:
        for dim in (1, 64, 80, 256):
            variants = needs.variants(needs.every_call([dim], [dtype]))
            assert len({variant.kernel for variant in variants}) == 17
            assert all("meta" in str(x.device) for v in variants for x in v.launch.args.values() if torch.is_tensor(x))


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(build.Unsupported, match=re.escape(f"{broken} failed")):
        build_library(needs.variants(ONE))
