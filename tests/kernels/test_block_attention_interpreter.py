"""Triton's interpreter, which knows nothing of the engine, gives the same numbers for the same kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastattn.kernels import block_attention
from fastattn.kernels.cpu.build import find_compiler

CASE = """
import sys
import torch
from fastattn.kernels import block_attention

def case():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v, dout = draw(1, 2, 37, 20), draw(1, 1, 29, 20), draw(1, 1, 29, 12), draw(1, 2, 37, 12)
    def index(n, size):
        rows = torch.full((1, 2, 2, 2 * size), -1)
        for head in range(2):
            for r in range(2):
                rows[0, head, r, :n] = torch.randperm(n, generator=generator)
        return rows.view(1, 2, 2, size, 2).transpose(-1, -2).contiguous().int()
    q_index, k_index = index(37, 19), index(29, 15)
    options = dict(look_back=1, is_causal=True, exclude_self=True, scale=0.3)
    out, lse = block_attention.forward(q, k, v, q_index, k_index, **options)
    return out, lse, *block_attention.backward(dout, q, k, v, q_index, k_index, out, lse, **options)
"""


@pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
def test_engine_and_interpreter_agree(tmp_path):
    names: dict = {}
    exec(CASE, names)
    path = tmp_path / "interpreted.pt"
    code = CASE + f"torch.save(case(), {str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    for ours, theirs in zip(names["case"](), torch.load(path, weights_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert block_attention.forward_kernel.__name__ == "forward_kernel"
