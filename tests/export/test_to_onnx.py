"""A patched model as one .onnx file: what is in it, and that ONNX Runtime computes with it what torch does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch

import fastattn
from fastattn.export import check, inspect, to_onnx


def test_the_file_holds_our_nodes_and_their_bodies(bert_file):
    model = onnx.load(bert_file)
    onnx.checker.check_model(model, full_check=True)
    ours = [node for node in model.graph.node if node.domain == "fastattn"]
    assert [node.op_type for node in ours] == ["SmyrfAttention"] * 2
    functions = {function.name: function for function in model.functions if function.domain == "fastattn"}
    nested = {node.op_type for node in functions["SmyrfAttention"].node if node.domain == "fastattn"}
    assert nested == {"SmyrfBlocks", "BlockAttention"} and nested < set(functions)
    assert "LshAttention" not in functions, "only the bodies that are reached"
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 18), ("fastattn", 1)}
    assert model.ir_version == 8  # which ONNX Runtime 1.17 reads


def test_the_file_says_what_it_was_made_with(bert_file):
    metadata = {entry.key: entry.value for entry in onnx.load(bert_file).metadata_props}
    assert metadata["fastattn.version"] == fastattn.__version__
    nodes = json.loads(metadata["fastattn.nodes"])
    assert len(nodes) == 2
    assert nodes[0]["op"] == "SmyrfAttention"
    assert (nodes[0]["n_hashes"], nodes[0]["q_cluster_size"], nodes[0]["packed"]) == (2, 16, 1)
    assert (nodes[0]["heads"], nodes[0]["head_dim"], nodes[0]["value_dim"], nodes[0]["dtype"]) == (4, 8, 8, "fp32")
    assert [node["module"] for node in nodes] == [f"encoder.layer.{at}.attention.self" for at in range(2)]


def test_the_draws_are_weights_of_the_file(bert, bert_file):
    weights = [onnx.numpy_helper.to_array(weight) for weight in onnx.load(bert_file).graph.initializer]
    for name, draws in bert.named_buffers():
        if name.endswith("fastattn_draws"):
            assert any(weight.shape == draws.shape and (weight == draws.numpy()).all() for weight in weights)


def test_batch_and_sequence_are_free(bert_file):
    session = onnxruntime.InferenceSession(str(bert_file), providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("last_hidden_state", ["batch", "sequence", 32]),
        ("pooler_output", ["batch", 32]),
    ]


@pytest.mark.parametrize(
    ("batch", "length", "lengths"),
    [
        (1, 1, None),
        (1, 17, None),
        (2, 16, [16, 3]),
        (3, 101, [101, 64, 1]),
        (2, 333, [333, 200]),
        (4, 50, [0, 50, 7, 33]),
    ],
    ids=str,
)
def test_any_batch_and_length_agrees_with_torch(bert, bert_file, make_tokens, batch, length, lengths):
    report = check(bert, bert_file, make_tokens(batch, length, lengths))
    assert report.ok, report
    # Rounding alone. Or, rare enough never to have been seen at these lengths: two nearly equal hashes swapped across a
    # cluster's edge, which moves the rows of these two clusters.
    assert all(error.relative < 1e-5 or error.rows_off * batch * length <= 2 * 16 for error in report.errors), report


def test_padding_changes_nothing_in_onnx_runtime(bert_file, make_tokens):
    session = onnxruntime.InferenceSession(str(bert_file), providers=["CPUExecutionProvider"])

    def hidden(inputs):
        return torch.from_numpy(session.run(["last_hidden_state"], {n: x.numpy() for n, x in inputs.items()})[0])

    padded = make_tokens(2, 90, [90, 53])
    alone = hidden({name: value[1:, :53] for name, value in padded.items()})[0]
    unmasked = hidden({**padded, "attention_mask": torch.ones_like(padded["attention_mask"])})[1, :53]
    assert (hidden(padded)[1, :53] - alone).norm() < 1e-3 * alone.norm()
    assert (unmasked - alone).norm() > 0.1 * alone.norm(), "padding would show if it took part"


def test_check_tells_another_model_apart(bert, bert_file, make_tokens):
    with fastattn.patched(bert, "smyrf", seed=1, n_hashes=2, q_cluster_size=16, min_length=0, impl="reference"):
        report = check(bert, bert_file, make_tokens(2, 100, None), tolerance=1e-3)
    assert not report.ok
    assert "last_hidden_state" in str(report)


def test_a_model_exported_without_a_mask_takes_none(bert, make_tokens, tmp_path):
    ids = {"input_ids": make_tokens(2, 30)["input_ids"]}
    path = to_onnx(bert, ids, tmp_path / "new" / "model.onnx", opset=23, external_data=True, check=True)
    assert path.with_name("model.onnx.data").stat().st_size > path.stat().st_size / 2
    assert next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "") == 23
    assert onnx.load(path, load_external_data=False).ir_version == 11
    onnx.checker.check_model(str(path), full_check=True)
    assert check(bert, path, {"input_ids": make_tokens(3, 71)["input_ids"]}).ok
    with pytest.raises(ValueError, match="the file takes input_ids; sample has attention_mask, input_ids"):
        check(bert, path, make_tokens(2, 30))


def test_grouped_queries_and_layers_left_dense(make_tokens, tmp_path):
    from transformers import EuroBertConfig, EuroBertModel

    torch.manual_seed(0)
    config = EuroBertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=3,
    )
    model = EuroBertModel(config).eval()
    fastattn.patch(model, "smyrf", layers=[1], n_hashes=2, q_cluster_size=16, min_length=0, impl="reference")
    path = to_onnx(model, make_tokens(2, 40, [40, 25]), tmp_path / "model.onnx")
    assert len([node for node in onnx.load(path).graph.node if node.domain == "fastattn"]) == 1
    assert check(model, path, make_tokens(3, 75, [75, 10, 60])).ok


class Cross(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = torch.nn.Buffer(torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, q, k, key_mask=None, query_mask=None):
        return fastattn.smyrf_attention(
            q,
            k,
            k,
            n_hashes=2,
            q_cluster_size=8,
            projections=self.projections,
            key_mask=key_mask,
            query_mask=query_mask,
        )


def test_cross_attention_exports_where_its_rule_is_known(tmp_path):
    free = torch.export.Dim.DYNAMIC
    q, k = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 27, 8)
    to_onnx(Cross().eval(), {"q": q, "k": k}, tmp_path / "fixed.onnx", dynamic_shapes={}, check=True)
    masks = {"key_mask": torch.rand(2, 27) > 0.3, "query_mask": torch.rand(2, 40) > 0.3}
    shapes = {"q": {0: free, 2: free}, "k": {0: free, 2: free}}
    mask_shapes = {"key_mask": {0: free, 1: free}, "query_mask": {0: free, 1: free}}
    path = to_onnx(
        Cross().eval(), {"q": q, "k": k, **masks}, tmp_path / "free.onnx", dynamic_shapes=shapes | mask_shapes
    )
    other = {"q": torch.randn(3, 4, 33, 8), "k": torch.randn(3, 2, 50, 8)}
    other_masks = {"key_mask": torch.rand(3, 50) > 0.3, "query_mask": torch.rand(3, 33) > 0.3}
    assert check(Cross().eval(), path, other | other_masks).ok
    # without a query mask, equal lengths would mean "the same tokens": that is not known here
    with pytest.raises(ValueError, match="give a query_mask"):
        to_onnx(Cross().eval(), {"q": q, "k": k}, tmp_path / "open.onnx", dynamic_shapes=shapes)


def test_what_cannot_be_exported_says_so(bert, make_tokens, tmp_path):
    path, sample = tmp_path / "model.onnx", make_tokens(2, 30)
    with pytest.raises(TypeError, match="model must be a torch"):
        to_onnx("bert", sample, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sample must be a mapping"):
        to_onnx(bert, sample["input_ids"], path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"sample\['input_ids'\] must be a tensor, got list"):
        to_onnx(bert, {"input_ids": [1, 2]}, path)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="opset must be an int from 18 to 23, got 17"):
        to_onnx(bert, sample, path, opset=17)
    with pytest.raises(ValueError, match=r"shape \(1, 30\): batch and length must be at least 2"):
        to_onnx(bert, make_tokens(1, 30), path)
    with fastattn.patched(bert, "smyrf", min_length=64), pytest.raises(ValueError, match="Patch with min_length=0"):
        to_onnx(bert, sample, path)
    bert.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            to_onnx(bert, sample, path)
        with pytest.raises(ValueError, match="training mode"):
            check(bert, path, sample)
    finally:
        bert.eval()
    assert not path.exists()


def test_a_model_in_fp16_is_one_in_fp16_there(bert, make_tokens, tmp_path):
    half = copy.deepcopy(bert).half()
    path = to_onnx(half, make_tokens(2, 40, [40, 25]), tmp_path / "model.onnx")
    weights = [weight for weight in onnx.load(path).graph.initializer if len(weight.raw_data) > 1000]
    assert len(weights) > 10 and onnx.TensorProto.FLOAT not in {weight.data_type for weight in weights}
    assert [node.dtype for node in inspect(path).nodes] == ["fp16"] * 2
    # one cluster, in which no order matters: rounding alone
    report = check(half, path, make_tokens(3, 16, [16, 9, 1]))
    assert all(error.relative < 3e-3 for error in report.errors), report
    # others: rounding to 11 bits decides between many nearly equal hashes, in torch as well
    report = check(half, path, make_tokens(3, 101, [101, 64, 1]))
    assert report.ok, report


def test_metadata_of_the_caller_stands_beside_ours_and_not_for_it(bert, make_tokens, tmp_path):
    with pytest.raises(ValueError, match=r"metadata has fastattn\.nodes, which is written anyway"):
        to_onnx(bert, make_tokens(2, 30), tmp_path / "model.onnx", metadata={"nodes": []})


def test_sizes_that_are_not_free_are_told(bert, make_tokens, tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, hidden):
            q = hidden.view(2, 20, 2, 8).transpose(1, 2)
            return fastattn.smyrf_attention(q, q, q, n_hashes=2, q_cluster_size=8)

    with pytest.raises(ValueError, match=r"Fixed can't be traced with these dimensions free: hidden: \[0, 1\]; name"):
        to_onnx(Fixed().eval(), {"hidden": torch.randn(2, 20, 16)}, tmp_path / "model.onnx")


def test_other_dtypes_and_unpatched_models_are_refused(make_tokens, tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=99)
    model = BertModel(config).eval()
    with pytest.raises(ValueError, match="no fastattn node: patch the model first"):
        to_onnx(model, make_tokens(2, 30), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"only models in fp32 and fp16 .* torch.bfloat16"):
        to_onnx(model.bfloat16(), make_tokens(2, 30), tmp_path / "model.onnx")


def test_a_missing_extra_is_named(bert, make_tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript: pip install fastattn\[onnx\]"):
        to_onnx(bert, make_tokens(2, 30), tmp_path / "model.onnx")


def test_importing_the_package_imports_no_onnx():
    code = "import sys, fastattn.export; sys.exit(any(m in sys.modules for m in ('onnx', 'onnxscript', 'onnxruntime')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
