"""hash_argmax, kernel and definition alike: the buckets of Reformer's hash."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.ops.hash_argmax import hash_argmax
from tests.accuracy import original
from tests.bad_input import Bad, Change, each_of
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, needs_compiler
from tests.watching import LargestTensor, coarse_products


def draws(
    n: int = 75, dim: int = 16, width: int = 4, rounds: int = 3, rotation_heads: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, n, dim, generator=g), torch.randn(rotation_heads, dim, rounds, width, generator=g)


def factors_of(n_buckets: int | tuple[int, ...]) -> tuple[int, ...]:
    return n_buckets if isinstance(n_buckets, tuple) else (n_buckets,)


def decided(x: Tensor, rotations: Tensor, n_buckets: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Buckets in fp64, and where no other is near enough for fp32 to take it instead."""
    rotated = torch.einsum("bhnd,hdrw->bhrnw", x.double(), rotations.double().expand(x.shape[1], -1, -1, -1))
    bucket, clear, weight, start = 0, True, 1, 0
    for factor in factors_of(n_buckets):
        part = rotated[..., start : start + factor // 2]
        both = torch.cat([part, -part], -1)
        first, second = both.topk(2, -1).values.unbind(-1)
        clear = clear & (first - second > 1e-5 * (1 + x.shape[-1] ** 0.5))
        bucket = bucket + weight * both.argmax(-1)
        weight, start = weight * factor, start + factor // 2
    assert isinstance(bucket, Tensor) and isinstance(clear, Tensor)
    return bucket.int(), clear


CASES: dict[str, tuple[dict[str, Any], int | tuple[int, ...]]] = {
    "N75-D16, 8 buckets": ({}, 8),
    "one set of rotations a head": ({"rotation_heads": 2}, 8),
    "N1, 2 buckets": ({"n": 1, "width": 1}, 2),
    "N300, 150 buckets: columns in tiles": ({"n": 300, "width": 75}, 150),
    "4 x 6 buckets": ({"width": 5}, (4, 6)),
    "2 x 10 x 34 buckets": ({"width": 23}, (2, 10, 34)),
    "D1": ({"dim": 1}, 8),
    "D40": ({"dim": 40}, 8),
    "D256": ({"dim": 256}, 8),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("shape", "n_buckets"), CASES.values(), ids=CASES.keys())
def test_is_the_argmax_of_products_and_their_opposites(
    shape: dict[str, Any], n_buckets: int | tuple[int, ...], impl: str
) -> None:
    x, rotations = draws(**shape)
    buckets = hash_argmax(x, rotations, n_buckets, impl=impl)
    expected, clear = decided(x, rotations, n_buckets)
    assert buckets.dtype == torch.int32 and buckets.shape == (2, 2, 3, x.shape[2])
    assert torch.equal(buckets[clear], expected[clear])
    assert clear.float().mean() > 0.9
    assert buckets.min() >= 0 and buckets.max() < math.prod(factors_of(n_buckets))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_hashed_in_fp32(dtype: torch.dtype, impl: str) -> None:
    x, rotations = draws()
    half = x.to(dtype)
    expected, clear = decided(half, rotations, 8)  # of the rounded rows, with the rotations as they are
    buckets = hash_argmax(half, rotations, 8, impl=impl)
    assert torch.equal(buckets[clear], expected[clear])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [4, 75])
