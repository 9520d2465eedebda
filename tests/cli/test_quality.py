"""What the demo measures on embeddings."""

from __future__ import annotations

import pytest
import torch

from fastattn.cli import _minilm, _quality

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,  # large enough for attention to be far from uniform
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(99, (6, 12), generator=generator) for _ in range(2))
    return _minilm.Halves([str(i) for i in range(6)], first, second)


def test_recall_counts_rows_that_find_their_own():
    targets = torch.eye(4)
    assert _quality.recall_at_1(targets, targets) == 1.0
    assert _quality.recall_at_1(targets[[0, 1, 3, 2]], targets) == 0.5


def test_embeddings_are_means_over_tokens_at_unit_length(model):
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    embedded = _quality.embed_batch(model, ids)
    mean = model(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(embedded, mean / mean.norm(dim=-1, keepdim=True))


def test_dense_attention_has_cosine_one_and_a_step_for_every_batch(model, texts):
    score, heard = _quality.Score(), []
    _quality.judge(model, texts, score, None, lambda: heard.append(1))
    assert score.cosine == [pytest.approx(1.0, abs=1e-6)]
    assert len(heard) == _quality.steps(texts, 1)


def test_a_second_seed_adds_a_cosine_and_leaves_the_recall(model, texts):
    score, heard = _quality.Score(), []
    dense = _quality.judge(model, texts, score, None, lambda: heard.append(1))
    recall = score.recall
    _quality.judge(model, texts, score, -dense, lambda: heard.append(1))
    assert score.cosine[1] == pytest.approx(-1.0, abs=1e-6)
    assert score.recall == recall
    assert len(heard) == _quality.steps(texts, 2)


def test_uniform_attention_is_attention_whose_scores_are_all_zero():
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    out, weights = _quality._uniform(torch.nn.Identity(), q, k, v, None)
    zero_scores = torch.nn.functional.scaled_dot_product_attention(0 * q, k, v)
    torch.testing.assert_close(out, zero_scores.transpose(1, 2))
    assert weights is None


def test_uniform_attention_refuses_padding():
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="padding"):
        _quality._uniform(torch.nn.Identity(), x, x, x, torch.tensor([[[[True, False]]]]))


def test_uniform_attention_changes_the_model_inside_the_block_alone(model, texts):
    dense = _quality.embed_batch(model, texts.first)
    with _quality.uniform_attention(model):
        uniform = _quality.embed_batch(model, texts.first)
    assert (uniform - dense).abs().max() > 1e-3
    torch.testing.assert_close(_quality.embed_batch(model, texts.first), dense, rtol=0, atol=0)
