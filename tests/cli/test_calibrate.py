"""``fastattn calibrate``: a folder with a model and its tokenizer, a text, a table, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

import transformers

import fastattn
from fastattn.cli import calibrate as cli
from fastattn.cli.main import app
from fastattn.integrations.transformers import layer_states

WORDS = [f"w{number}" for number in range(40)]
FAST = ("--longest", "0", "--seconds", "0.01", "--draws", "1", "--knob", "impl=reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT, its tokenizer of forty words, and a text of 300 of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    place = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate(["[CLS]", "[SEP]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    marks = [("[CLS]", 0), ("[SEP]", 1)]
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=marks
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(place)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=80, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(place)
    (place / "text.txt").write_text(" ".join(WORDS[number * number % 40] for number in range(300)))
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(*words: Any, fails: bool = False) -> str:
    result = CliRunner().invoke(app, ["calibrate", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.output


def test_it_prints_the_settings_and_keeps_the_choice_for_patch(folder: Path, cache: Path):
    pytest.importorskip("matplotlib")
    drawing = cache / "front.svg"
    text = ("--text", folder / "text.txt", "--length", 64, "--batch", 3)
    knobs = ("--knob", "q_cluster_size=8,64", "--max-error", 0.001)
    said = run(folder, *text, *knobs, *FAST, "--plot", drawing)
    assert "batch 3, 4 heads of 8, 64 tokens, float32" in said
    assert [line.split()[:3] for line in said.splitlines() if line.startswith("chosen")] == [
        ["chosen", "64", "reference"]
    ]
    assert "cosine of the model's last hidden states to those with dense attention: 1.000" in said
    assert str(cache / "calibrations.json") in said and drawing.exists()
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    fastattn.patch(model, "smyrf", knobs="calibrated")
    assert {state.knobs["q_cluster_size"] for state in layer_states(model).values()} == {64}


def test_each_layer_has_a_line_if_asked_and_nothing_is_kept_if_not(folder: Path, cache: Path):
    text = ("--text", folder / "text.txt", "--length", 64, "--no-store", "--per-layer")
    said = run(folder, *text, *FAST, "--method", "clustered", "--knob", "n_clusters=2,8", "--max-error", 5)
    assert [line.split()[0] for line in said.splitlines() if "n_clusters" in line] == ["0", "1"]
    assert "stored" not in said and not (cache / "calibrations.json").exists()


def test_it_fails_where_nothing_is_within_the_budget(folder: Path):
    text = ("--text", folder / "text.txt", "--length", 64)
    said = run(folder, *text, *FAST, "--knob", "q_cluster_size=8", "--max-error", 1e-6, fails=True)
    assert "no setting of 'smyrf' has an error of at most 1e-06: the least is" in said


def test_pieces_of_a_text_are_consecutive_and_topics_give_one_each(folder: Path):
    model, tokenizer = cli._load(str(folder))
    ids = cli.tokens(model, tokenizer, folder / "text.txt", 3, 66)
    assert ids.shape == (3, 66) and ids[:, 0].tolist() == [0] * 3 and ids[:, -1].tolist() == [1] * 3
    assert ids[:, 1:-1].flatten().tolist() == [3 + number * number % 40 for number in range(192)]
    assert cli.tokens(model, tokenizer, None, 2, 80).shape == (2, 80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--length", 90), "length must be at most the model's 80 positions, got 90"),
        (("--length", 64, "--batch", 9), "has 4 pieces of 64 tokens, and batch is 9"),
        (("--dtype", "fp8"), "dtype must be one of fp32, fp16, bf16, got 'fp8'"),
        (("--length", 64, "--method", "lsh"), "a model can't be patched with 'lsh'"),
        (("--length", 64, "--knob", "n_hashes"), "a knob is name=value,value"),
        (("--length", 64, "--knob", "topk=2"), "unknown knob 'topk'"),
        (("--length", 64, "--max-error", 0), "max_error must be finite and above 0"),
        (("--device", "cuda:zero"), "cuda:zero"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_options_are_named(folder: Path, options: tuple[Any, ...], message: str):
    assert message in run(folder, "--text", folder / "text.txt", *options, fails=True)


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    assert "can't load a model with its tokenizer from" in run(tmp_path, fails=True)
    assert "model must be a folder or 'minilm', got 'bert'" in run("bert", fails=True)