def test_of_equal_products_the_first_counts(width: int, impl: str) -> None:
    """Small integers, whose products are exact: most rows have ties, within a half, between the halves and between
    tiles of columns; rows of zeros tie everywhere."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, (2, 2, 200, 16), generator=g).float()
    x[:, :, ::9] = 0.0
    rotations = torch.randint(-1, 2, (1, 16, 3, width), generator=g).float()
    rotations[..., 1] = -rotations[..., 0]
    rotations[..., -1] = rotations[..., 2]
    rotated = torch.einsum("bhnd,drw->bhrnw", x, rotations[0])
    both = torch.cat([rotated, -rotated], -1)
    is_largest = both == both.amax(-1, keepdim=True)
    assert (is_largest.sum(-1) > 1).float().mean() > 0.2
    place = torch.arange(2 * width).masked_fill(~is_largest, 2 * width)
    assert torch.equal(hash_argmax(x, rotations, 2 * width, impl=impl), place.amin(-1).int())


@pytest.mark.parametrize("impl", IMPLS)
def test_buckets_are_the_originals(impl: str) -> None:
    for name in ("lsh_rp_bidir", "lsh_rp_causal", "lsh_rp_mask"):
        f = original(name)
        buckets = hash_argmax(f["qk"].unsqueeze(0), f["rotations"], 8, impl=impl)
        assert torch.equal((buckets + 8 * torch.arange(4).view(4, 1)).view(2, -1), f["buckets"])
    f = original("lsh_hf_causal")
    q = (f["x"] @ f["W_qk"].T).unflatten(-1, (2, 8)).transpose(1, 2)
    buckets = hash_argmax(q, f["rotations"], int(f["num_buckets"]), impl=impl)
    assert torch.equal(buckets + int(f["num_buckets"]) * torch.arange(3).view(3, 1), f["buckets"])
    f = original("lsh_trax_factored")
    buckets = hash_argmax((f["x"] @ f["w_q"])[None, None], f["rotations"].unsqueeze(0), (4, 4), impl=impl)
    assert torch.equal((buckets + 16 * torch.arange(3).view(3, 1)).flatten(), f["buckets"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any, impl: str) -> None:
    x, rotations = draws(rotation_heads=2)
    x, turned = layout(x), rotations.transpose(0, 3).contiguous().transpose(0, 3)
    expected, clear = decided(x, rotations, 8)
    assert torch.equal(hash_argmax(x, turned, 8, impl=impl)[clear], expected[clear])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_nan_have_some_bucket_and_change_no_other(impl: str) -> None:
    x, rotations = draws()
    clean = hash_argmax(x, rotations, 8, impl=impl)
    x[:, :, ::5] = math.nan
    buckets = hash_argmax(x, rotations, 8, impl=impl)
    assert buckets.min() >= 0 and buckets.max() < 8
    real = torch.arange(75) % 5 != 0
    assert torch.equal(buckets[..., real], clean[..., real])


def test_carries_no_gradient() -> None:
    x, rotations = draws()
    for impl in (None, "reference"):
        assert not hash_argmax(x.requires_grad_(), rotations.requires_grad_(), 8, impl=impl).requires_grad


def test_torchs_matmul_precision_and_autocast_do_not_matter() -> None:
    x, rotations = draws(n=300)
    expected = hash_argmax(x, rotations, 8)
    with coarse_products():
        for impl in (None, "reference"):
            assert torch.equal(hash_argmax(x, rotations, 8, impl=impl), expected)


@needs_compiler
def test_memory_does_not_depend_on_the_number_of_buckets() -> None:
    x, rotations = draws(n=300, width=75)
    with LargestTensor() as largest:
        hash_argmax(x, rotations, 150, impl="triton")
    assert 0 < largest.elements <= x.numel()  # a view of x; the products would be 14 times as many


class TestInTorch:
    def test_opcheck(self) -> None:
        op = torch.ops.fastattn.hash_argmax.default
        torch.library.opcheck(op, (*draws(width=5), [4, 6], True))
        x, rotations = draws(rotation_heads=2)
        torch.library.opcheck(op, (x.requires_grad_(), rotations, [8], True))

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compiles_as_one_graph(self, dynamic: bool) -> None:
        compiled = torch.compile(
            lambda x, rotations: hash_argmax(x, rotations, 8), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for n in (48, 75):
            assert torch.equal(compiled(*draws(n=n)), hash_argmax(*draws(n=n), 8))

    def test_meta_tensors_give_shapes(self) -> None:
        x, rotations = (y.to("meta") for y in draws())
        assert hash_argmax(x, rotations, 8).shape == (2, 2, 3, 75)


@needs_compiler
def test_triton_interpreter_gives_the_same_buckets(tmp_path: Path) -> None:
    code = """
import sys, torch
from fastattn.kernels.hash_argmax import hash_argmax
g = torch.Generator().manual_seed(0)
x, rotations = torch.randn(1, 2, 37, 20, generator=g), torch.randn(2, 2, 23, 20, generator=g)
result = hash_argmax(x, rotations, (6, 40))
"""
    names: dict[str, Any] = {}
    exec(code, names)
    path = tmp_path / "interpreted.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", code + f"torch.save(result, {str(path)!r})"]
    subprocess.run(run, env=environment, check=True, timeout=600)
    assert torch.equal(names["result"], torch.load(path, weights_only=True))


def good() -> dict[str, Any]:
    x, rotations = draws(n=12)
    return {"x": x, "rotations": rotations, "n_buckets": 8}


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in ("x", "rotations")),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in ("x", "rotations")),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in ("x", "rotations")),
    ("x", ValueError, "no length", lambda a: a["x"][:, :, :0]),
    ("x", TypeError, "float64", lambda a: a["x"].double()),
    ("rotations", ValueError, "device", lambda a: a["rotations"].to("meta")),
    ("rotations", ValueError, "heads", lambda a: a["rotations"].expand(3, -1, -1, -1)),
    ("rotations", ValueError, "head_dim", lambda a: a["rotations"][:, :4]),
    ("rotations", ValueError, "width", lambda a: a["rotations"][..., :3]),
    ("rotations", ValueError, "no rounds", lambda a: a["rotations"][:, :, :0]),
    ("n_buckets", ValueError, "odd", lambda a: 7),
    ("n_buckets", ValueError, "zero", lambda a: 0),
    ("n_buckets", ValueError, "odd factor", lambda a: (4, 3)),
    ("n_buckets", ValueError, "no factors", lambda a: ()),
    ("n_buckets", ValueError, "too many", lambda a: (2**20, 2**12)),
    ("n_buckets", TypeError, "float", lambda a: 8.0),
    ("n_buckets", TypeError, "bool", lambda a: True),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_bad_input_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        hash_argmax(**args | {name: change(args)})
