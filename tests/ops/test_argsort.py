from __future__ import annotations

import math

import pytest
import torch

from fastattn.kernels.cpu import sort
from fastattn.kernels.errors import Unsupported, UnsupportedNow
from fastattn.ops.argsort import stable_argsort


def expected(keys: torch.Tensor) -> torch.Tensor:
    return torch.sort(keys, dim=-1, stable=True).indices.int()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 3, 1000), (1, 70_000), (300, 257), (0, 5), (5, 0)], ids=str)
def test_is_the_stable_order_of_random_keys(shape: tuple[int, ...]) -> None:
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    order = stable_argsort(keys)
    assert order.dtype == torch.int32 and order.is_contiguous()
    assert torch.equal(order, expected(keys))


def test_equal_keys_keep_their_order() -> None:
    keys = torch.randint(-3, 4, (5, 4096), generator=torch.Generator().manual_seed(0)).float()
    keys[:, ::7] *= -0.0  # zeros of both signs are equal
    assert torch.equal(stable_argsort(keys), expected(keys))


def test_every_kind_of_float_stands_in_its_place() -> None:
    info = torch.finfo(torch.float32)
    values = [0.0, info.tiny, 1e-42, 1.0, 1.0 + info.eps, info.max, math.inf]
    keys = torch.tensor([*values, *(-value for value in values)])
    keys = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(stable_argsort(keys), expected(keys))


def test_keys_need_not_be_contiguous() -> None:
    keys = torch.randn(64, 50, 3, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)[:, ::2]
    assert torch.equal(stable_argsort(keys), expected(keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_sort_too(dtype: torch.dtype) -> None:
    keys = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(stable_argsort(keys), expected(keys))


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 1000), (1, 70_000), (0, 5)], ids=str)
def test_16_bit_integers_keep_the_order_of_equals(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    for low, high in ((0, 9), (-(2**15), 2**15)):
        keys = torch.randint(low, high, shape, generator=g, dtype=torch.int16)
        assert torch.equal(stable_argsort(keys), expected(keys))


@pytest.mark.parametrize("threads", [1, 6])
def test_threads_change_nothing(threads: int) -> None:
    keys = torch.randn(40, 9000, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(stable_argsort(keys), expected(keys))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [Unsupported("no C++ compiler"), UnsupportedNow("the disk is full")], ids=repr)
def test_where_it_cant_be_built_torch_sorts(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(sort, "_entry", fails)
    keys = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stable_argsort(keys), expected(keys))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastattn.stable_argsort.default, (torch.randn(2, 3, 5),))
