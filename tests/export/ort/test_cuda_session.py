"""A library for GPUs leaves to ONNX Runtime what has no kernel there, and says for which GPUs it can be built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import Tensor

from fastattn.export import functions
from fastattn.export.ort import needs, session
from fastattn.export.ort.library import build_library

DIM, LENGTH, ROUNDS = 16, 77, 2


def smyrf_model(head_dim: int) -> bytes:
    """One node of the whole method: q, k, v and projections to out."""
    inputs = ["q", "k", "v", "projections", "mask", "mask"]
    attributes = {"q_cluster_size": DIM, "k_cluster_size": 0, "scale": 0.25, "packed": 1}
    node = helper.make_node("SmyrfAttention", inputs, ["out", "lse"], domain="fastattn", **attributes)
    shapes = {name: [2, 3, LENGTH, head_dim] for name in "qkv"} | {"projections": [head_dim + 2, ROUNDS]}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, shapes["q"])
    everyone = helper.make_tensor("mask", TensorProto.BOOL, [1, 1], [True])
    model = helper.make_model(
        helper.make_graph([node], "smyrf", given, [out], [everyone]),
        functions=[ir.serde.serialize_function(body) for body in functions.bodies({"SmyrfAttention"})],
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("fastattn", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def run(model: bytes, head_dim: int, library: Path | None) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    of_model = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    given = {x.name: random.standard_normal(x.shape, dtype=np.float32) for x in of_model.get_inputs()}
    return torch.from_numpy(of_model.run(["out"], given)[0])


@pytest.fixture(scope="module")
def library() -> Path:
    """For one GPU, and for the CPU what that has too; of this no kernel runs here."""
    ops = "SmyrfHash", "BlockAttention"
    calls = [needs.Call(op, torch.float32, DIM, DIM, torch.float32, {"q_cluster_size": DIM}) for op in ops]
    return build_library(needs.variants(calls), cuda={"cuda:80": []})


def test_a_whole_methods_node_runs_its_body_and_that_the_librarys_kernels(library: Path) -> None:
    """As on a GPU, where the body's other nodes are ONNX Runtime's own."""
    model = smyrf_model(DIM)
    torch.testing.assert_close(run(model, DIM, library), run(model, DIM, None), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgument, match="SmyrfHash: this library has no smyrf_hash_project"):
        run(smyrf_model(DIM + 8), DIM + 8, library)


def test_of_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"architecture must be one of sm_80, .*, got 'sm_75'"):
        session.custom_ops_library(cuda=["sm_90", "sm_75"])


def test_a_session_on_gpus_is_for_those_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(smyrf_model(DIM))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"cuda must say for which GPUs, such as \('sm_90',\): torch sees none"):
        session.session(path, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at: [(9, 0), (8, 6), (9, 0)][at])
    asked = []

    def instead(path: Path, cuda: list[str]) -> Path:
        asked.append(cuda)
        raise FileNotFoundError

    monkeypatch.setattr(session, "custom_ops_library", instead)
    for providers in (["CPUExecutionProvider"], [("CUDAExecutionProvider", {"device_id": 2}), "CPUExecutionProvider"]):
        with pytest.raises(FileNotFoundError):
            session.session(path, providers=providers)
    assert asked == [[], ["sm_86", "sm_90"]]
