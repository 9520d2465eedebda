"""``fastattn build --cpu`` builds what calls run, so that they compile nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastattn.cli.main import app
from fastattn.kernels.cpu import build, engine, machine, objects
from fastattn.kernels.cpu.build import find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    engine.forget()
    yield tmp_path
    engine.forget()


ALWAYS = 3  # what runs on threads, the sort, and what ends SMYRF's hash
HASH = 2  # SMYRF's kernels for one dtype and head dim, with a mask and without
BLOCKS = 6  # those that ask for a cluster size too
SMYRF = HASH + BLOCKS


def fastattn_build(*words: str, status: int = 0) -> list[str]:
    """The lines that it prints."""
    result = CliRunner().invoke(app, ["build", *words])
    assert result.exit_code == status, result.output
    return result.output.splitlines()


def call(*, compiler: str, preamble: str = "") -> None:
    """SMYRF forward and backward in a process of its own, which fails if a reference has to run."""
    code = f"""
import warnings
import torch, fastattn
warnings.simplefilter("error")
{preamble}
q = torch.randn(1, 2, 200, 64, requires_grad=True)
fastattn.smyrf_attention(q, q, q).sum().backward()
assert q.grad.isfinite().all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CXX": compiler}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_calls_after_it_compile_nothing_and_a_second_run_neither(cache_dir):
    said = fastattn_build("--cpu")
    assert (
        f"{ALWAYS + SMYRF} built in {said[-1].split()[3]} s, 0 were there, 0 not built: {cache_dir / 'cpu'}" == said[-1]
    )
    assert len(said) == ALWAYS + SMYRF + 1 and all(line.startswith("built") for line in said[:-1])
    assert sum("block_attention_backward_dkv" in line for line in said) == 2
    held = sorted((cache_dir / "cpu").iterdir())

    found = find_compiler()
    assert found is not None
    # the compiler's path and version are part of the key, so it has to be the same one, that can't be run
    call(compiler=found.path, preamble="from fastattn.kernels.cpu import build; build._compile = None")
    assert sorted((cache_dir / "cpu").iterdir()) == held

    start = time.monotonic()
    said = fastattn_build("--cpu")
    assert said[-1].startswith("0 built in") and f"{ALWAYS + SMYRF} were there" in said[-1]
    assert time.monotonic() - start < 2


@needs_compiler
def test_a_folder_for_other_machines_serves_where_there_is_no_compiler(cache_dir):
    level = machine.supported_levels()[-1]
    words = ("--cpu", "--level", level.name, "--output", str(cache_dir / "shipped"))
    assert fastattn_build(*words)[-1].endswith(f"0 were there, 0 not built: {cache_dir / 'shipped'}")
    assert not (cache_dir / "cpu").exists()
    assert {path.suffix for path in (cache_dir / "shipped").iterdir()} == {".cc", ".sha256", ".so"}
    shipped = "from pathlib import Path; from fastattn.kernels.cpu import objects; objects.SHIPPED = "
    shipped += f"Path({str(cache_dir / 'shipped')!r})"
    call(compiler="/there/is/none", preamble=shipped)


