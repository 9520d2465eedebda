"""`fastattn doctor` tells whether kernels run here, and why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastattn.cli import doctor
from fastattn.kernels.cpu import machine, objects
from fastattn.kernels.cpu.build import find_compiler
from fastattn.kernels.settings import CACHE_DIR_VARIABLE


def doctor_says(environment: dict[str, str]) -> dict[str, str]:
    """The findings in a fresh process: in this one, the engine remembers what it could not build."""
    code = "import json; from fastattn.cli import doctor; print(json.dumps(dict(doctor.findings())))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_without_a_compiler_it_says_that_references_run_and_why(tmp_path):
    # an empty cache: kernels that were built before would run without a compiler
    found = doctor_says({"CXX": "/there/is/no/compiler", CACHE_DIR_VARIABLE: str(tmp_path)})
    assert found["C++ compiler"] == "none found"
    assert "references" in found["kernels on CPU"] and "compiler" in found["kernels on CPU"]


def test_with_a_compiler_it_says_that_the_engine_runs():
    if find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    found = doctor_says({})
    assert found["kernels on CPU"] == "run by the engine"
    best, *others = machine.supported_levels()
    assert found["C++ compiler"].endswith(f", builds for {best.name}")
    assert f", {best.name}" in found["CPU"] and all(level.name in found["CPU"] for level in others)


def test_a_compiler_that_builds_nothing_is_told_with_its_reason_and_so_are_kernels(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\necho error: no licence >&2; exit 1\n')
    compiler.chmod(0o755)
    found = doctor_says({"CXX": str(compiler), CACHE_DIR_VARIABLE: str(tmp_path)})
    assert found["C++ compiler"] == f"{compiler} (1.0), of no use: {compiler} failed: error: no licence"
    assert found["kernels on CPU"].startswith("fall back to the references") and "no licence" in found["kernels on CPU"]


def test_a_kernel_that_computes_something_wrong_is_found(monkeypatch):
    pytest.importorskip("triton")
    from fastattn.kernels import block_attention

    monkeypatch.setattr(block_attention, "forward", lambda q, *_, **__: (q + 1, None))
    assert "computes something wrong" in str(doctor.engine_problem())


def test_built_kernels_are_counted_and_their_bound_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    assert doctor.built_kernels() == f"{tmp_path / 'cpu'} (0 objects, 0.0 of 512 MiB)"
    (tmp_path / "cpu").mkdir()
    for name in ("a.so", "a.cc", "b.so"):
        (tmp_path / "cpu" / name).write_bytes(bytes(2**20))
    assert doctor.built_kernels() == f"{tmp_path / 'cpu'} (2 objects, 3.0 of 512 MiB)"
    monkeypatch.setattr(objects, "SHIPPED", tmp_path / "cpu")
    assert doctor.built_kernels().endswith("MiB; 2 more came with the package)")


def test_the_cache_is_named_with_its_size(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    assert doctor.size_of(tmp_path / "cache") == "empty"
    (tmp_path / "cache" / "cpu").mkdir(parents=True)
    (tmp_path / "cache" / "cpu" / "kernel.so").write_bytes(bytes(3 * 2**20))
    assert doctor.size_of(tmp_path / "cache") == "1 files, 3.0 MiB"


def test_packages_are_found_by_either_name():
    assert doctor.installed("torch")
    assert doctor.installed("no-such-package") is None
