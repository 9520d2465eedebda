"""The library's own code under AddressSanitizer and UBSan, on right and on hostile nodes, in a process of its own.

Kernels are as they are everywhere; tests/sanitize has them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastattn.export.ort import needs
from fastattn.export.ort.library import library_recipe
from fastattn.kernels.cpu import build, machine
from tests.export.ort.hostile import changed
from tests.export.ort.nodes import Node, nodes
from tests.export.ort.test_bad_input import NODES
from tests.sanitize.sanitized import why_not

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1")

# runs every model of a folder on the inputs beside it, each tensor in memory of its own; says how many were refused
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
options.log_severity_level = 4
options.intra_op_num_threads = 2
options.register_custom_ops_library(sys.argv[1])
refused = 0
sessions = {}
for path in sorted(Path(sys.argv[2]).glob("*.onnx")):
    print(path.stem, file=sys.stderr, flush=True)
    model = path.read_bytes()
    try:
        if model not in sessions:
            sessions[model] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        sessions[model].run(None, dict(np.load(path.with_suffix(".npz"))))
    except Exception as error:
        refused += 1
        if "fastattn" not in str(error) and "ShapeInferenceError" not in str(error):
            raise
print(refused)
"""


def write(node: Node, name: str, folder: Path) -> None:
    (folder / f"{name}.onnx").write_bytes(node.model())
    np.savez(folder / f"{name}.npz", **{name: x.contiguous().numpy() for name, x in node.inputs.items()})


@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_nothing_is_reported_of_right_and_of_hostile_nodes(tmp_path: Path) -> None:
    variants = needs.variants(node.call() for node in nodes())
    library = build.made(library_recipe(variants, machine.supported_levels()[:1], host_flags=FLAGS))
    n_cases = 0
    for node in NODES.values():
        write(node, f"{node.op}, right", tmp_path)
        for what, other in changed(node):
            if node.op == "SortedBlocks" and what.endswith(str(2**31 - 1)):
                continue  # a terabyte: where plain allocators throw, the sanitizer's ends the process
            write(other, f"{node.op}, {what}", tmp_path)
            n_cases += 1
    compiler = build.require_compiler().path
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        # the C++ runtime comes along, for what throws has to be there before the sanitizer looks for it
        "LD_PRELOAD": " ".join([runtime.stdout.strip(), "libstdc++.so.6"]),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
    }
    command = [sys.executable, "-c", PROGRAM, str(library), str(tmp_path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert said.returncode == 0, said.stderr[-3000:]
    assert n_cases > int(said.stdout) > n_cases // 2 > 100