def jobs(*words: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of a run in which nothing takes time: objects are only named."""
    made = []
    monkeypatch.setattr(build, "is_built", lambda recipe, folder: False)
    monkeypatch.setattr(build, "build", lambda recipe, folder: made.append(recipe.file_name()))
    said = fastattn_build(*words)
    assert len({*made}) == len(made) == len(said) - 1
    return said[:-1]


def test_head_dims_and_cluster_sizes_and_patterns_multiply(monkeypatch):
    assert len(jobs("--cpu", "--head-dim", "32,64", monkeypatch=monkeypatch)) == ALWAYS + 2 * SMYRF
    assert (
        len(jobs("--cpu", "--cluster-size", "64,100,128", monkeypatch=monkeypatch)) == ALWAYS + HASH + 2 * BLOCKS
    )  # 100 takes 128's
    every = jobs("--cpu", "--every-pattern", monkeypatch=monkeypatch)
    assert sum("block_attention" in line for line in every) == 50
    assert any("is_causal" in line for line in every)


def test_tuned_tiles_are_built_too(monkeypatch):
    from fastattn.autotune import block_attention
    from fastattn.kernels.config import Config

    tuned = Config({"BLOCK_M": 16, "BLOCK_N": 32})
    monkeypatch.setattr(block_attention, "lookup", lambda kernel, *_: tuned if "forward" in kernel else None)
    said = jobs("--cpu", monkeypatch=monkeypatch)
    assert len(said) == ALWAYS + SMYRF + 2
    assert sum("block_attention_forward, tile 16 x 32" in line for line in said) == 2


def test_what_cannot_be_built_is_named_with_its_reason_and_the_rest_is_built(cache_dir, monkeypatch):
    from fastattn.kernels.errors import Unsupported

    def refuse(recipe, folder):
        if "dkv" in recipe.name:
            raise Unsupported("it is too long")

    monkeypatch.setattr(build, "is_built", lambda recipe, folder: False)
    monkeypatch.setattr(build, "build", refuse)
    said = fastattn_build("--cpu", status=1)
    for rounds in ("first round", "later rounds"):
        name = f"block_attention_backward_dkv, tile 64 x 64, {rounds}, fp32, head dim 64"
        assert f"not built      {name}: it is too long" in said
    assert said[-1].startswith(f"{ALWAYS + SMYRF - 2} built") and f"2 not built: {objects.place()}" in said[-1]


def test_without_a_compiler_everything_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/there/is/none")
    said = fastattn_build("--cpu", status=1)
    assert sum("no C++ compiler was found" in line for line in said) == ALWAYS + SMYRF


@needs_compiler
@pytest.mark.skipif(len(machine.supported_levels()) < 2, reason="this machine has one instruction set")
def test_another_level_than_this_machines_is_for_a_folder():
    said = fastattn_build("--cpu", "--level", "baseline", status=2)
    assert "level baseline needs --output" in said[0]


def test_an_output_that_cannot_be_made_is_refused(cache_dir):
    (cache_dir / "file").write_text("")
    assert "nothing was built" in fastattn_build("--cpu", "--output", str(cache_dir / "file"), status=2)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say what to build for: --cpu"),
        (("--cpu", "--head-dim", "64,x"), "head_dim must be positive integers"),
        (("--cpu", "--cluster-size", "0"), "cluster_size must be positive integers"),
        (("--cpu", "--dtype", "fp32,fp8"), "dtype must be some of fp32, fp16, bf16 with commas between them"),
        (("--cpu", "--level", "mmx"), "level must be one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_named(words, message):
    assert message in fastattn_build(*words, status=2)[0]


@needs_compiler
def test_the_library_for_onnx_runtime_is_one_file_and_built_once(cache_dir, monkeypatch):
    pytest.importorskip("onnxruntime")
    from fastattn.export.ort import needs

    one = [needs.Call("ClusterSums", head_dim=16)]
    monkeypatch.setattr(needs, "every_call", lambda head_dims, dtypes: one)
    said = fastattn_build("--ort", "--output", str(cache_dir / "taken"))
    library = cache_dir / "taken" / "libfastattn_ort.so"
    assert said[-1].startswith(f"{library}  (") and library.stat().st_size > 10_000
    assert sum(line.startswith("built  sums_kernel, ") for line in said) == 1
    assert len(fastattn_build("--ort", "--output", str(cache_dir / "taken"))) == 1


def test_the_library_is_of_the_head_dims_and_types_that_were_asked_for(monkeypatch):
    pytest.importorskip("onnxruntime")
    from fastattn.export.ort import session

    asked = []
    monkeypatch.setattr(session, "build_library", lambda variants, levels, *_: asked.append((variants, levels)))
    fastattn_build("--ort", "--head-dim", "32,64", "--dtype", "fp32,fp16", "--level", "baseline,avx2")
    ((variants, levels),) = asked
    assert [level.name for level in levels] == ["avx2", "baseline"]
    forward = [variant.described() for variant in variants if variant.kernel == "topk_attention_forward"]
    assert len(forward) == 8 and len({*forward}) == 8  # causal and not


def test_the_library_for_gpus_has_kernels_of_each_and_what_they_have_alone(monkeypatch):
    pytest.importorskip("onnxruntime")
    from fastattn.export.ort import cuda_steps, session

    asked = []
    monkeypatch.setattr(session, "build_library", lambda variants, levels, cuda, _: asked.append((variants, cuda)))
    fastattn_build("--ort", "--cuda", "sm_80, sm_120")
    ((variants, cuda),) = asked
    assert list(cuda) == ["cuda:80", "cuda:120"]
    kernels = {variant.kernel for variant in variants}
    assert {"smyrf_hash_project", "block_attention_forward"} < kernels
    assert all({variant.kernel for variant in of_gpu} == kernels | {*cuda_steps.KERNELS} for of_gpu in cuda.values())


@pytest.mark.parametrize(
    "words, message",
    [
        (("--cpu", "--ort"), "say what to build for: --cpu or --ort"),
        (("--cpu", "--model", "m.onnx"), "--model is for --ort"),
        (("--ort", "--dtype", "bf16"), "dtype must be one of fp32, fp16, got 'bf16'"),
        (("--ort", "--level", "none"), "level must be some of"),
        (("--cpu", "--cuda", "sm_90"), "--cuda is for --ort"),
        (("--ort", "--cuda", "sm_90,sm_75"), "architecture must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
    ],
)
def test_what_to_build_for_must_be_said_in_a_way_that_makes_sense(words, message):
    assert message in fastattn_build(*words, status=2)[-1]
