"""Triton's interpreter, which knows nothing of the engine, gives the same numbers for the kernels of improved clustered
attention."""

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
from fastattn.kernels import centroid_attention, topk_attention
from fastattn.ops.cluster_members import members

def case():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    q, k, v, dout = draw(1, 2, 37, 20), draw(1, 1, 29, 20), draw(1, 1, 29, 12), draw(1, 2, 37, 12)
    order, offsets = members(torch.randint(-1, 4, (1, 2, 37), generator=g).int(), 4)
    lists = torch.randint(-1, 29, (1, 2, 4, 18), generator=g).int()
    seed = torch.tensor(5)
    mass, rest, rows = draw(1, 2, 4), draw(1, 2, 4, 12), (order, offsets, lists)
    out, lse = topk_attention.forward(q, k, v, *rows, mass, rest, seed, True, 0.3, 0.2)
    fine = topk_attention.backward(dout, torch.ones_like(lse), q, k, v, *rows, mass, lse, seed, True, 0.3, 0.2)
    means, key_mask = draw(1, 2, 4, 20), torch.rand(1, 29, generator=g) < 0.7
    mean_out, mean_lse, index = centroid_attention.forward(means, k, v, key_mask, seed, 5, 0.3, 0.2)
    given = (draw(1, 2, 4, 12), draw(1, 2, 4), means, k, v, key_mask, seed, mean_out, mean_lse)
    coarse = centroid_attention.backward(*given, 0.3, 0.2)
    return out, lse, *fine, mean_out, mean_lse, index.sort(-1).values, *coarse
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
