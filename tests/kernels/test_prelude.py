"""The precompiled header: made when many kernels are built, and never in the way of a right object."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastattn.kernels.cpu import build, engine, machine, objects, prelude

FOUND = build.find_compiler()
pytestmark = pytest.mark.skipif(
    FOUND is None or "clang" in FOUND.version, reason="only g++ takes a precompiled header in this form"
)
PRELUDE = "#include <cstdint>\nnamespace { constexpr int64_t HALF = 21; }\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, in which builds beyond the second ask for a precompiled header."""
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(prelude, "BUILDS_BEFORE", 2)
    engine.forget()
    yield tmp_path / "cpu"
    engine.forget()


@pytest.fixture
def used(monkeypatch):
    """For each run of the compiler, whether it took a precompiled header for its own."""
    runs = []

    def run(command, limit_s, folder=None):
        done = real(command, limit_s, folder)
        if folder is not None and "-x" not in command:
            more = subprocess.run([*command[:-2], "-H", "-fsyntax-only"], cwd=folder, capture_output=True, text=True)
            runs.append(f"! {prelude.HEADER}.gch" in more.stderr)
        return done

    real = build._run
    monkeypatch.setattr(build, "_run", run)
    return runs


def answer(number):
    text = f'{PRELUDE}extern "C" __attribute__((visibility("default"))) int answer() {{ return {number} + 2 * HALF; }}'
    recipe = build.Recipe("answer", (str(number),), lambda: text, machine.BASELINE, PRELUDE)
    return build.load(recipe).answer() - 42


def headers(cache: Path) -> list[Path]:
    return list(cache.glob("*.gch"))


def test_the_third_build_makes_one_and_later_ones_take_it(cache, used):
    assert [answer(number) for number in range(5)] == [0, 1, 2, 3, 4]
    assert used == [False, False, True, True, True]
    assert [objects.is_whole(header) for header in headers(cache)] == [True]


def test_another_process_takes_it_from_its_first_build_on(cache, used):
    for number in range(3):
        answer(number)
    engine.forget()  # as a new process begins
    assert answer(3) == 3
    assert used[-1]


def test_the_source_that_is_kept_is_whole(cache):
    for number in range(3):
        answer(number)
    kept = [file.read_text() for file in cache.glob("answer-*.cc")]
    assert len(kept) == 3
    assert all(text.startswith(PRELUDE) for text in kept)


@pytest.mark.parametrize("damage", ["cut short", "not the compiler's", "gone"])
def test_a_damaged_one_costs_no_result(cache, used, damage):
    for number in range(3):
        answer(number)
    (header,) = headers(cache)
    if damage == "cut short":
        header.write_bytes(header.read_bytes()[:1000])
        engine.forget()  # who has found it whole once does not look again
    elif damage == "not the compiler's":
        header.write_bytes(b"another compiler's")
    else:
        header.unlink()
    assert answer(3) == 3
    assert objects.is_whole(next(file for file in cache.glob("answer-*.so")))


def test_one_that_cannot_be_made_is_asked_for_once(cache, monkeypatch):
    asked = []

    def run(command, limit_s, folder=None):
        if "c++-header" in command:
            asked.append(command)
            return subprocess.CompletedProcess(command, 1, "", "")
        return real(command, limit_s, folder)

    real = build._run
    monkeypatch.setattr(build, "_run", run)
    assert [answer(number) for number in range(5)] == [0, 1, 2, 3, 4]
    assert len(asked) == 1
    assert headers(cache) == []


def test_kernels_begin_with_what_is_precompiled(cache):
    import torch

    from fastattn.kernels import cluster_attention as room

    launch = room.example_launch("cluster_attention_broadcast", torch.float32, device_type="cpu")
    recipe = engine.recipe(launch, machine.BASELINE)
    assert recipe.prelude
    assert recipe.source().startswith(recipe.prelude)


def test_a_folder_for_other_machines_gets_none(cache, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    for number in range(3):
        text = f"{PRELUDE}int answer() {{ return {number}; }}"
        build.build(build.Recipe("answer", (str(number),), lambda text=text: text, machine.BASELINE, PRELUDE), folder)
    assert headers(folder) == []
    assert not cache.exists()
