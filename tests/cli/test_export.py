"""``fastattn export``."""

from __future__ import annotations

import onnx
import pytest
import torch
import typer
from typer.testing import CliRunner

from fastattn.cli import export

app = typer.Typer()
app.command()(export.command)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    BertModel(config).save_pretrained(folder)
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_folder_becomes_a_checked_file(model_dir, tmp_path):
    path = tmp_path / "small.onnx"
    knobs = ("--knob", "n_hashes=3", "--knob", "q_cluster_size=16", "--knob", "impl=reference")
    result = run(model_dir, "-o", path, *knobs, "--layers", "1", "--check")
    assert result.exit_code == 0, result.output
    assert "last_hidden_state" in result.output
    ours = [node for node in onnx.load(path).graph.node if node.domain == "fastattn"]
    assert len(ours) == 1
    assert {"q_cluster_size": 16}.items() <= {a.name: a.i for a in ours[0].attribute}.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--knob", "n_hashes"], "a knob is name=value"),
        (["--knob", "hashes=4"], "unknown knob 'hashes'"),
        (["--method", "magic"], "unknown method 'magic'"),
        (["--layers", "7"], "layers has 7"),
        (["--layers", "first"], "'first'"),
    ],
)
def test_bad_options_are_told_without_a_traceback(model_dir, tmp_path, words, message):
    result = run(model_dir, "-o", tmp_path / "small.onnx", *words)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "small.onnx").exists()


def test_a_folder_without_a_model_is_an_error(tmp_path):
    result = run(tmp_path, "-o", tmp_path / "small.onnx")
    assert result.exit_code == 1
    assert "can't load a model" in result.output
