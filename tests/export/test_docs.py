"""docs/onnx.md: its commands print what stands there, but for the numbers, and its Python runs in the order it has."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastattn
from fastattn.cli import main
from fastattn.kernels.cpu.build import find_compiler

PAGE = Path(__file__).parents[2].joinpath("docs/onnx.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if not language and text.startswith("$ ")]
PYTHON = [text for language, text in BLOCKS if language == "python"]
(DECODER,) = (text for text in PYTHON if "class Decoder" in text)

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="the library is built by a C++ compiler")


@pytest.fixture(scope="module")
def model() -> Any:
    """A small model in place of the page's, which has the same layers and needs no weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=99)
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's commands run, one after the other; decoder.py is there."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "decoder.py").write_text(DECODER)
    return folder


@pytest.fixture
def page(model, folder, monkeypatch):
    from fastattn.cli import _minilm

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "decoder", raising=False)
    monkeypatch.setattr(_minilm, "load", lambda: (fastattn.unpatch(model), None))


def blurred(line):
    return re.sub(r"\d+(\.\d+)*", "#", " ".join(line.split()))


@needs_compiler
@pytest.mark.parametrize("text", SHELL, ids=lambda text: text.splitlines()[0].removeprefix("$ fastattn "))
def test_a_command_prints_what_stands_there(page, text):
    command, *shown = text.splitlines()
    result = CliRunner().invoke(main.app, shlex.split(command.removeprefix("$ fastattn ")), env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    printed = {blurred(line) for line in result.output.splitlines()}
    # whether there are ties, and what comes of them, is for the model and the machine to say
    shown = shown[:1] if "--check" in command else shown
    assert shown
    for line in shown:
        assert blurred(line) in printed, result.output


@needs_compiler
def test_an_encoder_runs_on_bodies_and_on_kernels(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model}
    for text in PYTHON[: PYTHON.index(DECODER)]:
        exec(text, names)
    real = names["mask"]
    np.testing.assert_allclose(names["fused"][real], names["hidden"][real], atol=1e-5)
    assert (tmp_path / "service" / "libfastattn_ort.so").samefile(names["library"])
    ids, mask = torch.tensor(names["ids"]), torch.tensor(real).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    np.testing.assert_allclose(names["hidden"][real], expected[torch.tensor(real)], atol=1e-5)
    (again,) = names["session"].run(["last_hidden_state"], {"input_ids": names["ids"], "attention_mask": mask.numpy()})
    np.testing.assert_array_equal(again, names["fused"])


def test_a_decoder_says_token_by_token_what_it_would_say_at_once(tmp_path, monkeypatch):
    from fastattn import export

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(DECODER, names)
    model, sample, shapes = names["make"]()
    export.to_onnx(model.eval(), sample, "decoder.onnx", dynamic_shapes=shapes)
    loop = PYTHON[-1]
    assert "decoder.onnx" in loop
    exec(loop, names)

    # nothing of what a token gets or gives has a length
    session = names["session"]
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "token": ["batch"], "s": [2, "batch", 4, 16, 16], "z": [2, "batch", 4, 16]
    }  # fmt: skip
    assert {value.name: value.shape for value in session.get_outputs()} == {
        "logits": ["batch", 256], "next_s": [2, "batch", 4, 16, 16], "next_z": [2, "batch", 4, 16]
    }  # fmt: skip

    text = torch.tensor(names["text"])
    assert len(text) == 61
    with torch.no_grad():
        x = model.embed(text[:-1])
        for project, mix in zip(model.project, model.mix, strict=True):
            q, k, v = project(x).unflatten(-1, (3, 4, 16)).permute(1, 2, 0, 3)[:, None]
            out = fastattn.linear_attention(q, k, v, is_causal=True, impl="reference")
            x = x + mix(out[0].transpose(0, 1).flatten(1))
        logits = model.read(x)
    np.testing.assert_allclose(names["logits"][0], logits[-1], atol=1e-4)
    assert text[3:].tolist() == logits[2:].argmax(-1).tolist()
