"""Shared objects: built once for all processes, kept within bounds, and a right result whatever goes wrong."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from fastattn.kernels.config import Config
from fastattn.kernels.cpu import build, engine, machine, objects
from fastattn.kernels.errors import Unsupported, UnsupportedNow
from fastattn.kernels.launch import Launch, run
from fastattn.ops.block_attention import block_attention

FORK = multiprocessing.get_context("fork")
needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="the CPU engine needs a C++ compiler")


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


def recipe(key="a", answer=42):
    source = f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {answer}; }}'
    return build.Recipe("answer", (key,), lambda: source, machine.BASELINE)


def load(key="a", answer=42):
    return build.load(recipe(key, answer)).answer()


def pretend(folder, monkeypatch, action):
    """A compiler that tells its version, and does ``action``, lines of shell, when it is to compile."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo pretended 1.0 && exit\n{action}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return compiler


def real_compiler():
    """For a line of shell that is given to :func:`pretend`."""
    return shlex.quote(build.require_compiler().path)


def let_time_pass(monkeypatch, seconds):
    monkeypatch.setattr(build, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + seconds))


def attend():
    """Forward and backward through the op, which must be right. Returns the warnings of ours."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, 32, 16, requires_grad=True) for _ in range(3)]
    index = torch.randperm(32).view(1, 1, 1, 2, 16).int()
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for impl in (None, "reference"):
            out, _ = block_attention(*inputs, index, index, impl=impl)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    return [str(w.message) for w in caught if "fastattn" in str(w.message)]


def python(code, **environment):
    """What ``code`` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=os.environ | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# what is kept


@needs_compiler
def test_an_object_is_built_once_and_then_found(fresh):
    assert load() == 42

    def never():
        raise AssertionError("built twice")

    assert build.load(build.Recipe("answer", ("a",), never, machine.BASELINE)).answer() == 42
    assert sorted(path.suffix for path in (fresh / "cpu").iterdir()) == [".cc", ".sha256", ".so"]
    assert stat.S_IMODE((fresh / "cpu").stat().st_mode) == 0o700


@needs_compiler
@pytest.mark.parametrize("kept", [0, 100, 9000])
def test_a_truncated_object_is_built_again(fresh, monkeypatch, kept):
    load(f"truncated {kept}")
    (first,) = (fresh / "cpu").glob("*.so")
    # in another folder: this process would find the loaded object again by its path
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(fresh / "other"))
    folder = objects.cache_folder()
    for path in first.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path != first else path.read_bytes()[:kept])
    assert load(f"truncated {kept}") == 42
    assert (folder / first.name).stat().st_size == first.stat().st_size


@needs_compiler
def test_what_another_processor_has_built_is_neither_loaded_nor_overwritten(fresh, monkeypatch):
    with monkeypatch.context() as there:
        there.setattr(machine, "fingerprint", lambda: "another one")
        assert load(answer=1) == 1
    (theirs,) = (fresh / "cpu").glob("*.so")
    before = theirs.read_bytes(), theirs.stat().st_mtime_ns
    assert load(answer=2) == 2
    assert (theirs.read_bytes(), theirs.stat().st_mtime_ns) == before
    assert len(list((fresh / "cpu").glob("*.so"))) == 2


