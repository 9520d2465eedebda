"""What can't be patched, or called, says so; nothing is silently something else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastattn

SMALL = {"min_length": 0, "impl": "reference", "q_cluster_size": 8}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "magic"}, ValueError, ["'magic'", "'smyrf'"]),
        ({"hashes": 4}, ValueError, ["'hashes'", "n_hashes, q_cluster_size, k_cluster_size, correct_duplicates, "]),
        ({"n_hashes": 0}, ValueError, ["n_hashes", "at least 1", "0"]),
        ({"n_hashes": 2.0}, TypeError, ["n_hashes", "2.0", "float"]),
        ({"q_cluster_size": True}, TypeError, ["q_cluster_size", "True"]),
        ({"q_cluster_size": None}, TypeError, ["q_cluster_size", "None"]),
        ({"k_cluster_size": -1}, ValueError, ["k_cluster_size", "-1"]),
        ({"correct_duplicates": 1}, TypeError, ["correct_duplicates", "bool", "int"]),
        ({"local_window": -1}, ValueError, ["local_window", "at least 0", "-1"]),
        ({"directions": "learned"}, ValueError, ["directions", "'learned'", "'principal'"]),
        ({"directions": "principal", "n_hashes": 99}, ValueError, ["n_hashes", "head_dim + 1", "99"]),
        ({"method": "clustered", "n_bits": 64}, ValueError, ["n_bits", "at most 63", "64"]),
        ({"method": "clustered", "topk": 4}, ValueError, ["'topk'", "n_clusters, n_bits, n_iterations, impl"]),
        ({"impl": "cuda"}, ValueError, ["impl", "'cuda'", "'triton'"]),
        ({"layers": [2]}, ValueError, ["layers has 2", "2 attention layers"]),
        ({"layers": [-3]}, ValueError, ["-3"]),
        ({"layers": []}, ValueError, ["layers is empty"]),
        ({"layers": ["1"]}, TypeError, ["layers", "'1'"]),
        ({"min_length": -1}, ValueError, ["min_length", "-1"]),
        ({"min_length": 1.5}, TypeError, ["min_length", "1.5"]),
        ({"seed": "0"}, TypeError, ["seed", "'0'"]),
        ({"generator": 3}, TypeError, ["generator", "int"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_options_are_named(build, options, error, words):
    model = build("bert")
    before = model.config._attn_implementation
    with pytest.raises(error) as caught:
        fastattn.patch(model, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert model.config._attn_implementation == before


def test_only_modules_are_patched():
    with pytest.raises(TypeError, match="model must be a torch"):
        fastattn.patch("bert-base-uncased", "smyrf")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["mpnet"])
def test_a_model_that_the_interface_does_not_reach_is_told_its_attention_classes(build, family):
    with pytest.raises(ValueError, match="MPNetAttention, MPNetSelfAttention"):
        fastattn.patch(build(family), "smyrf")


def test_a_model_without_attention_is_an_error():
    with pytest.raises(ValueError, match="its attention classes: none"):
        fastattn.patch(nn.Linear(2, 2), "smyrf")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", ["GPT2Attention: causal attention (layers 0, 1)"]),
        ("t5", ["T5Attention: a position bias (layers 0, 1)"]),
        (
            "bart",
            ["BartAttention: causal attention (layers 2)", "BartAttention: decoder or cross-attention (layers 3)"],
        ),
        ("modernbert", ["ModernBertAttention: a sliding window (layers 1)"]),
    ],
)
def test_anything_but_bidirectional_self_attention_is_refused(build, family, words):
    model = build(family)
    with pytest.raises(ValueError) as caught:
        fastattn.patch(model, "smyrf")
    assert all(word in str(caught.value) for word in [*words, "layers="]), str(caught.value)
    assert model.config._attn_implementation != "fastattn"


def test_a_decoder_of_a_bidirectional_class_is_refused(build):
    from transformers import BertConfig, BertModel

    with pytest.raises(ValueError, match="BertSelfAttention: causal attention"):
        fastattn.patch(BertModel(BertConfig(**{**build("bert").config.to_dict(), "is_decoder": True})), "smyrf")


def test_causality_that_shows_only_at_the_call_is_refused_there(build, batch):
    model = build("clip_text")
    fastattn.patch(model, "smyrf", **SMALL)
    with pytest.raises(ValueError, match=r"layer 0 \(CLIPAttention\).*causal"):
        model(**batch)


def test_a_custom_mask_is_refused(build, batch):
    model = build("bert")
    fastattn.patch(model, "smyrf", **SMALL)
    pattern = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 50, 50\)"):
        model(input_ids=batch["input_ids"], attention_mask=pattern)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        model(input_ids=batch["input_ids"], attention_mask=torch.zeros(2, 1, 1, 50))


def test_attention_matrices_cannot_be_asked_for(build, batch):
    model = build("bert", "eager")
    fastattn.patch(model, "smyrf", **SMALL)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch, output_attentions=True)
    fastattn.unpatch(model)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        fastattn.patch(model, "smyrf")


def test_attention_dropout_is_never_silently_dropped(build, batch):
    model = build("bert").train()
    fastattn.patch(model, "smyrf", **SMALL)
    with pytest.raises(ValueError, match=r"layer 0 .*dropout 0.1, .*set the model's attention dropout to 0"):
        model(**batch)
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    assert model(**batch).last_hidden_state.isfinite().all()


def test_a_cache_is_refused(build, batch):
    from transformers import DynamicCache

    model = build("bert")
    fastattn.patch(model, "smyrf", layers=[1], **SMALL)
    self_attention = model.encoder.layer[1].attention.self
    cache = DynamicCache()
    cache.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), self_attention.layer_idx)
    with pytest.raises(ValueError, match="50 queries and 53 keys"):
        self_attention(torch.zeros(2, 50, 32), past_key_values=cache)
