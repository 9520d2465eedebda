"""Whisper: its encoder's self-attention is reached, and nothing of its decoder."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fastattn
from fastattn.integrations.transformers import layer_states

SMALL = {"min_length": 0, "impl": "reference"}
LIMITS = {  # in which the method is dense attention
    "smyrf": {"n_hashes": 1, "q_cluster_size": 150},
    "improved_clustered": {"n_clusters": 3, "topk": 150},
}
FEW = {
    "smyrf": {"n_hashes": 1, "q_cluster_size": 16},
    "clustered": {"n_clusters": 4, "n_bits": 8},
    "improved_clustered": {"n_clusters": 4, "n_bits": 8, "topk": 4},
}


@pytest.fixture
def model(build):
    return build("whisper")


@pytest.fixture
def inputs():
    """300 frames, which are 150 positions, of two utterances, and what the decoder has said."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(2, 8, 300, generator=draw)
    return {"input_features": features, "decoder_input_ids": torch.randint(5, 99, (2, 7), generator=draw)}


@torch.no_grad()
def run(model, inputs):
    return model(**inputs, use_cache=False)


@pytest.mark.parametrize("method", LIMITS)
def test_the_encoder_is_dense_in_the_limit(model, inputs, method):
    dense = run(model, inputs)
    fastattn.patch(model.encoder, method, **LIMITS[method], **SMALL)
    patched = run(model, inputs)
    assert_close(patched.encoder_last_hidden_state, dense.encoder_last_hidden_state, atol=1e-5, rtol=1e-5)
    assert_close(patched.last_hidden_state, dense.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", FEW)
def test_the_decoder_computes_what_it_did(model, inputs, method):
    """Given the encoder's states, its causal self-attention and its cross-attention are bit for bit what they were."""
    dense = run(model, inputs)
    fastattn.patch(model.encoder, method, **FEW[method], **SMALL)
    assert set(layer_states(model)) == {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn"}
    patched = run(model, inputs)
    assert (patched.encoder_last_hidden_state - dense.encoder_last_hidden_state).abs().max() > 1e-3
    given = {
        "encoder_outputs": (patched.encoder_last_hidden_state,), "decoder_input_ids": inputs["decoder_input_ids"]
    }  # fmt: skip
    with_patch = run(model, given).last_hidden_state
    assert torch.equal(with_patch, patched.last_hidden_state)
    fastattn.unpatch(model)
    assert torch.equal(run(model, given).last_hidden_state, with_patch)


def test_a_later_token_changes_nothing_before_it(model, inputs):
    fastattn.patch(model.encoder, "smyrf", **FEW["smyrf"], **SMALL)
    once = run(model, inputs).last_hidden_state
    inputs["decoder_input_ids"][:, 4:] = 5
    again = run(model, inputs).last_hidden_state
    assert torch.equal(again[:, :4], once[:, :4])
    assert not torch.equal(again[:, 4:], once[:, 4:])


def test_tokens_are_generated_as_without_a_cache(model, inputs):
    """With a cache the decoder sees one token at a time, and past keys: no patched layer stands in its way."""
    fastattn.patch(model.encoder, "smyrf", **FEW["smyrf"], **SMALL)
    whole = run(model, inputs).last_hidden_state
    first = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :6]}
    with torch.no_grad():
        past = model(**first, use_cache=True)
        step = model(
            encoder_outputs=(past.encoder_last_hidden_state,), past_key_values=past.past_key_values,
            decoder_input_ids=inputs["decoder_input_ids"][:, 6:], use_cache=True,
        )  # fmt: skip
    assert_close(step.last_hidden_state[:, 0], whole[:, 6], atol=1e-5, rtol=1e-5)


def test_the_whole_model_is_refused_and_its_encoder_named(model):
    with pytest.raises(ValueError) as caught:
        fastattn.patch(model, "smyrf")
    words = ["causal attention (layers 2)", "decoder or cross-attention (layers 3)", "such as its encoder"]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not layer_states(model)


def test_layers_of_the_encoder_may_be_named_in_the_whole_model(model):
    fastattn.patch(model, "smyrf", layers=[0, 1], **SMALL)
    assert set(layer_states(model)) == {"encoder.layers.0.self_attn", "encoder.layers.1.self_attn"}
