"""What patching leaves on a model, and that all of it can be taken off again."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, BertModel

import fastattn
from fastattn.integrations.transformers import layer_states

SMALL = {"min_length": 0, "impl": "reference", "q_cluster_size": 8}


@torch.no_grad()
def hidden(model, **inputs):
    return model(**inputs).last_hidden_state


def is_patched(model, batch):
    """Whether the method really runs: a model that only looks patched computes what a dense one does."""
    out = hidden(model, **batch)
    implementation = model.config._attn_implementation
    model.config._attn_implementation_internal = "sdpa"
    dense = hidden(model, **batch)
    model.config._attn_implementation_internal = implementation
    return not torch.equal(out, dense)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_restores_the_implementation_that_was_there(build, batch, implementation):
    model = build("bert", implementation)
    dense = hidden(model, **batch)
    assert fastattn.patch(model, "smyrf", **SMALL) is model
    assert model.config._attn_implementation == "fastattn"
    assert is_patched(model, batch)
    assert fastattn.unpatch(model) is model
    assert model.config._attn_implementation == implementation
    assert torch.equal(hidden(model, **batch), dense)
    assert not layer_states(model)
    assert not [name for name, _ in model.named_buffers() if "fastattn" in name]
    fastattn.unpatch(model)  # nothing to do is no error


def test_patching_changes_no_weight_and_no_key_of_the_state_dict(build):
    model = build("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastattn.patch(model, "smyrf")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_weights_can_be_loaded_into_a_patched_model(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", **SMALL)
    other = build("bert")
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.mul_(1.5)
    model.load_state_dict(other.state_dict())
    fastattn.patch(other, "smyrf", **SMALL)
    assert torch.equal(hidden(model, **batch), hidden(other, **batch))


def test_draws_follow_the_model_to_a_device(build):
    model = build("bert")
    fastattn.patch(model, "smyrf")
    model.to("meta")
    assert {b.device.type for n, b in model.named_buffers() if "fastattn" in n} == {"meta"}


def test_patching_again_changes_the_named_layers_only(build, batch):
    model = build("bert", "eager")
    fastattn.patch(model, "smyrf", n_hashes=2, **SMALL)
    fastattn.patch(model, "smyrf", n_hashes=3, layers=[1], **SMALL)
    assert [state.knobs["n_hashes"] for state in layer_states(model).values()] == [2, 3]
    assert hidden(model, **batch).isfinite().all()
    fastattn.unpatch(model)
    assert model.config._attn_implementation == "eager"


def test_a_bad_second_patch_leaves_the_first_as_it_was(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", **SMALL)
    out = hidden(model, **batch)
    with pytest.raises(ValueError):
        fastattn.patch(model, "smyrf", n_hashes=0)
    assert torch.equal(hidden(model, **batch), out)


def test_a_submodule_can_be_patched_and_unpatched_alone(build, batch):
    model = build("bert", "sdpa")
    dense = hidden(model, **batch)
    fastattn.patch(model.encoder.layer[1], "smyrf", **SMALL)
    assert len(layer_states(model)) == 1 and is_patched(model, batch)
    fastattn.patch(model.encoder.layer[0], "smyrf", **SMALL)
    fastattn.unpatch(model.encoder.layer[1])
    assert is_patched(model, batch), "the other layer is still patched"
    fastattn.unpatch(model.encoder.layer[0])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(hidden(model, **batch), dense)


def test_an_encoder_can_be_patched_below_a_decoder(build, batch):
    model = build("bart")
    dense = hidden(model, **batch)
    fastattn.patch(model.encoder, "smyrf", min_length=0, impl="reference", n_hashes=1, q_cluster_size=64)
    # one cluster is dense attention, and the decoder, causal and cross-attention, still sees the masks it needs
    torch.testing.assert_close(hidden(model, **batch), dense, atol=2e-6, rtol=2e-6)


def test_models_with_different_knobs_do_not_interfere(build, batch):
    coarse, fine = build("bert"), build("bert")
    fastattn.patch(coarse, "smyrf", n_hashes=1, **SMALL)
    alone = hidden(coarse, **batch)
    fastattn.patch(fine, "smyrf", n_hashes=6, **SMALL)
    assert torch.equal(hidden(coarse, **batch), alone)
    fastattn.unpatch(fine)
    assert torch.equal(hidden(coarse, **batch), alone)


def test_models_that_share_a_config_are_unpatched_one_by_one(build, batch):
    first = build("bert", "eager")
    second = BertModel(first.config).eval()
    assert first.config is second.config
    fastattn.patch(first, "smyrf", **SMALL)
    fastattn.patch(second, "smyrf", n_hashes=2, **SMALL)
    fastattn.unpatch(first)
    assert is_patched(second, batch) and not is_patched(first, batch)
    fastattn.unpatch(second)
    assert first.config._attn_implementation == "eager"


def test_a_copy_is_patched_by_itself(build, batch):
    model = build("bert", "eager")
    fastattn.patch(model, "smyrf", **SMALL)
    out = hidden(model, **batch)
    twin = copy.deepcopy(model)
    fastattn.unpatch(model)
    assert torch.equal(hidden(twin, **batch), out)
    fastattn.unpatch(twin)
    assert twin.config._attn_implementation == "eager"
    assert torch.equal(hidden(twin, **batch), hidden(model, **batch))


def test_a_pickled_model_comes_back_patched_in_a_process_that_never_patched(build, batch, monkeypatch):
    model = build("bert", "eager")
    fastattn.patch(model, "smyrf", **SMALL)
    out = hidden(model, **batch)
    stored = pickle.dumps(model)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "fastattn")
    again = pickle.load(io.BytesIO(stored))
    assert torch.equal(hidden(again, **batch), out)
    fastattn.unpatch(again)
    assert again.config._attn_implementation == "eager"


def test_a_saved_model_loads_dense(build, batch, tmp_path):
    model = build("bert", "sdpa")
    dense = hidden(model, **batch)
    fastattn.patch(model, "smyrf", **SMALL)
    model.save_pretrained(tmp_path)
    assert "fastattn" not in (tmp_path / "config.json").read_text()
    loaded = BertModel.from_pretrained(tmp_path).eval()
    assert not layer_states(loaded)
    assert torch.equal(hidden(loaded, **batch), dense)


def test_patched_puts_back_what_was_there_before(build, batch):
    model = build("bert", "eager")
    dense = hidden(model, **batch)
    with fastattn.patched(model, "smyrf", **SMALL) as inside:
        assert inside is model and is_patched(model, batch)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(hidden(model, **batch), dense)

    fastattn.patch(model, "smyrf", n_hashes=2, layers=[1], **SMALL)
    out = hidden(model, **batch)
    with pytest.raises(RuntimeError, match="inside"), fastattn.patched(model, "smyrf", n_hashes=5, **SMALL):
        assert len(layer_states(model)) == 2
        raise RuntimeError("inside")
    assert torch.equal(hidden(model, **batch), out)
    assert [state.layer for state in layer_states(model).values()] == [1]
    fastattn.unpatch(model)
    assert model.config._attn_implementation == "eager"
