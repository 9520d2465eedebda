"""Exported models on the library: the same results as their bodies and torch, whatever runs at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.export import session, to_onnx
from fastattn.export.ort.model import calls
from fastattn.kernels.cpu.build import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
HEADS, DIM = 4, 32
FREE = torch.export.Dim.DYNAMIC


class Smyrf(nn.Module):
    """Two nodes of different clusters and directions."""

    def __init__(self) -> None:
        super().__init__()
        directions = torch.randn(2, DIM + 2, 2, generator=torch.Generator().manual_seed(0))
        self.directions = nn.Buffer(directions)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
        for size, directions in zip((16, 24), self.directions, strict=True):
            q = fastattn.smyrf_attention(
                q, k, v, q_cluster_size=size, projections=directions, key_mask=key_mask, n_hashes=2
            )
        return q


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(length)
    given = {
        name: torch.randn(batch, heads, length, DIM, generator=g) for name, heads in (("q", 4), ("k", 2), ("v", 2))
    }
    mask = torch.rand(batch, length, generator=g) > 0.2
    mask[:, 0] = True
    return {name: x.to(dtype) for name, x in given.items()} | {"key_mask": mask}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(Smyrf().eval(), tmp_path_factory.mktemp("onnx") / "smyrf.onnx")


def export(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    free = {0: FREE, 2: FREE}
    shapes = {"q": free, "k": free, "v": free, "key_mask": {0: FREE, 1: FREE}}
    return to_onnx(model, inputs(2, 50, dtype), path, dynamic_shapes=shapes)


def run(made: onnxruntime.InferenceSession, given: dict[str, Tensor]) -> np.ndarray:
    return np.asarray(made.run(None, {name: x.numpy() for name, x in given.items()})[0])


@pytest.mark.parametrize("batch, length", [(1, 1), (2, 50), (3, 133)])
def test_results_are_those_of_torch_and_of_the_bodies(file: Path, batch: int, length: int) -> None:
    given = inputs(batch, length)
    wanted = Smyrf().eval()(**given).numpy()
    bodies = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(run(session(file), given), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(bodies, given), wanted, rtol=1e-4, atol=1e-4)


def test_half_models_run_too(tmp_path: Path) -> None:
    model = Smyrf().half().eval()
    file = export(model, tmp_path / "half.onnx", torch.float16)
    given = inputs(2, 70, torch.float16)
    np.testing.assert_allclose(run(session(file), given), model(**given).numpy(), rtol=2e-3, atol=2e-3)


def test_the_nodes_are_run_by_the_library_and_not_by_their_bodies(file: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # a file that was optimised for this machine is what is wanted
    session(file, options=options)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    ours = [node.op_type for node in optimized.graph.node if node.domain == "fastattn"]
    assert sorted(ours) == sorted(2 * ["SmyrfHash", "SortedBlocks", "SortedBlocks", "BlockAttention"])
    assert not any(node.op_type in ("TopK", "ScatterElements") for node in optimized.graph.node)


def test_runs_at_the_same_time_give_the_same_bits(file: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    made = session(file, options=options)
    given = [inputs(2, length) for length in (40, 133, 70)]
    alone = [run(made, x) for x in given]
    with ThreadPoolExecutor(4) as pool:
        together = [*pool.map(lambda at: run(made, given[at % 3]), range(24))]
    assert all(np.array_equal(result, alone[at % 3]) for at, result in enumerate(together))


def test_results_do_not_depend_on_the_number_of_threads(file: Path) -> None:
    given = inputs(2, 133)
    results = []
    for threads in (1, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        results.append(run(session(file, options=options), given))
    assert np.array_equal(*results)


def test_a_model_names_what_it_needs_and_no_more(file: Path) -> None:
    found = calls(file)
    assert [call.op for call in found] == 2 * ["SmyrfHash", "SortedBlocks", "SortedBlocks", "BlockAttention"]
    of_rows = [call for call in found if call.op != "SortedBlocks"]
    assert {(call.head_dim, call.value_dim, call.dtype) for call in of_rows} == {(DIM, DIM, torch.float32)}
    assert [call.attributes["q_cluster_size"] for call in found if call.op == "BlockAttention"] == [16, 24]


def test_a_model_without_our_nodes_is_refused(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"])]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "none", [x], [y])), tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="has no node of domain fastattn"):
        session(tmp_path / "none.onnx")


def without_shapes(file: Path, path: Path, *, keep_notes: bool) -> Path:
    model: Any = onnx.load(file)
    for value in (*model.graph.input, *model.graph.value_info):
        value.type.tensor_type.ClearField("shape")
    if not keep_notes:
        model.ClearField("metadata_props")
    onnx.save(model, path)
    return path


def test_what_the_export_noted_serves_where_shapes_were_lost(file: Path, tmp_path: Path) -> None:
    stripped = without_shapes(file, tmp_path / "stripped.onnx", keep_notes=True)
    assert calls(stripped) == calls(file)


def test_sizes_that_a_model_does_not_tell_are_an_error_that_says_what_to_do(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the last dimension of SmyrfAttention's input q"):
        session(without_shapes(file, tmp_path / "shapeless.onnx", keep_notes=False))
