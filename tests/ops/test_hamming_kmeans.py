"""hamming_kmeans, kernels and definition alike, against Lloyd's algorithm in plain Python and the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.kernels.config import Config
from fastattn.ops.hamming_kmeans import hamming_kmeans
from fastattn.reference.hamming_kmeans import first_rows, random_codes
from tests.accuracy import original
from tests.bad_input import Bad, Change, each_of
from tests.ops.cases import IMPLS, needs_compiler


def draws(batch: int = 2, heads: int = 2, n: int = 60, n_bits: int = 20, seed: int = 0) -> Tensor:
    """Codes near a few centres, so that there are clusters to be found."""
    g = torch.Generator().manual_seed(seed)
    most = min(2**n_bits, 2**63 - 1)
    centre = torch.randint(most, (6,), generator=g)
    noise = torch.randint(most, (3, batch, heads, n), generator=g)
    return centre[torch.randint(6, (batch, heads, n), generator=g)] ^ (noise[0] & noise[1] & noise[2])


def lloyd(codes: list[int], centroids: list[int], n_bits: int, n_iterations: int, drawn: list[list[int]]) -> list[int]:
    """Of one head, in plain Python. drawn: for each iteration what centroids without members become."""
    clusters: list[int] = []
    for iteration in range(n_iterations):
        if iteration:
            for c in range(len(centroids)):
                own = [code for code, cluster in zip(codes, clusters, strict=True) if cluster == c]
                majority = sum((2 * sum(code >> b & 1 for code in own) > len(own)) << b for b in range(n_bits))
                centroids[c] = majority if own else drawn[iteration - 1][c]
        distances = [[(code ^ centroid).bit_count() for centroid in centroids] for code in codes]
        clusters = [row.index(min(row)) for row in distances]
    return clusters


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_the_original(impl: str) -> None:
    f = original("clustered")
    knobs: dict[str, Any] = {"n_bits": int(f["bits"]), "n_iterations": int(f["iterations"]), "initial": f["init_idx"]}
    assert torch.equal(hamming_kmeans(f["hashes"], int(f["C"]), impl=impl, **knobs), f["clusters"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_iterations", [1, 2, 7])
def test_is_lloyds_algorithm(n_iterations: int, impl: str) -> None:
    codes, initial, seed = draws(n=40), torch.tensor([5, 0, 5, 39, 7]), torch.tensor(9)
    clusters = hamming_kmeans(codes, 5, n_bits=20, n_iterations=n_iterations, initial=initial, seed=9, impl=impl)
    drawn = [[int(code) % 2**20 for code in random_codes(seed, it, 5)] for it in range(n_iterations - 1)]
    for head, found in zip(codes.flatten(0, 1).tolist(), clusters.flatten(0, 1).tolist(), strict=True):
        # rows 5 and 5 are one centroid twice, the second of which has no members
        assert lloyd(head, [head[i] for i in initial.tolist()], 20, n_iterations, drawn) == found


SHAPES = {
    "N60-C7": ({}, 7),
    "63 bits": ({"n_bits": 63}, 7),
    "33 bits": ({"n_bits": 33}, 7),
    "32 bits": ({"n_bits": 32}, 7),
    "31 bits": ({"n_bits": 31}, 7),
    "1 bit": ({"n_bits": 1}, 3),
    "one cluster": ({}, 1),
    "more clusters than codes": ({"n_bits": 3}, 40),
    "more clusters than rows": ({"n": 9}, 20),
    "one row": ({"n": 1}, 2),
    "clusters in tiles": ({"n": 300, "n_bits": 40}, 150),
    "rows in chunks": ({"batch": 1, "heads": 1, "n": 2500}, 12),
}


@needs_compiler
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_the_definition(name: str, masked: bool) -> None:
    shape, n_clusters = SHAPES[name]
    codes = draws(**shape)
    mask = torch.rand(codes.shape[0], codes.shape[2], generator=torch.Generator().manual_seed(1)) < 0.6
    knobs: dict[str, Any] = {"n_bits": shape.get("n_bits", 20), "mask": mask if masked else None, "seed": 3}
    fused, defined = (hamming_kmeans(codes, n_clusters, impl=impl, **knobs) for impl in ("triton", "reference"))
    assert torch.equal(fused, defined)
    assert fused.dtype == torch.int32
    if masked:
        assert torch.equal(fused == -1, ~mask.unsqueeze(1).expand_as(fused))


@needs_compiler
@pytest.mark.parametrize("block_c", [16, 64])
def test_products_of_signs_give_what_population_counts_give(block_c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, run here."""
    from fastattn.kernels import hamming

    codes = draws(n=700, n_bits=40)
    mask = torch.arange(700).expand(2, 700) % 5 != 0
    knobs: dict[str, Any] = {"n_bits": 40, "mask": mask, "seed": 3}
    expected = hamming_kmeans(codes, 30, impl="reference", **knobs)
    tiles = {
        "hamming_assign": Config({"BLOCK_N": 64, "BLOCK_C": block_c, "POPCOUNT": 0}),
        "hamming_count": Config({"BLOCK_N": 64, "BLOCK_C": block_c, "SCATTER": 0}),
        "hamming_update": Config({"BLOCK_C": 16}),
    }
    monkeypatch.setattr(hamming, "heuristic", lambda kernel, *rest: tiles.get(kernel))
    monkeypatch.setattr(hamming, "chunks", lambda length, device_type: (3, 256))
    seed = torch.tensor(3)
    initial = first_rows(seed, 700, 30, mask).unsqueeze(1).expand(2, 2, 30)
    # a stamp of its own keeps what was planned here from other calls
    assert torch.equal(hamming.kmeans(codes, initial, mask, seed, 40, 10, stamp=tuple(tiles)), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_of_centroids_at_one_distance_is_taken(impl: str) -> None:
    codes = torch.tensor([0b0011, 0b0101, 0b0001]).view(1, 1, 3)
    clusters = hamming_kmeans(codes, 2, n_bits=4, n_iterations=1, initial=torch.tensor([1, 0]), impl=impl)
    assert clusters.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_half_of_the_members_are_no_majority(impl: str) -> None:
    codes = torch.tensor([0b1111, 0b0000, 0b0111]).view(1, 1, 3)
    # 1111 and 0111 make 0111 of the first centroid, and not 1111, which is then nearer to the second
    clusters = hamming_kmeans(codes, 1, n_bits=4, n_iterations=2, initial=torch.tensor([0]), impl=impl)
    assert clusters.flatten().tolist() == [0, 0, 0]
    codes = torch.tensor([0b1100, 0b1111, 0b1000, 0b0000]).view(1, 1, 4)
    # clusters {1100, 1111} and {1000, 0000}: centroids 1100 and 0000, from which 1000 is as far: it goes to the first
    clusters = hamming_kmeans(codes, 2, n_bits=4, n_iterations=2, initial=torch.tensor([0, 3]), impl=impl)
    assert clusters.flatten().tolist() == lloyd([0b1100, 0b1111, 0b1000, 0b0000], [0b1100, 0], 4, 2, [[]])


def test_first_centroids_are_drawn_among_the_rows_that_take_part_without_repetition() -> None:
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.9], [0.2], [0.0]])
    rows = first_rows(torch.tensor(4), 50, 30, mask)
    for own, drawn in zip(mask, rows.tolist(), strict=True):
        real = [row for row in drawn if row >= 0]
        assert len(real) == len(set(real)) == min(30, int(own.sum()))
        assert all(own[row] for row in real)
    assert len({tuple(first_rows(torch.tensor(seed), 50, 30, None).tolist()) for seed in range(20)}) == 20


