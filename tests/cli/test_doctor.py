"""`fastattn doctor` tells whether kernels run here, and why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastattn.cli import doctor
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
    assert doctor_says({})["kernels on CPU"] == "run by the engine"


def test_the_cache_is_named_with_its_size(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "cache"))
    assert doctor.size_of(tmp_path / "cache") == "empty"
    (tmp_path / "cache" / "cpu").mkdir(parents=True)
    (tmp_path / "cache" / "cpu" / "kernel.so").write_bytes(bytes(3 * 2**20))
    assert doctor.size_of(tmp_path / "cache") == "1 files, 3.0 MiB"


def test_packages_are_found_by_either_name():
    assert doctor.installed("torch")
    assert doctor.installed("no-such-package") is None
