"""Files of each version that was released run today, on their bodies and on the library's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import fastattn
from fastattn import export
from fastattn.export.ops import domain
from fastattn.kernels.cpu.build import find_compiler
from tests.export import written

VERSIONS = sorted(path.stem for path in written.FOLDER.glob("*.npz"))
CPU = ["CPUExecutionProvider"]


def unpacked(version: str, method: str, folder: Path) -> tuple[Path, Any]:
    """The file, and the inputs and the output that were kept with it."""
    kept = np.load(written.FOLDER / f"{version}.npz")
    path = folder / f"{method}.onnx"
    path.write_bytes(kept[f"{method}.onnx"].tobytes())
    return path, kept


def test_this_version_has_its_files() -> None:
    assert fastattn.__version__ in VERSIONS


@pytest.mark.parametrize("method", written.METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_gives_what_it_gave_on_its_bodies(version: str, method: str, tmp_path: Path) -> None:
    path, kept = unpacked(version, method, tmp_path)
    out = written.run(onnxruntime.InferenceSession(str(path), providers=CPU), kept)
    np.testing.assert_allclose(out, kept[f"{method}.out"], atol=1e-5)


@pytest.mark.skipif(find_compiler() is None, reason="the library is built by a C++ compiler")
@pytest.mark.parametrize("method", written.METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_gives_what_it_gave_on_kernels(version: str, method: str, tmp_path: Path) -> None:
    path, kept = unpacked(version, method, tmp_path)
    out = written.run(export.session(path, providers=CPU), kept)
    np.testing.assert_allclose(out, kept[f"{method}.out"], atol=1e-5)


def test_a_file_of_a_later_version_of_our_domain_runs_on_its_bodies_only(tmp_path: Path) -> None:
    path, kept = unpacked(VERSIONS[-1], "smyrf", tmp_path)
    model = onnx.load(path)
    for opset in (x for part in (model, *model.functions) for x in part.opset_import if x.domain == domain.NAME):
        opset.version = domain.VERSION + 1
    onnx.save(model, path)
    out = written.run(onnxruntime.InferenceSession(str(path), providers=CPU), kept)
    np.testing.assert_allclose(out, kept["smyrf.out"], atol=1e-5)
    with pytest.raises(ValueError, match=f"version {domain.VERSION + 1} of domain fastattn, and this fastattn knows"):
        export.session(path, providers=CPU)