def test_every_row_is_as_likely_a_first_centroid() -> None:
    count = torch.zeros(20)
    for seed in range(2000):
        count[first_rows(torch.tensor(seed), 20, 5, None).long()] += 1
    assert (count / 2000 - 0.25).abs().max() < 0.04  # four standard deviations


def test_no_more_clusters_than_rows_that_take_part_are_used() -> None:
    mask = torch.arange(60).expand(2, 60) < torch.tensor([[4], [0]])
    clusters = hamming_kmeans(draws(), 10, n_bits=20, mask=mask)
    assert clusters[0].max() < 4
    assert (clusters[1] == -1).all()


def test_given_first_centroids_may_be_padding_and_differ_by_head() -> None:
    codes = draws()
    mask = torch.arange(60).expand(2, 60) < 30
    initial = torch.randint(60, (2, 2, 4), generator=torch.Generator().manual_seed(0))
    together = hamming_kmeans(codes, 4, n_bits=20, mask=mask, initial=initial)
    alone = hamming_kmeans(codes[1:, 1:], 4, n_bits=20, mask=mask[1:], initial=initial[1, 1].int())
    assert torch.equal(together[1:, 1:], alone)
    one = hamming_kmeans(codes, 4, n_bits=20, n_iterations=1, mask=mask, initial=torch.tensor([50, 51, 52, 53]))
    assert one[..., :30].unique().numel() > 1  # centroids from behind the mask do attract


