"""``fastattn inspect``."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import fastattn
from fastattn import export
from fastattn.cli import inspect

app = typer.Typer()
app.command()(inspect.command)


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = torch.nn.Buffer(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden):
        q = hidden.unflatten(-1, (2, 8)).transpose(1, 2)
        for size in (8, 16, 8):
            q = fastattn.smyrf_attention(q, q, q, n_hashes=2, q_cluster_size=size, projections=self.projections)
        return q


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model with functions and portable."""
    folder = tmp_path_factory.mktemp("onnx")
    sample = {"hidden": torch.randn(2, 20, 16)}
    said = {"method": "smyrf", "knobs": {"n_hashes": 2}}
    return {
        portable: export.to_onnx(Two().eval(), sample, folder / f"{portable}.onnx", portable=portable, metadata=said)
        for portable in (False, True)
    }


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_nodes_that_are_alike_are_told_once(files):
    result = run(files[False])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert f"written by fastattn {fastattn.__version__} method smyrf, n_hashes 2 standard ops opset 18" in said
    assert said.count("2 x SmyrfAttention") == 1 and said.count("1 x SmyrfAttention") == 1
    assert "q_cluster_size 8" in said and "q_cluster_size 16" in said
    assert "a node with a body of standard ops" in said


def test_a_portable_file_has_nothing_that_could_be_fused(files):
    said = " ".join(run(files[True]).output.split())
    assert "functions none" in said
    assert "its body, written out in standard ops fused here nothing: only nodes can be" in said


def test_without_a_compiler_the_reason_is_told(files, monkeypatch):
    monkeypatch.setattr("fastattn.kernels.cpu.build.find_compiler", lambda: None)
    assert "fused here nothing: there is no C++ compiler" in " ".join(run(files[False]).output.split())


def test_json_is_the_report(files):
    report = json.loads(run(files[False], "--json").output)
    assert report == json.loads(json.dumps(export.inspect(files[False]).as_dict()))
    assert [node["settings"]["q_cluster_size"] for node in report["nodes"]] == [8, 16, 8]


def test_what_is_no_file_of_ours_is_told_without_a_traceback(tmp_path):
    (tmp_path / "text.onnx").write_text("no model")
    result = run(tmp_path / "text.onnx")
    assert result.exit_code == 1
    assert "is no ONNX file" in " ".join(result.output.split())
    assert run(tmp_path / "missing.onnx").exit_code == 2
