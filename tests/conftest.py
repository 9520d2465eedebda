"""What holds for every test: threads shared between workers, a cache of the tests' own, no network, one device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Built kernels are kept from one run of the tests to the next, but apart from the user's own caches.
os.environ.setdefault("FASTATTN_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "fastattn"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402  after the environment is set

from tests.device import OnDevice, cpu_only  # noqa: E402

torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))

_MODE = pytest.StashKey[OnDevice]()


@pytest.fixture(autouse=True)
def what_was_compiled_is_forgotten() -> Iterator[None]:
    """torch.compile gives up on code that a process compiled for too many cases, wherever these came from."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def nothing_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block sizes that come with the package are not there."""
    from fastattn.autotune import pins, store

    for module in (pins, store):
        monkeypatch.setattr(module, "shipped_store", lambda: store.Store(tmp_path / "not there"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tests create their tensors, as in cuda; see tests/device.py")


def pytest_configure(config: pytest.Config) -> None:
    name = config.getoption("--device")
    if name is None:
        return
    try:
        mode = OnDevice(torch.device(name))
        torch.empty(0, device=mode.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        raise pytest.UsageError(f"--device {name}: {error}") from error
    mode.__enter__()
    config.stash[_MODE] = mode


def pytest_unconfigure(config: pytest.Config) -> None:
    mode = config.stash.get(_MODE, None)
    if mode is not None:
        mode.__exit__(None, None, None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Tables of cases are made as a file is imported: on the device as well, but for files that stay on the CPU."""
    mode = collector.config.stash.get(_MODE, None)
    if mode is None:
        return (yield)
    mode.active = collector.path is not None and cpu_only(collector.path) is None
    try:
        return (yield)
    finally:
        mode.active = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    mode = item.config.stash.get(_MODE, None)
    if mode is None:
        return (yield)
    mode.active = cpu_only(item.path, item.nodeid) is None
    try:
        return (yield)
    finally:
        mode.active = False
        if not _answers(mode.device):
            _give_up(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """An error of the device that comes late belongs to this test."""
    yield
    mode = item.config.stash.get(_MODE, None)
    if mode is not None and mode.active and mode.device.type != "cpu":
        torch.get_device_module(mode.device).synchronize(mode.device)


def _answers(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    try:
        torch.get_device_module(device).synchronize(device)
    except RuntimeError:
        return False
    return True


def _give_up(item: pytest.Item) -> None:
    """After an illegal access or a failed assertion a process gets nothing but errors of its GPU. A worker of
    pytest-xdist dies, once its report is on its way, and gets a successor."""
    if hasattr(item.config, "workerinput"):
        time.sleep(1)
        os._exit(3)
    pytest.exit("the device answers no more in this process", returncode=3)
