"""``pytest --device``: what tests create stands there, what fastattn creates is its own affair."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastattn.ops.block_attention import block_attention
from fastattn.ops.linear_attention import attend_linear
from tests.device import CPU_ONLY, TESTS, OnDevice, cpu_only, device_type
from tests.ops.cases import Case
from tests.ops.linear_cases import LinearCase


@pytest.fixture
def on_meta() -> Iterator[OnDevice]:
    mode = OnDevice(torch.device("meta"))
    mode.active = True
    with mode:
        yield mode


CREATED = {
    "zeros": lambda: torch.zeros(3), "tensor": lambda: torch.tensor([1.0]), "arange": lambda: torch.arange(3),
    "drawn": lambda: torch.randn(3, generator=torch.Generator().manual_seed(0)), "order": lambda: torch.randperm(5),
    "leaf": lambda: torch.rand(3, requires_grad=True), "of an array": lambda: torch.as_tensor([1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", CREATED)
def test_what_a_test_creates_stands_on_the_device(name: str, on_meta: OnDevice) -> None:
    x = CREATED[name]()
    assert x.device.type == "meta" and device_type() == "meta"
    assert x.requires_grad == (name == "leaf") and x.is_leaf


def test_a_device_that_a_test_names_is_kept(on_meta: OnDevice) -> None:
    assert torch.zeros(3, device="cpu").device.type == "cpu"


def test_what_others_create_is_left_alone(on_meta: OnDevice) -> None:
    elsewhere: dict[str, Any] = {}
    exec(compile("import torch\ndef make(): return torch.zeros(2)", "/elsewhere/library.py", "exec"), elsewhere)
    assert elsewhere["make"]().device.type == "cpu"
    on_meta.active = False  # in a test that stays on the CPU
    assert torch.zeros(3).device.type == "cpu"


def test_random_numbers_are_the_same_on_every_device() -> None:
    mode = OnDevice(torch.device("cpu"))
    mode.active = True
    torch.manual_seed(0)
    drawn = torch.randn(4)
    torch.manual_seed(0)
    with mode:
        assert torch.equal(torch.randn(4), drawn)


def test_ops_are_called_on_the_device_that_their_tests_ask_for(on_meta: OnDevice) -> None:
    case, linear = Case(), LinearCase(has_mask=True)
    out, lse = block_attention(*case.inputs(), *case.indices())
    assert {x.device.type for x in (*case.inputs(), *case.indices(), out, lse)} == {"meta"}
    results = attend_linear(*linear.inputs()[:3], **linear.options())
    assert {x.device.type for x in results} == {"meta"}


def test_what_stays_on_the_cpu_is_there() -> None:
    for name in CPU_ONLY:
        file, *test = name.split("::")
        assert (TESTS / file).exists(), name
        assert not test or f"def {test[-1]}(" in (TESTS / file).read_text(), name


@pytest.mark.parametrize(
    ("node", "stays"),
    [
        ("tests/ops/test_block_attention.py::test_rows_out_of_range_are_refused[q_index-48-triton]", True),
        ("tests/ops/test_block_attention.py::test_same_input_gives_same_bits[triton]", False),
        ("tests/kernels/test_engine.py::test_any", True),
        ("perf/test_calls.py::test_any", True),
    ],
)
def test_a_test_stays_on_the_cpu_by_its_folder_its_file_or_its_own_name(node: str, stays: bool) -> None:
    path = TESTS.parent / node.partition("::")[0]
    assert (cpu_only(path, node) is not None) == stays


def test_a_device_that_is_not_there_is_an_error_before_any_test_runs() -> None:
    command = [sys.executable, "-m", "pytest", "--device", "moon", "tests/reference/test_philox.py"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device moon" in done.stderr