@needs_compiler
def test_the_least_recently_used_objects_make_room_whole(fresh, monkeypatch):
    for age, key in enumerate(("newest", "middle", "oldest")):
        load(key)
        (built,) = (path for path in (fresh / "cpu").glob("*.so") if path.stat().st_mtime > time.time() - 100)
        os.utime(built, times=(0, time.time() - 1000 * (age + 1)))
    names = [entry.files[0].stem for entry in objects.entries(fresh / "cpu")]
    load("oldest")  # in use again
    one = objects.entries(fresh / "cpu")[0].size
    monkeypatch.setattr(objects, "BOUND_BYTES", 2 * one + one // 2)
    load("another")
    left = {path.stem for path in (fresh / "cpu").iterdir()}
    assert len(left) == 2
    assert names[0] in left and not {*names[1:]} & left
    assert len(list((fresh / "cpu").iterdir())) == 6


@needs_compiler
def test_an_object_larger_than_the_bound_is_kept_while_it_is_the_last_one(fresh, monkeypatch):
    monkeypatch.setattr(objects, "BOUND_BYTES", 1)
    assert [load("x", 1), load("y", 2)] == [1, 2]
    assert len(objects.entries(fresh / "cpu")) == 1


@needs_compiler
def test_an_object_that_goes_while_it_is_about_to_be_loaded_is_built_again(fresh, monkeypatch):
    build.build(recipe())
    is_whole = objects.is_whole

    def is_whole_and_then_evicted(path):
        found = is_whole(path)
        if found:
            monkeypatch.setattr(objects, "is_whole", is_whole)
            path.unlink()
        return found

    monkeypatch.setattr(objects, "is_whole", is_whole_and_then_evicted)
    assert load() == 42


@needs_compiler
def test_what_killed_builds_left_is_swept_after_an_hour(fresh, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(fresh / "tmp"))
    cache = objects.cache_folder()
    for age, name in ((7200, "old"), (60, "young")):
        for folder in (cache / f"build-{name}", fresh / "tmp" / f"fastattn-build-{name}"):
            folder.mkdir(parents=True)
            (folder / "kernel.cc").write_text("")
            os.utime(folder, times=(0, time.time() - age))
    load()
    left = [path.name for path in fresh.rglob("*build-*")]
    assert sorted(left) == ["build-young", "fastattn-build-young"]


@needs_compiler
def test_nothing_is_swept_or_evicted_in_a_folder_that_is_not_the_cache(fresh, monkeypatch):
    monkeypatch.setattr(objects, "BOUND_BYTES", 1)
    project = fresh / "project"
    (project / "build-old").mkdir(parents=True)
    os.utime(project / "build-old", times=(0, 0))
    (project / "theirs.so").write_text("theirs")
    build.build(recipe(), project)
    assert (project / "build-old").exists() and (project / "theirs.so").exists()


@needs_compiler
def test_objects_that_came_with_the_package_need_no_compiler(fresh, monkeypatch):
    monkeypatch.setattr(objects, "SHIPPED", fresh / "shipped")
    objects.SHIPPED.mkdir()
    build.build(recipe(answer=7), objects.SHIPPED)
    best = replace(recipe(answer=8), level=machine.supported_levels()[0])
    with monkeypatch.context() as here:
        here.setenv("CXX", "/there/is/none")
        assert build.is_built(recipe())
        assert load() == 7
        assert build.load(best).answer() == 7  # of a narrower instruction set
    assert build.load(best).answer() == 8 or best.level == machine.BASELINE
    assert len(list((fresh / "cpu").glob("*.so"))) == (best.level != machine.BASELINE)


# where it is kept


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


@needs_compiler
@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_folder_that_takes_no_more_still_gives_what_it_has(fresh, monkeypatch, trouble):
    assert load("before") == 42
    copy = objects.shutil.copyfile

    def copyfile(source, target, **kwargs):
        if str(target).startswith(str(fresh)):
            raise OSError(trouble, os.strerror(trouble), str(target))
        return copy(source, target, **kwargs)

    monkeypatch.setattr(objects.shutil, "copyfile", copyfile)
    held = sorted((fresh / "cpu").iterdir())
    assert load("before") == 42
    assert load("after", 43) == 43  # from a folder of this process alone
    assert sorted((fresh / "cpu").iterdir()) == held
    with pytest.raises(UnsupportedNow, match="can't be written"):
        build.build(recipe("ahead"))


@needs_compiler
def test_a_read_only_folder_gives_what_it_has_and_the_rest_is_built_elsewhere():
    with tempfile.TemporaryDirectory() as folder:

        def in_a_process() -> None:
            if os.getuid() == 0:  # whom no folder's mode stops
                os.chown(folder, 65534, 65534)
                os.setgid(65534)
                os.setuid(65534)
            os.environ["FASTATTN_CACHE_DIR"] = folder
            build.build(recipe("before", 1))
            os.chmod(f"{folder}/cpu", 0o500)
            assert build.is_built(recipe("before", 1))
            assert [load("before", 1), load("after", 2)] == [1, 2]
            (private,) = objects.private_folder().glob("*.so")
            assert private.stat().st_uid == os.getuid()
            shutil.rmtree(private.parent)

        process = FORK.Process(target=in_a_process)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert len(list(Path(folder, "cpu").glob("*.so"))) == 1


# several processes


@needs_compiler
def test_two_processes_that_want_the_same_object_build_it_once(fresh, monkeypatch):
    calls, go = fresh / "calls", fresh / "go"
    wait = f"while [ ! -e {shlex.quote(str(go))} ]; do sleep 0.02; done"
    pretend(fresh, monkeypatch, f'echo x >> {shlex.quote(str(calls))}; {wait}; exec {real_compiler()} "$@"')

    def in_a_process(number: int) -> None:
        (fresh / f"ready {number}").touch()
        assert load() == 42

    both = [FORK.Process(target=in_a_process, args=(number,)) for number in range(2)]
    for process in both:
        process.start()
    wait_for(lambda: calls.exists() and len(list(fresh.glob("ready *"))) == 2)
    time.sleep(0.3)  # the other one now stands before the lock
    go.touch()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert calls.read_text() == "x\n"
    assert not list((fresh / "cpu").glob("*.lock"))


@needs_compiler
def test_a_builder_that_was_killed_holds_nobody_up(fresh, monkeypatch):
    started, slow = fresh / "started", fresh / "slow"
    slow.touch()
    action = f"[ -e {shlex.quote(str(slow))} ] && echo $$ > {shlex.quote(str(started))} && exec sleep 60"
    pretend(fresh, monkeypatch, f'{action}\nexec {real_compiler()} "$@"')
    process = FORK.Process(target=load)
    process.start()
    try:
        wait_for(lambda: started.exists() and started.read_text())
        assert len(list((fresh / "cpu").glob("*.lock"))) == 1
    finally:
        process.kill()
        process.join()
    slow.unlink()
    start = time.monotonic()
    assert load() == 42  # while what the killed one had started still runs
    assert time.monotonic() - start < 10
    assert is_running(int(started.read_text()))
    os.kill(int(started.read_text()), signal.SIGKILL)
    assert sorted(path.suffix for path in (fresh / "cpu").iterdir()) == [".cc", ".sha256", ".so"]


@needs_compiler
def test_a_lock_that_cannot_be_made_stops_nothing(fresh):
    lock = build._place(recipe()).with_suffix(".lock")
    lock.mkdir()
    assert load() == 42


# compilers


def test_without_a_compiler_the_answer_is_unsupported(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unsupported, match=r"no C\+\+ compiler was found"):
        double()


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path):
    code = "from tests.kernels.test_build import attend; print(*attend(), *attend(), sep='\\n')"
    (warning,) = python(code, CXX="/there/is/none", FASTATTN_CACHE_DIR=str(tmp_path)).splitlines()
    assert "no C++ compiler was found" in warning


