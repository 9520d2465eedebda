"""Triton's interpreter, which knows nothing of the engine, gives the same codes, clusters and sums."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.kernels.cpu.build import find_compiler

CASE = """
import torch
from fastattn.kernels import cluster_attention, hamming

def case():
    generator = torch.Generator().manual_seed(0)
    x, planes = (torch.randn(*shape, generator=generator) for shape in ((1, 2, 70, 20), (37, 21)))
    codes = hamming.hash_bits(x, planes)
    mask = torch.arange(70).unsqueeze(0) % 7 != 0
    initial = torch.tensor([0, 1, 1, 8, -1], dtype=torch.int32).expand(1, 2, 5)
    clusters = hamming.kmeans(codes, initial, mask, torch.tensor(2**40 + 5), 37, 3)
    sums, counts = cluster_attention.sums(x, clusters, 5)
    return codes, clusters, sums, counts, cluster_attention.broadcast(sums, clusters, torch.float32)
"""


@pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
def test_engine_and_interpreter_agree(tmp_path: Path) -> None:
    names: dict = {}
    exec(CASE, names)
    path = tmp_path / "interpreted.pt"
    code = CASE + f"torch.save(case(), {str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    for ours, theirs in zip(names["case"](), torch.load(path, weights_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
