"""Calibrating a model: what is taken from it, the stored choice, and patching with it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import fastattn
from fastattn.autotune.measure import Timing
from fastattn.integrations import calibrate_timing
from fastattn.integrations.calibrate_capture import capture
from fastattn.integrations.calibrate_store import LayerChoice, key_of, read, store_file, write
from fastattn.integrations.transformers import layer_states, layers_to_patch

GRID = {"impl": ["reference"], "q_cluster_size": [8, 64]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a clock by which dense attention takes 1000 µs and settings 10, 20, ... in their order."""

    def turns(calls: Mapping[Hashable, Callable[[], object]], *_: Any, **__: Any) -> dict[Hashable, Timing]:
        return {name: Timing(us, us, us, 1) for us, name in zip((1000, *range(10, 1000, 10)), calls, strict=False)}

    monkeypatch.setattr(calibrate_timing, "take_turns", turns)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path))
    return tmp_path


def calibrate(model: Any, batch: Any, **options: Any) -> Any:
    return fastattn.calibrate(
        model, **{"batch": batch, "max_error": 1e-4, "draws": 1, "longest": 0, "grid": GRID, **options}
    )


@torch.no_grad()
def hidden(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs).last_hidden_state


def test_what_is_measured_is_what_patched_layers_get_from_a_dense_model(build, batch):
    model = build("bert")
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("attention.self.query"):
            module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, out))
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", layers=[0], min_length=0, impl="reference", n_hashes=1, q_cluster_size=8)
    patched = hidden(model, **batch)
    seen.clear()
    samples, output = capture(model, batch, [1])
    assert torch.equal(output.last_hidden_state, dense)
    (sample,) = samples[1]
    (q,) = (out for name, out in seen.items() if "layer.1." in name)
    assert torch.equal(sample.q, q.view(2, 50, 4, 8).transpose(1, 2))
    assert torch.equal(sample.key_mask, batch["attention_mask"].bool())
    assert torch.equal(hidden(model, **batch), patched)


def test_a_layer_that_is_called_several_times_has_a_sample_for_each(build, batch):
    samples, _ = capture(build("albert"), batch, [0])
    assert len(samples[0]) == 2


def test_the_model_is_left_as_it_was(build, batch):
    model = build("bert", "eager")
    before, state = hidden(model, **batch), torch.get_rng_state()
    found = calibrate(model, batch)
    assert found.has_choice and not layer_states(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(hidden(model, **batch), before)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def test_the_stored_choice_is_what_patch_uses(build, batch, cache, monkeypatch):
    monkeypatch.setattr(calibrate_timing, "_wins", lambda space, sample, knobs, seed: sample.length >= 96)
    model = build("bert")
    dense = hidden(model, **batch)
    found = calibrate(model, batch, longest=512)
    assert found.knobs == {"impl": "reference", "q_cluster_size": 64} and found.min_length == 96
    assert found.file == cache / "calibrations.json"
    assert found.cosine == pytest.approx(1.0, abs=1e-5)
    assert [row.cosine is not None for row in found.rows] == [row in found.front for row in found.rows]

    fastattn.patch(model, "smyrf", knobs="calibrated")
    for state in layer_states(model).values():
        assert state.knobs["q_cluster_size"] == 64 and state.knobs["n_hashes"] == 4
        assert state.min_length == 96
    fastattn.patch(model, "smyrf", knobs="calibrated", min_length=0)
    torch.testing.assert_close(hidden(model, **batch)[0], dense[0], atol=1e-5, rtol=1e-4)  # one cluster is dense

    # another model of this size, and a part of it, has the choice too
    fastattn.patch(build("bert").encoder, "smyrf", knobs="calibrated")


def test_a_calibration_can_be_handed_to_patch_unstored(build, batch, cache):
    model = build("bert")
    found = calibrate(model, batch, store=False)
    assert found.file is None and not store_file().exists()
    with fastattn.patched(model, "smyrf", knobs=found, min_length=0):
        assert all(state.knobs["q_cluster_size"] == 64 for state in layer_states(model).values())
    assert not layer_states(model)


def test_each_layer_can_have_its_own_choice_and_stays_dense_without_one(build, batch):
    model = build("bert")
    with torch.no_grad():  # of the first layer, attention is uniform, and any keys will do where values are alike
        attention = model.encoder.layer[0].attention.self
        attention.query.weight.zero_()
        attention.value.weight.zero_()
        attention.value.bias.fill_(1.0)
    found = calibrate(model, batch, per_layer=True, grid={**GRID, "q_cluster_size": [8]}, max_error=1e-3)
    assert [front.layers for front in found.fronts] == [(0,), (1,)]
    assert found.fronts[0].choice.knobs["q_cluster_size"] == 8 and found.fronts[1].choice is None
    assert found.cosine == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="see fronts"):
        _ = found.choice
    lines = found.table().splitlines()
    assert lines[2].startswith("0 ") and "q_cluster_size 8" in lines[2] and lines[3].split()[:2] == ["1", "dense"]
    fastattn.patch(model, "smyrf", n_hashes=1)
    fastattn.patch(model, "smyrf", knobs="calibrated")
    assert [state.layer for state in layer_states(model).values()] == [0]


def test_without_a_choice_nothing_is_stored(build, batch):
    found = calibrate(build("bert"), batch, grid={**GRID, "q_cluster_size": [8]}, max_error=1e-6)
    assert found.choice is None and found.cosine is None and found.file is None
    assert not store_file().exists()
    with pytest.raises(ValueError, match="no setting of 'smyrf'"):
        fastattn.patch(build("bert"), "smyrf", knobs=found)


