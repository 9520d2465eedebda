"""``fastattn export``."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import typer
from typer.testing import CliRunner

from fastattn.cli import export
from fastattn.export.compare import CheckReport, OutputError
from fastattn.kernels.cpu.build import find_compiler

app = typer.Typer()
app.command()(export.command)

KNOBS = ("--knob", "n_hashes=3", "--knob", "q_cluster_size=16", "--knob", "impl=reference")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    BertModel(config).save_pretrained(folder)
    return folder


# what a user may have in a file of their own
MODULE = """
import torch
import fastattn

class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projections = torch.nn.Buffer(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, hidden, mask):
        q = hidden.unflatten(-1, (2, 8)).transpose(1, 2)
        return fastattn.smyrf_attention(
            q, q, q, n_hashes=2, q_cluster_size=8, projections=self.projections, key_mask=mask
        )

def sampled():
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 11:] = False
    return Own(), {"hidden": torch.randn(2, 20, 16), "mask": mask}

def uneven():
    return Own(), {"hidden": torch.randn(2, 20, 16), "mask": torch.ones(2, 21, dtype=torch.bool)}

def patched():
    from transformers import BertConfig, BertModel
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    return fastattn.patch(BertModel(config), "smyrf", q_cluster_size=8, min_length=0, impl="reference")

def bare():
    return Own()

def wrong():
    return "a model"

not_a_function = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of that file, as a module that is found in the folder where the command runs."""
    (tmp_path / "my_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    return "my_models"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def test_a_folder_becomes_a_checked_file(model_dir, tmp_path):
    path = tmp_path / "small.onnx"
    result = run(model_dir, "-o", path, *KNOBS, "--layers", "1", "--check")
    assert result.exit_code == 0, result.output
    assert "1 SmyrfAttention" in result.output
    assert "3 x 301" in result.output and "last_hidden_state" in result.output
    assert "bodies" in result.output and ("kernels" in result.output) == (find_compiler() is not None)
    ours = [node for node in onnx.load(path).graph.node if node.domain == "fastattn"]
    assert len(ours) == 1
    assert {"q_cluster_size": 16}.items() <= {a.name: a.i for a in ours[0].attribute}.items()
    said = metadata(path)
    assert json.loads(said["fastattn.method"]) == "smyrf"
    knobs = json.loads(said["fastattn.knobs"])
    assert (knobs["n_hashes"], knobs["q_cluster_size"], knobs["directions"]) == (3, 16, "random")
    assert "impl" not in knobs, "how torch computed is no matter of the file"


def test_a_portable_file_in_fp16_with_its_weights_apart(model_dir, tmp_path):
    path = tmp_path / "small.onnx"
    options = ("--portable", "--dtype", "fp16", "--external-data", "--opset", "20", "--check")
    result = run(model_dir, "-o", path, *KNOBS, *options)
    assert result.exit_code == 0, result.output
    assert "weights in small.onnx.data" in result.output and "standard ops" in result.output
    model = onnx.load(path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert {node["dtype"] for node in json.loads(metadata(path)["fastattn.nodes"])} == {"fp16"}


def test_a_function_gives_a_model_that_calls_our_methods_and_its_sample(module, tmp_path):
    result = run(f"{module}:sampled", "-o", tmp_path / "own.onnx", "--check")
    assert result.exit_code == 0, result.output
    assert "2 x 20 x 16" in result.output
    assert "fastattn.method" not in metadata(tmp_path / "own.onnx"), "only its nodes know"


def test_a_function_gives_a_model_that_it_has_patched(module, tmp_path):
    result = run(f"{module}:patched", "-o", tmp_path / "patched.onnx")
    assert result.exit_code == 0, result.output
    assert json.loads(metadata(tmp_path / "patched.onnx")["fastattn.knobs"])["q_cluster_size"] == 8
    result = run(f"{module}:patched", "--method", "smyrf", *KNOBS)
    assert result.exit_code == 1
    assert "patched already, and --method, --knob came as well" in result.output


def test_of_a_speech_model_the_encoder_is_exported(tmp_path):
    from transformers import WhisperConfig, WhisperModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 99}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(**sizes, **tokens, num_mel_bins=8, max_source_positions=100)
    WhisperModel(config).save_pretrained(tmp_path / "whisper")
    result = run(tmp_path / "whisper", "-o", tmp_path / "encoder.onnx", *KNOBS, "--check")
    assert result.exit_code == 0, result.output
    assert "3 x 8 x 200" in result.output and "1 x 8 x 200" in result.output
    (given,) = onnx.load(tmp_path / "encoder.onnx").graph.input
    assert [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim][1:] == [8, 200]


def test_a_file_that_computes_something_else_fails(monkeypatch, capsys):
    report = CheckReport((OutputError("hidden", 1.0, 0.5, 1.0, tolerance=1e-4, own=1e-6),))
    monkeypatch.setattr("fastattn.export.check", lambda *_, **__: report)
    written: Any = SimpleNamespace(path="a.onnx", nodes=(), functions=("SmyrfAttention",), no_library="no compiler")
    with pytest.raises(typer.Exit) as ended:
        export._check(torch.nn.Identity(), written, [{"input": torch.zeros(2, 3)}])
    assert ended.value.exit_code == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "the file does not compute what the model does" in said
    assert "own: torch's error against itself" in said and "not run on kernels: no compiler" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--knob", "n_hashes"], "a knob is name=value"),
        (["--knob", "hashes=4"], "unknown knob 'hashes' for method 'smyrf'; allowed: n_hashes, q_cluster_size"),
        (["--knob", "n_hashes=few"], "n_hashes must be an int of at least 1, got 'few'"),
        (["--knob", "directions=best"], "directions is 'best'; allowed: 'random', 'principal'"),
        (["--method", "clustered", "--knob", "topk=4"], "unknown knob 'topk' for method 'clustered'; allowed: n_clu"),
        (["--method", "magic"], "unknown method 'magic'; allowed: 'smyrf'"),
        (["--layers", "7"], "layers has 7"),
        (["--layers", "first"], "'first'"),
        (["--opset", "17"], "opset must be an int from 18 to 23"),
        (["--dtype", "bf16"], "dtype must be one of fp32, fp16, got 'bf16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_told_without_a_traceback(model_dir, tmp_path, words, message):
    result = run(model_dir, "-o", tmp_path / "small.onnx", *words)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{module}:wrong", "must return a torch.nn.Module, or one with a mapping of input names to tensors"),
        ("{module}:bare", "no attention in Own goes through transformers' AttentionInterface"),
        ("{module}:uneven", "key_mask must have shape"),
        ("{module}:missing", "my_models has no function 'missing'"),
        ("{module}:not_a_function", "my_models has no function 'not_a_function'"),
        ("no_such_module:make", "there is no module 'no_such_module' here"),
        ("no_such_folder", "MODEL must be a folder of a Hugging Face model, 'minilm', or module:function"),
    ],
)
def test_what_is_no_model_is_told(module, tmp_path, target, message):
    result = run(target.format(module=module), "-o", tmp_path / "small.onnx")
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_folder_without_a_model_is_an_error(tmp_path):
    result = run(tmp_path, "-o", tmp_path / "small.onnx")
    assert result.exit_code == 1
    assert "can't load a model" in result.output


def test_a_model_in_bf16_is_refused_by_name(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=99)
    BertModel(config).bfloat16().save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "-o", tmp_path / "small.onnx")
    assert result.exit_code == 1
    assert "torch.bfloat16: call model.float() or model.half() first" in " ".join(result.output.split())
