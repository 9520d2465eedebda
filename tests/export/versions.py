"""Runs exported models in older releases of ONNX Runtime, on bodies and on our kernels: ``make onnxruntimes``.

Each release has a virtual environment of its own, within the one that this script runs in. Models and the library are
made here, with the newest; there they have nothing of ours and no PyTorch.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from fastattn import export
from tests import environments
from tests.export import written

# the oldest whose interface the library asks for, and some between it and today's
RELEASES = ("1.17.3", "1.20.1", "1.22.1")
LENGTH, HEAD_DIM = 333, 64
CLOSE = 1e-5

# What the other environments run: (folder, whether on the library) -> a line for each model that is off.
RUN = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime
given = np.load(Path(sys.argv[1], "inputs.npz"))
for file in sorted(Path(sys.argv[1]).glob("*/model.onnx")):
    for fused in (False, True):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if fused:
            options.register_custom_ops_library(str(file.with_name("libfastattn_ort.so")))
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        (out,) = session.run(None, {value.name: given[value.name] for value in session.get_inputs()})
        off = float(np.abs(out - np.load(file.with_name("expected.npy"))).max())
        if not off <= float(sys.argv[2]):
            sys.exit(f"{file.parent.name}, {'kernels' if fused else 'bodies'}: off by {off:.1e}")
print(onnxruntime.__version__)
"""


def make(folder: Path) -> None:
    """Inputs, and for each method its file, the library that it needs, and what comes out here."""
    import onnxruntime

    given = written.sample(LENGTH, HEAD_DIM)
    np.savez(folder / "inputs.npz", **{name: value.numpy() for name, value in given.items()})
    for name, model in written.methods(HEAD_DIM, n_hashes=4, n_clusters=20).items():
        path = folder / name / "model.onnx"
        written.write(model, given, path)
        export.custom_ops_library(path, output=path.parent)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        np.save(path.with_name("expected.npy"), written.run(session, given))


def prepare(release: str) -> Path:
    """The Python of the environment for a release, made if it is missing."""
    # those before 1.19 were built against NumPy 1
    packages = [f"onnxruntime=={release}", "numpy<2"]
    return environments.prepare(f"onnxruntime-{release}", packages, borrows=False)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        failed = False
        for release in RELEASES:
            command = [prepare(release), "-I", "-c", RUN, folder, str(CLOSE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
            print(f"onnxruntime {release}: {'passed' if done.returncode == 0 else said[-1]}", flush=True)
            failed |= done.returncode != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()
