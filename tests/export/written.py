"""Files as each version of fastattn writes them, kept with what came out of them: ``python -m tests.export.written``
adds this version's, once and for all, when it is released."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastattn
from fastattn import export

FOLDER = Path(__file__).with_name("written")
METHODS = ("smyrf", "smyrf_causal", "lsh", "clustered", "improved_clustered", "linear", "linear_causal")


class Method(nn.Module):
    """A module that is one call of ``function`` on q, k and v."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(q, k, v)


def methods(head_dim: int, n_hashes: int, n_clusters: int) -> dict[str, Method]:
    """A module for each of :data:`METHODS`, with draws of its own."""
    g = torch.Generator().manual_seed(0)
    projections = torch.randn(head_dim + 2, n_hashes, generator=g)
    rotations = torch.randn(2, head_dim, n_hashes, 4, generator=g)
    smyrf: dict[str, Any] = {"n_hashes": n_hashes, "projections": projections}
    causal: dict[str, Any] = {"is_causal": True, "correct_duplicates": True, "local_window": 32}
    functions: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
        lambda q, k, v: fastattn.smyrf_attention(q, k, v, **smyrf),
        lambda q, k, v: fastattn.smyrf_attention(q, k, v, **smyrf, **causal),
        lambda q, k, v: fastattn.lsh_attention(q, v, n_hashes=n_hashes, rotations=rotations, is_causal=True),
        lambda q, k, v: fastattn.clustered_attention(q, k, v, n_clusters=n_clusters),
        lambda q, k, v: fastattn.improved_clustered_attention(q, k, v, n_clusters=n_clusters, topk=16),
        lambda q, k, v: fastattn.linear_attention(q, k, v),
        lambda q, k, v: fastattn.linear_attention(q, k, v, is_causal=True),
    )
    return {name: Method(function).eval() for name, function in zip(METHODS, functions, strict=True)}


def sample(length: int, head_dim: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, 2, length, head_dim, generator=g) for name in "qkv"}


def write(model: nn.Module, given: dict[str, Tensor], path: Path) -> None:
    """The file of a model with any length."""
    length = {2: torch.export.Dim("length", min=2)}
    export.to_onnx(model, given, path, dynamic_shapes=dict.fromkeys("qkv", length))


def run(session: Any, given: dict[str, Any]) -> Any:
    """The one output for those of the inputs that the model takes."""
    return session.run(None, {value.name: np.asarray(given[value.name]) for value in session.get_inputs()})[0]


def main() -> None:
    import onnxruntime

    kept = FOLDER / f"{fastattn.__version__}.npz"
    if kept.exists():
        sys.exit(f"{kept} is there: what a version wrote stays as it is")
    given = sample(length=150, head_dim=16)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in given.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in methods(head_dim=16, n_hashes=2, n_clusters=10).items():
            path = Path(folder, f"{name}.onnx")
            write(model, given, path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            arrays[f"{name}.onnx"] = np.frombuffer(path.read_bytes(), np.uint8)
            arrays[f"{name}.out"] = run(session, given)
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(kept, **arrays)


if __name__ == "__main__":
    main()
