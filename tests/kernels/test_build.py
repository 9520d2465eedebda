"""The cache of built objects: one build for all processes, and a clear answer where nothing can be built."""

from __future__ import annotations

import os
import stat
import sys
import textwrap

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.cpu import build, engine, machine
from fastattn.kernels.errors import Unsupported
from fastattn.kernels.launch import Launch, run

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler")
SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache folder, and an engine that remembers nothing."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    engine.forget()
    yield tmp_path
    engine.forget()


@triton.jit
def double_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) * 2.0)


def double(n=64):
    x, y = torch.randn(n), torch.zeros(n)
    run([Launch(double_kernel, (n // 16,), {"x": x, "y": y, "BLOCK": 16}, Config())])
    assert torch.equal(y, 2 * x)


def load(key="a", source=SOURCE):
    return build.load("answer", [key], lambda: source, machine.BASELINE)


@needs_compiler
def test_an_object_is_built_once_and_then_found(fresh):
    assert load().answer() == 42

    def never():
        raise AssertionError("built twice")

    assert build.load("answer", ["a"], never, machine.BASELINE).answer() == 42
    assert sorted(path.suffix for path in (fresh / "cpu").iterdir()) == [".cc", ".sha256", ".so"]
    assert stat.S_IMODE((fresh / "cpu").stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("kept", [0, 100, 9000])
def test_a_truncated_object_is_built_again(fresh, monkeypatch, kept):
    load(f"truncated {kept}")
    (first,) = (fresh / "cpu").glob("*.so")
    # in another folder: this process would find the loaded object again by its path
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(fresh / "other"))
    folder = build.cache_folder()
    for path in first.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path != first else path.read_bytes()[:kept])
    assert load(f"truncated {kept}").answer() == 42
    assert (folder / first.name).stat().st_size == first.stat().st_size


@needs_compiler
def test_a_folder_that_others_can_write_is_refused(fresh):
    (fresh / "cpu").mkdir()
    (fresh / "cpu").chmod(0o777)
    with pytest.raises(Unsupported, match="others can write"):
        load()


@needs_compiler
def test_a_cache_place_that_is_no_folder_gives_way_to_a_temporary_one(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "file"))
    engine.forget()
    double()
    engine.forget()


def test_without_a_compiler_the_answer_is_unsupported(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unsupported, match=r"no C\+\+ compiler was found"):
        double()


def test_a_compiler_that_fails_is_reported_with_its_words_and_asked_once(fresh, monkeypatch):
    calls = fresh / "calls"
    script = f"""\
        #!{sys.executable}
        import sys
        if "--version" in sys.argv:
            print("broken 1.0")
        else:
            open({str(calls)!r}, "a").write("x")
            sys.exit("out of ideas")
        """
    compiler = fresh / "broken"
    compiler.write_text(textwrap.dedent(script))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        with pytest.raises(Unsupported, match="out of ideas"):
            double()
    assert calls.read_text() == "x"


def test_a_compiler_that_hangs_is_stopped(fresh, monkeypatch):
    compiler = fresh / "slow"
    compiler.write_text(f"#!{sys.executable}\nimport sys, time\nif '--version' not in sys.argv: time.sleep(60)\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "TIME_LIMIT_S", 0.5)
    with pytest.raises(Unsupported, match=r"longer than 0\.5 s"):
        double()


@needs_compiler
@pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name)
def test_every_instruction_set_of_this_machine_gives_the_same(fresh, monkeypatch, level):
    monkeypatch.setattr(machine, "supported_levels", lambda: [level])
    double()


def test_the_cache_key_holds_the_processor():
    assert len(machine.fingerprint()) == 12
    assert machine.supported_levels()[-1] is machine.BASELINE
    assert os.uname().machine != "x86_64" or "fpu" in machine.features()
