"""Kernels compiled for GPUs that are not here keep to their budgets; ``make budgets`` compiles them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.budgets import DTYPES, TARGETS, Budget, Case, Cost, kernels, measure, problems, recorded

# each kernel for one GPU and dtype, by turns
SAMPLE = [Case(kernel, TARGETS[at % len(TARGETS)], DTYPES[at % len(DTYPES)]) for at, kernel in enumerate(kernels())]


@pytest.fixture(autouse=True, scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield folder


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_kernel_keeps_to_its_budget(case: Case):
    assert not problems(case, measure(case))


def test_every_kernel_has_a_budget_on_every_gpu():
    assert recorded().keys() == {(kernel, target) for kernel in kernels() for target in TARGETS}


KERNEL = "block_attention_forward"
FITS = Cost(1000, ("HMMA", "LDGSTS"), 128, 0, 1024, 2048, has_dot=True, has_tf32=False, on_tensor_cores=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"spill_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 4096}, "takes 4096 bytes of shared memory of 2048"),
        ({"on_tensor_cores": False}, "has dots, but no tensor-core instruction"),
        ({"has_dot": False, "on_tensor_cores": False}, ""),
        ({"instructions": 1250}, ""),
        ({"instructions": 1251}, "has 1251 instructions, more than 1250"),
        ({"uses": ("HMMA",)}, "has no LDGSTS any more"),
    ],
)
def test_what_a_kernel_costs_too_much_is_said(change: dict, said: str, monkeypatch: pytest.MonkeyPatch):
    budget = Budget(1000, FITS.uses)
    monkeypatch.setattr("tests.kernels.budgets.recorded", lambda: {(KERNEL, "cuda:80"): budget})
    found = problems(Case(KERNEL, "cuda:80", torch.float16), Cost(**(vars(FITS) | change)))
    assert (said in found[0] and len(found) == 1) if said else not found


def test_a_kernel_without_a_budget_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.kernels.budgets.recorded", dict)
    assert "has no line in budgets.csv" in problems(Case(KERNEL, "cuda:80", torch.float16), FITS)[0]


def test_tf32_is_no_way_to_compute_in_fp32():
    cost = Cost(**(vars(FITS) | {"has_tf32": True}))
    assert "computes in TF32" in problems(Case(KERNEL, "cuda:80", torch.float32), cost)[0]
