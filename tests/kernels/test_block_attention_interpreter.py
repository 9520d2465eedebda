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

def case(n, options):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    q, k, v, dout = draw(1, 2, n, 20), draw(1, 1, 29, 20), draw(1, 1, 29, 12), draw(1, 2, n, 12)
    def index(n, size, rounds=2):
        rows = torch.full((1, 2, rounds, 2 * size), -1)
        for head in range(2):
            for r in range(rounds):
                rows[0, head, r, :n] = torch.randperm(n, generator=generator)
        return rows.view(1, 2, rounds, size, 2).transpose(-1, -2).contiguous().int()
    q_index, k_index = index(n, 19), index(29, 15)
    if options.pop("local", False):
        options |= dict(local_index_q=index(n, 19, 1), local_index_k=index(29, 15, 1))
    if options.pop("buckets", False):
        options["q_bucket"], options["k_bucket"] = (torch.arange(2 * 2 * s).view(1, 2, 2, s).int() % 3 for s in (n, 29))
    if "used" in options:
        n_used = options["n_used_blocks"] = torch.tensor([options.pop("used")], dtype=torch.int32)
        q_index[:, :, :, n_used:], k_index[:, :, :, n_used:] = -1, -1
    if options.get("dropout_p"):
        options["seed"] = torch.tensor(2**40 + 7)
    out, lse = block_attention.forward(q, k, v, q_index, k_index, 0.3, **options)
    return out, lse, *block_attention.backward(dout, q, k, v, q_index, k_index, out, lse, 0.3, **options)

def cases():
    reformer = dict(look_back=1, is_causal=True, self_mode="last_resort", correct_duplicates=True, buckets=True, used=1)
    smyrf = dict(is_causal=True, self_mode="once", correct_duplicates=True, local=True, dropout_p=0.3)
    plain = dict(look_back=1, is_causal=True, self_mode="exclude")
    return [x for n, options in ((37, plain), (29, reformer), (29, smyrf)) for x in case(n, options)]
"""


@pytest.mark.skipif(find_compiler() is None, reason="the CPU engine needs a C++ compiler")
def test_engine_and_interpreter_agree(tmp_path):
    names: dict = {}
    exec(CASE, names)
    path = tmp_path / "interpreted.pt"
    code = CASE + f"torch.save(cases(), {str(path)!r})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)
    for ours, theirs in zip(names["cases"](), torch.load(path, weights_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert block_attention.forward_kernel.__name__ == "forward_kernel"