def test_seeds_of_any_kind_replay() -> None:
    codes = draws(n_bits=3)
    one, same, other = (hamming_kmeans(codes, 6, n_bits=3, seed=seed) for seed in (5, torch.tensor(5), 6))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_threads_change_nothing() -> None:
    codes, before = draws(n=3000), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = hamming_kmeans(codes, 9, n_bits=20)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(several, hamming_kmeans(codes, 9, n_bits=20))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_opcheck(masked: bool) -> None:
    codes = draws(n=12)
    initial = torch.arange(4, dtype=torch.int32).expand(2, 2, 4)
    mask = torch.ones(2, 12, dtype=torch.bool) if masked else None
    args = (codes, initial, mask, torch.tensor(0), 20, 3, True)
    torch.library.opcheck(torch.ops.fastattn.hamming_kmeans.default, args)


def test_compiles_as_one_graph() -> None:
    def cluster(codes: Tensor, mask: Tensor, seed: Tensor) -> Tensor:
        return hamming_kmeans(codes, 5, n_bits=20, n_iterations=3, mask=mask, seed=seed)

    args = (draws(), torch.arange(60).expand(2, 60) % 3 != 0, torch.tensor(3))
    compiled = torch.compile(cluster, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), cluster(*args))


def good() -> dict[str, Any]:
    return {"codes": draws(), "n_clusters": 5, "n_bits": 20, "mask": torch.ones(2, 60, dtype=torch.bool),
            "initial": torch.arange(5)}  # fmt: skip


BAD: list[Bad] = [
    *((name, TypeError, "not a tensor", lambda a, n=name: a[n].tolist()) for name in ("codes", "mask", "initial")),
    *((name, ValueError, "device", lambda a, n=name: a[n].to("meta")) for name in ("mask", "initial")),
    *((name, ValueError, "rank", lambda a, n=name: a[n][0]) for name in ("codes", "mask", "initial")),
    *((name, TypeError, "floating", lambda a, n=name: a[n].float()) for name in ("codes", "mask", "initial")),
    *((name, ValueError, "none", lambda a: 0) for name in ("n_clusters", "n_bits", "n_iterations")),
    *((name, TypeError, "not an int", lambda a: 2.0) for name in ("n_clusters", "n_bits", "n_iterations", "seed")),
    ("codes", TypeError, "int32", lambda a: a["codes"].int()),
    ("codes", ValueError, "empty", lambda a: a["codes"][..., :0]),
    ("n_bits", ValueError, "too many", lambda a: 64),
    ("mask", ValueError, "length", lambda a: a["mask"][:, 1:]),
    ("initial", ValueError, "number", lambda a: torch.arange(4)),
    ("initial", ValueError, "other heads", lambda a: torch.zeros(2, 3, 5, dtype=torch.int32)),
    ("initial", ValueError, "row beyond the last", lambda a: torch.arange(56, 61)),
    ("initial", ValueError, "below -1", lambda a: torch.full((5,), -2)),
    ("seed", ValueError, "negative", lambda a: -1),
    ("seed", ValueError, "several", lambda a: torch.zeros(2, dtype=torch.int64)),
    ("seed", ValueError, "int32", lambda a: torch.zeros((), dtype=torch.int32)),
    ("impl", ValueError, "unknown", lambda a: "cuda"),
]


@each_of(BAD)
def test_is_named(name: str, error: type[Exception], change: Change) -> None:
    args = good()
    with pytest.raises(error, match=rf"^{name}\b"):
        hamming_kmeans(**args | {name: change(args)})
