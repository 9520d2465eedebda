"""smyrf_hash, kernels and definition alike: queries and keys on one sphere, projected on directions."""

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

from fastattn.ops.smyrf_hash import smyrf_hash
from fastattn.reference import smyrf as definition
from tests.bad_input import Bad, Change, each_of
from tests.layouts import LAYOUTS
from tests.ops.cases import IMPLS, Three, needs_compiler
from tests.watching import LargestTensor, coarse_products

Masks = dict[str, Tensor]


def draws(
    n: int = 75, s: int | None = None, dim: int = 16, rounds: int = 4, heads: int = 2, kv_heads: int | None = None,
    per_head: bool = False, seed: int = 0,
) -> Three:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, *shape, dim, generator=g) for shape in ((heads, n), (kv_heads or heads, s or n)))
    return q, k, torch.randn(*((2, heads) if per_head else ()), dim + 2, rounds, generator=g)


def masks_of(q: Tensor, k: Tensor) -> Masks:
    g = torch.Generator().manual_seed(1)
    names = {"query_mask": q, "key_mask": k}
    return {name: torch.rand(2, x.shape[2], generator=g) < 0.7 for name, x in names.items()}


def expected_of(q: Tensor, k: Tensor, projections: Tensor, masks: Masks | None = None) -> tuple[Tensor, Tensor]:
    """The hashes in fp64 by F and G themselves, head by head, over the rows that take part; NaN for the others."""
    batch, heads, dim = *q.shape[:2], q.shape[3]
    directions = projections.double().expand(batch, heads, dim + 2, -1)
    hashes = [q.new_full((*q.shape[:2], directions.shape[3], x.shape[2]), math.nan).double() for x in (q, k)]
    for b in range(batch):
        real_q, real_k = (slice(None) if not masks else masks[name][b] for name in ("query_mask", "key_mask"))
        for h in range(heads):
            own_k = k[b, h * k.shape[1] // heads].double()
            q_hash, k_hash = definition.hashes(q[b, h, real_q].double(), own_k[real_k], directions[b, h])
            hashes[0][b, h, :, real_q], hashes[1][b, h, :, real_k] = q_hash.T, k_hash.T
    return hashes[0], hashes[1]


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Where something is expected. Heights are roots: a rounding of R2 - |x|^2 counts for more where that is small."""
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == torch.float32 and got.shape == wanted.shape
        real = ~wanted.isnan()
        torch.testing.assert_close(got.double()[real], wanted[real], rtol=1e-5, atol=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "N75-D16-R4": {},
    "N1-S1": {"n": 1},
    "N300-S77: several tiles": {"n": 300, "s": 77},
    "D1-R1": {"dim": 1, "rounds": 1},
    "D40-R17: two tiles of rounds": {"dim": 40, "rounds": 17},
    "D80": {"dim": 80},
    "D200: two parts of a row": {"dim": 200},
    "H4-Hkv2": {"heads": 4, "kv_heads": 2, "s": 31},
    "H4-Hkv1, a set for each head": {"heads": 4, "kv_heads": 1, "s": 31, "per_head": True},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masks"])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_is_the_transforms_on_the_directions(shape: dict[str, Any], masked: bool, impl: str) -> None:
    q, k, projections = draws(**shape)
    masks = masks_of(q, k) if masked and q.shape[2] > 1 else {}
    assert_close(smyrf_hash(q, k, projections, **masks, impl=impl), expected_of(q, k, projections, masks))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_inputs_are_hashed_in_fp32(dtype: torch.dtype, impl: str) -> None:
    q, k, projections = draws(kv_heads=1, s=50)
    q, k = q.to(dtype), k.to(dtype)
    assert_close(smyrf_hash(q, k, projections, impl=impl), expected_of(q, k, projections))


def test_fp64_stays_fp64() -> None:
    q, k, projections = draws(kv_heads=1, s=50)
    for got, wanted in zip(
        smyrf_hash(q.double(), k.double(), projections, impl="reference"), expected_of(q, k, projections), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: Any, impl: str) -> None:
    q, k, projections = draws(per_head=True)
    q, k, turned = layout(q), layout(k), projections.mT.contiguous().mT
    assert_close(smyrf_hash(q, k, turned, impl=impl), expected_of(q, k, projections))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("filler", [1e9, math.nan, math.inf])
def test_rows_that_take_no_part_change_no_other(filler: float, impl: str) -> None:
    q, k, projections = draws(s=50)
    masks = masks_of(q, k)
    clean = smyrf_hash(q, k, projections, **masks, impl=impl)
    for x, name in ((q, "query_mask"), (k, "key_mask")):
        x.masked_fill_(~masks[name][:, None, :, None], filler)
    for got, wanted, mask in zip(smyrf_hash(q, k, projections, **masks, impl=impl), clean, masks.values(), strict=True):
        real = mask[:, None, None].expand_as(got)
        assert torch.equal(got[real], wanted[real])


@pytest.mark.parametrize("impl", IMPLS)
def test_where_no_row_takes_part_others_are_hashed_as_ever(impl: str) -> None:
    q, k, projections = draws()
    nobody = torch.tensor([[True], [False]]).expand(2, 75)
    found = smyrf_hash(q, k, projections, query_mask=nobody, key_mask=nobody, impl=impl)
    for got, wanted in zip(found, smyrf_hash(q[:1], k[:1], projections, impl=impl), strict=True):
        torch.testing.assert_close(got[:1], wanted, rtol=0, atol=0 if impl == "triton" else 1e-5)


@needs_compiler
def test_a_hash_depends_on_nothing_but_the_row_and_the_radius() -> None:
    """To the bit: not on the place of the row, the other heads or examples, or how many directions there are."""
    q, k, projections = draws(n=300, s=77, rounds=17, heads=4, kv_heads=2)
    q_hash, k_hash = smyrf_hash(q, k, projections, impl="triton")
    head = smyrf_hash(q[1:, 2:3], k[1:, 1:], projections, impl="triton")
    assert torch.equal(head[0], q_hash[1:, 2:3]) and torch.equal(head[1], k_hash[1:, 2:3])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    moved = smyrf_hash(q[:, :, order], k, projections, impl="triton")
    assert torch.equal(moved[0], q_hash[..., order]) and torch.equal(moved[1], k_hash)
    fewer = smyrf_hash(q, k, projections[:, 5:6], impl="triton")
    assert torch.equal(fewer[0], q_hash[:, :, 5:6]) and torch.equal(fewer[1], k_hash[:, :, 5:6])


def test_carries_no_gradient() -> None:
    leaves = [x.requires_grad_() for x in draws()]
    for impl in (None, "reference"):
        assert not any(x.requires_grad for x in smyrf_hash(*leaves, impl=impl))


def test_torchs_matmul_precision_and_autocast_do_not_matter() -> None:
    args = draws(n=300)
    for impl in (None, "reference"):
        expected = smyrf_hash(*args, impl=impl)
        with coarse_products():
            assert all(map(torch.equal, smyrf_hash(*args, impl=impl), expected))


@needs_compiler
def test_memory_is_that_of_the_hashes() -> None:
    """Neither F nor G is made, and keys are not repeated for each query head."""
    q, k, projections = draws(n=300, s=900, dim=64, heads=4, kv_heads=1)
    with LargestTensor() as largest:
        smyrf_hash(q, k, projections, impl="triton")
    assert 0 < largest.elements <= q.numel()  # a view of q, which F would be larger than


class TestInTorch:
    @pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masks"])
    def test_opcheck(self, masked: bool) -> None:
        q, k, projections = draws(s=50, kv_heads=1)
        masks = masks_of(q, k).values() if masked else (None, None)
        torch.library.opcheck(torch.ops.fastattn.smyrf_hash.default, (q, k, projections, *masks, True))

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compiles_as_one_graph(self, dynamic: bool) -> None:
        compiled = torch.compile(smyrf_hash, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for n in (48, 75):
            assert all(map(torch.equal, compiled(*draws(n=n)), smyrf_hash(*draws(n=n))))

    def test_meta_tensors_give_shapes(self) -> None:
        q_hash, k_hash = smyrf_hash(*(x.to("meta") for x in draws(s=50, kv_heads=1)))
        assert (q_hash.shape, k_hash.shape) == ((2, 2, 4, 75), (2, 2, 4, 50))


@needs_compiler
def test_triton_interpreter_gives_the_same_hashes(tmp_path: Path) -> None:
    code = """
import torch
from fastattn.kernels.smyrf_hash import smyrf_hash
g = torch.Generator().manual_seed(0)
q, k = torch.randn(1, 2, 37, 20, generator=g), torch.randn(1, 1, 70, 20, generator=g)
mask = torch.rand(1, 70, generator=g) < 0.8
result = smyrf_hash(q, k, torch.randn(18, 22, generator=g).expand(1, 2, -1, -1), None, mask)
"""
    names: dict[str, Any] = {}
    exec(code, names)
    path = tmp_path / "interpreted.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", code + f"torch.save(result, {str(path)!r})"]
    subprocess.run(run, env=environment, check=True, timeout=600)
    for ours, theirs in zip(names["result"], torch.load(path, weights_only=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def good() -> dict[str, Any]:
    q, k, projections = draws(n=12, heads=4, kv_heads=2)
    return {"q": q, "k": k, "projections": projections, **masks_of(q, k)}


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in good()),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in good()),
    *((name, TypeError, "integers", lambda a, n=name: a[n].int()) for name in good()),
    *((name, ValueError, "device", lambda a, n=name: a[n].to("meta")) for name in good() if name != "q"),
    ("q", ValueError, "no length", lambda a: a["q"][:, :, :0]),
    ("q", TypeError, "float64", lambda a: a["q"].double()),
    ("k", TypeError, "dtype", lambda a: a["k"].half()),
    ("k", ValueError, "heads", lambda a: torch.cat([a["k"], a["k"][:, :1]], 1)),
    ("k", ValueError, "head_dim", lambda a: a["k"][..., :4]),
    ("k", ValueError, "batch", lambda a: a["k"][:1]),
    ("projections", ValueError, "head_dim", lambda a: a["projections"][:4]),
    ("projections", ValueError, "no rounds", lambda a: a["projections"][:, :0]),
    ("projections", ValueError, "heads", lambda a: a["projections"].expand(2, 2, -1, -1)),
    ("query_mask", ValueError, "length", lambda a: a["query_mask"][:, :5]),
    ("key_mask", ValueError, "batch", lambda a: a["key_mask"][:1]),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_bad_input_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        smyrf_hash(**args | {name: change(args)})