def test_a_compiler_that_fails_is_reported_with_its_words_and_asked_again_after_a_minute(fresh, monkeypatch):
    calls = fresh / "calls"
    count = f'case "$*" in *double_kernel*) echo x >> {shlex.quote(str(calls))};; esac'
    pretend(fresh, monkeypatch, f"{count}\necho $3: error: out of ideas >&2; exit 1")
    for _ in range(2):
        with pytest.raises(UnsupportedNow, match=r"c\+\+ failed: error: out of ideas$"):
            double()
    assert calls.read_text() == "x\n"
    for minutes, asked in ((1.1, 2), (2.2, 2), (3.3, 3)):  # pauses of one minute, two, four
        let_time_pass(monkeypatch, 60 * minutes)
        with pytest.raises(UnsupportedNow):
            double()
        assert calls.read_text() == "x\n" * asked


@needs_compiler
def test_trouble_that_passes_costs_one_warning_and_then_kernels_run(fresh, monkeypatch):
    full = fresh / "full"
    full.touch()
    message = "/usr/bin/ld: final link failed: No space left on device"
    action = f"[ -e {shlex.quote(str(full))} ] && echo {message} >&2 && exit 1"
    pretend(fresh, monkeypatch, f'{action}\nexec {real_compiler()} "$@"')
    (warning,) = attend() + attend()
    assert "No space left on device" in warning
    full.unlink()
    let_time_pass(monkeypatch, 61)
    assert attend() == []
    assert len(list((fresh / "cpu").glob("*.so"))) == 4  # three kernels, and the threads


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("kill -9 $$", "it was ended by signal 9"),
        ("echo c++: fatal error: Killed signal terminated program cc1plus >&2; exit 1", "Killed signal terminated"),
        ("exit 0", "nothing can be built: No such file"),
        ("exit 3", "it said nothing"),
    ],
    ids=["killed", "its child killed", "wrote nothing", "silent"],
)
def test_a_compiler_that_dies_means_the_reference_with_one_warning(fresh, monkeypatch, action, message):
    pretend(fresh, monkeypatch, action)
    (warning,) = attend() + attend()
    assert message in warning


def test_an_object_that_cannot_be_loaded_means_the_reference_with_one_warning(fresh, monkeypatch):
    pretend(fresh, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo no object > "$2"')
    (warning,) = attend() + attend()
    assert "can't be loaded" in warning


def test_a_compiler_that_hangs_is_stopped_with_all_that_it_started_and_waited_for_once(fresh, monkeypatch):
    children = fresh / "children"
    pretend(fresh, monkeypatch, f"sleep 60 & echo $! >> {shlex.quote(str(children))}; wait")
    monkeypatch.setattr(build, "TIME_LIMIT_S", 0.5)
    start = time.monotonic()
    (warning,) = attend() + attend()
    assert "took longer than 0.5 s" in warning
    assert time.monotonic() - start < 10
    started = children.read_text().split()
    assert 1 <= len(started) <= 2  # the forward, and the threads at the same time; the backward no longer asks
    wait_for(lambda: not any(map(is_running, started)))


@needs_compiler
def test_where_no_file_may_grow_the_reference_runs_with_one_warning(tmp_path):
    code = """
import resource
from fastattn.kernels.cpu import objects
from tests.kernels.test_build import attend
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(*attend(), *attend(), objects.private_folder(), sep='\\n')
"""
    warning, private = python(code, FASTATTN_CACHE_DIR=str(tmp_path)).splitlines()
    assert not Path(private).exists()  # it goes with its process
    assert "nothing can be built: File too large" in warning
    assert not list(tmp_path.rglob("*.so"))


# the processor


@needs_compiler
@pytest.mark.parametrize("level", machine.supported_levels(), ids=lambda level: level.name)
def test_every_instruction_set_of_this_machine_gives_the_same(fresh, monkeypatch, level):
    monkeypatch.setattr(machine, "supported_levels", lambda: [level])
    double()


def test_the_key_holds_the_processor():
    assert len(machine.fingerprint()) == 12
    assert machine.supported_levels()[-1] is machine.BASELINE
    assert os.uname().machine != "x86_64" or "fpu" in machine.features()