def test_where_nothing_is_stored_the_error_names_the_model_and_the_command(build, batch):
    model = build("bert")
    calibrate(model, batch)
    words = "no calibration of 'clustered' for this model .type bert, hidden_size 32.*run fastattn calibrate"
    with pytest.raises(ValueError, match=words):
        fastattn.patch(model, "clustered", knobs="calibrated")
    with pytest.raises(ValueError, match="in bfloat16 on "):
        fastattn.patch(build("bert").bfloat16(), "smyrf", knobs="calibrated")
    with pytest.raises(ValueError, match="type roberta"):
        fastattn.patch(build("roberta"), "smyrf", knobs="calibrated")


def store(model: Any, length: int, layers: dict[int, LayerChoice], longest: int = 512) -> Path:
    found, _ = layers_to_patch(model, None)
    return write(key_of(found, 0, "smyrf", length), layers, max_error=0.1, longest=longest)


def choice(n_hashes: int, min_length: int | None = 64) -> dict[int, LayerChoice]:
    return dict.fromkeys((0, 1), LayerChoice(knobs={"n_hashes": n_hashes}, min_length=min_length))


def rounds(model: Any) -> set[int]:
    fastattn.patch(model, "smyrf", knobs="calibrated")
    return {state.knobs["n_hashes"] for state in layer_states(model).values()}


def test_of_several_lengths_the_longest_counts_and_of_one_length_the_latest(build):
    model = build("bert")
    for length, n_hashes in ((512, 2), (4096, 3), (1000, 5)):
        store(model, length, choice(n_hashes))
    assert rounds(model) == {3}
    store(model, 3000, choice(7))
    assert rounds(model) == {7} and len(read()) == 3


def test_where_dense_attention_never_loses_patch_asks_for_a_length(build):
    model = build("bert")
    store(model, 512, choice(2, min_length=None))
    with pytest.raises(ValueError, match=r"no length up to 512 .* give min_length="):
        fastattn.patch(model, "smyrf", knobs="calibrated")
    fastattn.patch(model, "smyrf", knobs="calibrated", min_length=2048)
    store(model, 512, choice(2, min_length=None), longest=0)  # it was not asked for
    fastattn.patch(model, "smyrf", knobs="calibrated")
    assert {state.min_length for state in layer_states(model).values()} == {1024}


def test_layers_without_a_calibration_are_named(build):
    model = build("bert")
    store(model, 512, {1: choice(2)[1]})
    with pytest.raises(ValueError, match="about layers 1, not 0"):
        fastattn.patch(model, "smyrf", knobs="calibrated")
    fastattn.patch(model, "smyrf", knobs="calibrated", layers=[-1])
    assert [state.layer for state in layer_states(model).values()] == [1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSON"),
        ('{"schema_version": 1, "calibrations": [{}]}', "calibrations.0.key"),
        ('{"schema_version": 2, "calibrations": []}', "schema version 2"),
    ],
    ids=["half", "strange", "later"],
)
def test_a_damaged_file_counts_as_empty_with_a_warning_and_is_kept_aside_by_the_next(build, cache, text, reason):
    model = build("bert")
    store_file().write_text(text)
    with pytest.warns(RuntimeWarning, match=reason), pytest.raises(ValueError, match="run fastattn calibrate"):
        fastattn.patch(model, "smyrf", knobs="calibrated")
    with pytest.warns(RuntimeWarning, match="are ignored"):
        store(model, 512, choice(2))
    assert (cache / "calibrations.json.unreadable").read_text() == text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rounds(model) == {2}


def test_what_a_later_version_adds_to_an_entry_stays(build, cache):
    model = build("bert")
    file = store(model, 512, choice(2))
    content = json.loads(file.read_text())
    content["calibrations"][0]["energy"] = 7
    file.write_text(json.dumps(content))
    store(model, 4096, choice(3))
    assert [entry.get("energy") for entry in json.loads(file.read_text())["calibrations"]] == [7, None]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "lsh"}, ValueError, ["'lsh'", "Give q, k and v"]),
        ({"batch": None}, TypeError, ["batch", "NoneType"]),
        ({"layers": [5]}, ValueError, ["layers has 5"]),
        ({"is_causal": True}, ValueError, ["is_causal", "q, k and v"]),
        ({"grid": {"topk": [3]}}, ValueError, ["'topk'", "n_hashes"]),
    ],
    ids=str,
)
def test_bad_arguments_are_named(build, batch, options, error, words):
    with pytest.raises(error) as caught:
        calibrate(build("bert"), **{"batch": batch, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_model_in_training_mode_is_refused(build, batch):
    with pytest.raises(ValueError, match="evaluation mode"):
        calibrate(build("bert").train(), batch)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"knobs": "best"}, ValueError, ["'best'", "'calibrated'"]),
        ({"knobs": 3}, TypeError, ["Calibration", "int"]),
        ({"knobs": "calibrated", "n_hashes": 2}, ValueError, ["'n_hashes'", "came as well"]),
    ],
    ids=str,
)
def test_patch_names_bad_knobs(build, options, error, words):
    model = build("bert")
    with pytest.raises(error) as caught:
        fastattn.patch(model, "smyrf", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not layer_states(model)


def test_a_calibration_of_another_method_is_refused(build, batch):
    model = build("bert")
    found = calibrate(model, batch)
    with pytest.raises(ValueError, match="calibration of 'smyrf', and the method is 'clustered'"):
        fastattn.patch(model, "clustered", knobs=found)
