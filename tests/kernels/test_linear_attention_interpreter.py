"""Triton's interpreter, which knows nothing of the engine, gives the same numbers for linear attention's kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastattn.kernels.cpu.build import find_compiler

CASE = """
import sys
import torch
from fastattn.kernels import linear_attention, linear_attention_step

def case():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v, dout = draw(1, 2, 75, 20), draw(1, 1, 75, 20), draw(1, 1, 75, 12), draw(1, 2, 75, 12)
    mask = torch.rand(1, 75, generator=generator) < 0.8
    state, dstate = draw(1, 2, 20 * 13).abs(), 0.1 * draw(1, 2, 20 * 13)
    results = []
    for is_causal in (True, False):
        options = ("elu", is_causal)
        out, den, last = linear_attention.forward(q, k, v, mask, state, *options, 1e-6)
        results += [out, den, last]
        results += linear_attention.backward(dout, dstate, q, k, v, mask, state, out, den, last, *options)
    token = (x[:, :, :1] for x in (q, k, v))
    s, z = last[..., :240].unflatten(-1, (20, 12)), last[..., 240:]
    return *results, *linear_attention_step.forward(*token, s, z, "elu", 1e-6)
"""


@pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
def test_engine_and_interpreter_agree(tmp_path):
    names: dict = {}
    exec(CASE, names)
    path = tmp_path / "interpreted.pt"
    code = CASE + f"torch.save(case(), {str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    results = names["case"](), torch.load(path, weights_only=True)
    assert len(results[0]) == 17
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
