"""What the README tells people to type works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastattn.cli import main
from fastattn.kernels.cpu.build import find_compiler

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
LINES = [line.split(" #")[0].strip() for language, text in BLOCKS if not language for line in text.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("fastattn ")]
TARGETS = [line.split()[1] for line in LINES if line.startswith("make ")]


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_the_python_runs_in_the_order_in_which_it_stands(model):
    names = {"model": model}
    for language, text in BLOCKS:
        if language == "python":
            exec(text, names)
    assert names["out"].shape == (1, 8, 16384, 64)
    assert "fastattn" not in model.config._attn_implementation


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, model, tmp_path, monkeypatch):
    if command.split()[1] in ("build", "tune") and find_compiler() is None:
        pytest.skip("building and tuning need a C++ compiler")
    model.save_pretrained(tmp_path / "MODEL_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "cache"))
    arguments = shlex.split(command.replace("30s", "5s"))[1:]
    result = CliRunner().invoke(main.app, arguments)
    assert result.exit_code == 0, result.output


def test_the_readme_names_its_commands_and_make_knows_its_targets():
    assert len(COMMANDS) == 8
    assert TARGETS == ["demo", "test"]
    known = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in (*TARGETS, "bench", "fuzz", "tritons"):
        assert f"make {target} " in known
