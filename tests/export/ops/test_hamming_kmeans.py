"""The bodies of HammingKmeans and of what draws for it in ONNX Runtime: bit for bit what torch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.reference import hamming_kmeans as reference
from fastattn.reference.philox import philox

RunNode = Callable[..., list[Tensor]]
SEED = torch.tensor(2**62 + 2**33 + 12345)
ALL = torch.ones(1, 1, dtype=torch.bool)


def draws(batch: int = 2, heads: int = 2, n: int = 60, n_bits: int = 20, seed: int = 0) -> Tensor:
    """Codes near a few centres, so that there are clusters to be found."""
    g = torch.Generator().manual_seed(seed)
    most = min(2**n_bits, 2**63 - 1)
    centre = torch.randint(most, (6,), generator=g)
    noise = torch.randint(most, (3, batch, heads, n), generator=g)
    return centre[torch.randint(6, (batch, heads, n), generator=g)] ^ (noise[0] & noise[1] & noise[2])


def cluster(run_node: RunNode, codes: Tensor, initial: Tensor, mask: Tensor | None = None, **knobs: Any) -> Tensor:
    inputs = {"codes": codes, "initial": initial.int(), "mask": ALL if mask is None else mask, "seed": SEED}
    (clusters,) = run_node("HammingKmeans", inputs, {"clusters": (torch.int32, 3)}, **knobs)
    return clusters


def some_rows(n: int, masked: bool) -> Tensor | None:
    """Of two examples; the second has one row."""
    if not masked:
        return None
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = torch.arange(n) == n // 2
    return mask


@pytest.mark.parametrize("counter", [0, 2**32 - 2, 2**62])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 - 2])
def test_philox_is_that_of_torch(run_node: RunNode, seed: int, counter: int) -> None:
    inputs = {"seed": torch.tensor(seed), "counter": torch.arange(5) + counter}
    (words,) = run_node("Philox", inputs, {"words": (torch.int64, 2)})
    assert torch.equal(words, torch.stack(philox(inputs["seed"], inputs["counter"]), 1))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("n", "n_clusters"), [(1, 1), (1, 3), (5, 9), (60, 7), (61, 61)])
def test_first_rows_are_those_that_torch_draws(run_node: RunNode, n: int, n_clusters: int, masked: bool) -> None:
    mask = some_rows(n, masked)
    inputs = {"codes": draws(n=n), "mask": ALL if mask is None else mask, "seed": SEED}
    (rows,) = run_node("FirstRows", inputs, {"initial": (torch.int32, 3)}, n_clusters=n_clusters)
    expected = reference.first_rows(SEED, n, n_clusters, mask)
    assert torch.equal(rows, expected.view(-1, 1, n_clusters).expand(2, 2, n_clusters))
    if masked:
        assert (rows[1, :, 0] == n // 2).all() and (rows[1, :, 1:] == -1).all(), "one row takes part"


SHAPES = {
    "N60-C7": ({}, 7),
    "63 bits": ({"n_bits": 63}, 7),
    "33 bits": ({"n_bits": 33}, 7),
    "1 bit": ({"n_bits": 1}, 3),
    "one cluster": ({}, 1),
    "more clusters than codes": ({"n_bits": 3}, 40),
    "more clusters than rows": ({"n": 9}, 20),
    "one row": ({"n": 1}, 2),
    "many": ({"n": 300, "n_bits": 40}, 50),
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", SHAPES)
def test_clusters_are_those_of_the_definition(run_node: RunNode, name: str, masked: bool) -> None:
    shape, n_clusters = SHAPES[name]
    codes, n_bits = draws(**shape), shape.get("n_bits", 20)
    mask = some_rows(codes.shape[2], masked)
    initial = reference.first_rows(SEED, codes.shape[2], n_clusters, mask).view(-1, 1, n_clusters)
    initial = initial.expand(2, 2, n_clusters)
    for n_iterations in (1, 2, 10):
        found = cluster(run_node, codes, initial, mask, n_bits=n_bits, n_iterations=n_iterations)
        expected = reference.hamming_kmeans(codes, initial, mask, SEED, n_bits=n_bits, n_iterations=n_iterations)
        assert torch.equal(found, expected)


def test_clusters_without_members_get_the_bits_that_torch_draws(run_node: RunNode) -> None:
    codes, initial = draws(n_bits=63), torch.full((2, 2, 8), 3)  # one centroid eight times: seven have no members
    found = cluster(run_node, codes, initial, n_bits=63, n_iterations=4)
    assert torch.equal(found, reference.hamming_kmeans(codes, initial, None, SEED, n_bits=63, n_iterations=4))
    assert len(found.unique()) > 2, "drawn centroids have found members"


def test_the_first_of_centroids_at_one_distance_is_taken(run_node: RunNode) -> None:
    codes = torch.tensor([0b0011, 0b0101, 0b0001]).view(1, 1, 3)
    clusters = cluster(run_node, codes, torch.tensor([[[1, 0]]]), n_bits=4, n_iterations=1)
    assert clusters.flatten().tolist() == [1, 0, 0]


def test_half_of_the_members_are_no_majority(run_node: RunNode) -> None:
    # the means of {000, 001} and {011, 111} are 000 and 011; with bits that half of the members have they would be 001
    # and 111, and 011 would go over to the first
    codes, initial = torch.tensor([0b000, 0b001, 0b011, 0b111]).view(1, 1, 4), torch.tensor([[[0, 3]]])
    clusters = cluster(run_node, codes, initial, n_bits=3, n_iterations=2)
    assert clusters.flatten().tolist() == [0, 0, 1, 1]


def test_a_first_row_that_a_sequence_does_not_have_is_a_cluster_that_is_not_used(run_node: RunNode) -> None:
    codes, knobs = draws(n=40), {"n_bits": 20, "n_iterations": 3}
    beyond, none = (torch.tensor([5, row, 17, 39]).expand(2, 2, 4) for row in (40, -1))
    found = cluster(run_node, codes, beyond, **knobs)
    assert torch.equal(found, cluster(run_node, codes, none, **knobs))
    assert not (found == 1).any()
    assert not cluster(run_node, codes, beyond + 100, **knobs).any(), "all rows are in cluster 0 where none is there"
