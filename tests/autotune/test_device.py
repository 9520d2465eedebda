"""Names of devices and compilers."""

from __future__ import annotations

import platform

import pytest
import torch

from fastattn.autotune.device import describe, machine_compiler


def test_a_cpu_is_named_by_architecture_model_and_threads() -> None:
    name = describe(torch.device("cpu"))
    assert name.arch.startswith(platform.machine() + "-")
    assert name.name
    threads = torch.get_num_threads()
    assert name.threads == threads
    torch.set_num_threads(threads + 1)
    try:
        assert describe(torch.device("cpu")).threads == threads + 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_assembler_of_an_nvidia_gpu_is_known_without_one(arch: str) -> None:
    pytest.importorskip("triton")
    kind, version = machine_compiler(arch).split()
    assert kind == "ptxas"
    assert tuple(map(int, version.split("."))) >= (12, 0)


def test_the_engine_is_part_of_a_cpus_compiler() -> None:
    assert machine_compiler(describe(torch.device("cpu")).arch).startswith("engine ")
