"""Shape buckets."""

from __future__ import annotations

import math

import pytest

from fastattn.autotune.shape import bucket, distance


def test_counts_go_up_to_a_power_of_two() -> None:
    assert bucket({"n_blocks": 33, "batch": 1, "heads": 12}) == {"batch": 1, "heads": 16, "n_blocks": 64}


@pytest.mark.parametrize(("dim", "padded"), [(1, 16), (16, 16), (40, 64), (64, 64), (65, 128), (96, 128)])
def test_head_dims_are_padded_as_kernels_pad_them(dim: int, padded: int) -> None:
    assert bucket({"head_dim": dim}) == {"head_dim": padded}


@pytest.mark.parametrize(
    ("size", "rounded"), [(1, 1), (2, 2), (3, 3), (5, 6), (6, 6), (7, 8), (64, 64), (65, 96), (96, 96), (97, 128)]
)
def test_block_sizes_go_up_to_a_power_of_two_or_half_as_much_again(size: int, rounded: int) -> None:
    assert bucket({"c_q": size}) == {"c_q": rounded}


def test_a_bucket_is_its_own_bucket() -> None:
    for size in range(1, 300):
        once = bucket({"c_k": size, "heads": size, "value_dim": size})
        assert bucket(once) == once
        assert all(rounded >= size for rounded in once.values())


def test_a_size_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"shape\['heads'\] must be at least 1, got 0"):
        bucket({"heads": 0})


def test_buckets_are_as_far_apart_as_their_counts_double() -> None:
    assert distance({"heads": 8, "n_blocks": 64, "c_q": 64}, {"heads": 2, "n_blocks": 128, "c_q": 64}) == 3
    assert distance({"heads": 8, "c_q": 64}, {"heads": 8, "c_q": 128}) == math.inf
    assert distance({"heads": 8}, {"heads": 8, "c_q": 128}) == math.inf
