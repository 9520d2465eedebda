"""hash_bits, kernel and definition alike: the codes of clustered attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.hash_bits import hash_bits
from tests.accuracy import original
from tests.bad_input import Bad, Change, each_of
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS


def draws(n: int = 75, dim: int = 16, n_bits: int = 63) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, n, dim, generator=g), torch.randn(n_bits, dim + 1, generator=g)


def assert_right(codes: Tensor, x: Tensor, planes: Tensor) -> None:
    """Each bit is that of fp64, but where x lies on the plane to fp32's rounding."""
    height = x.double() @ planes[:, :-1].double().mT - planes[:, -1].double()
    bit = (codes.unsqueeze(-1) >> torch.arange(len(planes))) & 1
    clear = height.abs() > 1e-5 * (1 + x.shape[-1] ** 0.5)
    assert clear.float().mean() > 0.99
    assert torch.equal(bit.bool()[clear], (height > 0)[clear])
    assert not (codes >> len(planes)).any(), "bits that there are not"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["clustered", "clustered_nobias"])
def test_equals_the_original(name: str, impl: str) -> None:
    f = original(name)
    assert torch.equal(hash_bits(f["q"].transpose(1, 2), f["planes"], impl=impl), f["hashes"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n", "dim", "n_bits"), [(75, 16, 63), (1, 64, 20), (130, 1, 5), (40, 40, 32), (9, 256, 33), (64, 80, 1)]
)
def test_bits_are_those_of_fp64(n: int, dim: int, n_bits: int, impl: str) -> None:
    x, planes = draws(n, dim, n_bits)
    assert_right(hash_bits(x, planes, impl=impl), x, planes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_16_bit_rows_are_fp32(dtype: torch.dtype, impl: str) -> None:
    x, planes = draws()
    assert_right(hash_bits(x.to(dtype), planes, impl=impl), x.to(dtype), planes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: Callable[[Tensor], Tensor], impl: str) -> None:
    x, planes = draws()
    x = layout(x)
    assert torch.equal(hash_bits(x, planes, impl=impl), hash_bits(x.contiguous(), planes, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_the_plane_itself_are_not_above(impl: str) -> None:
    x = torch.tensor([math.nan, 2.0, 1.0, math.inf]).view(1, 1, 4, 1)
    assert hash_bits(x, torch.tensor([[1.0, 1.0]]), impl=impl).flatten().tolist() == [0, 1, 0, 1]


def test_planes_of_another_dtype_are_used_in_fp32() -> None:
    x, planes = draws()
    assert torch.equal(hash_bits(x, planes.double()), hash_bits(x, planes))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastattn.hash_bits.default, (*draws(n=9), True))


def test_compiles_as_one_graph() -> None:
    x, planes = draws()
    compiled = torch.compile(hash_bits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.requires_grad_(), planes), hash_bits(x, planes))


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in ("x", "planes")),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in ("x", "planes")),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in ("x", "planes")),
    ("x", ValueError, "empty", lambda a: a["x"][:, :, :0]),
    ("x", TypeError, "float64", lambda a: a["x"].double()),
    ("planes", ValueError, "device", lambda a: a["planes"].to("meta")),
    ("planes", ValueError, "other head_dim", lambda a: a["planes"][:, 1:]),
    ("planes", ValueError, "none", lambda a: a["planes"][:0]),
    ("planes", ValueError, "too many", lambda a: torch.randn(64, 17)),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args: dict[str, Any] = dict(zip(("x", "planes"), draws(), strict=True))
    with pytest.raises(error, match=rf"^{name}\b"):
        hash_bits(**args | {name: change(args)})
