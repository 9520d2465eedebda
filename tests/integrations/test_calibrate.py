"""Calibration: errors against exact attention, the front, the choice within a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

import fastattn
from fastattn.autotune.measure import Timing
from fastattn.integrations import calibrate_timing
from fastattn.integrations.calibrate_result import Row, choose, pareto
from fastattn.integrations.calibrate_spaces import SPACES
from fastattn.integrations.calibrate_timing import first, ladder

N = 64
REFERENCE = {"impl": ["reference"]}


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense attention takes 1000 µs, and the settings 10, 20, 30, ... in the order in which they are tried."""

    def turns(calls: Mapping[Hashable, Callable[[], object]], *_: Any, **__: Any) -> dict[Hashable, Timing]:
        return {name: Timing(us, us, us, 1) for us, name in zip((1000, *range(10, 1000, 10)), calls, strict=False)}

    monkeypatch.setattr(calibrate_timing, "take_turns", turns)


def clustered_inputs(*, heads: int = 2, key_heads: int = 2, head_dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys about four far apart directions, so that few keys matter to a query."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.eye(head_dim)[:4].repeat(N // 4, 1)
    shapes = (heads, key_heads, key_heads)
    q, k, v = (torch.randn(1, count, N, head_dim, generator=generator) for count in shapes)
    return centres + 0.3 * q, centres + 0.3 * k, v


def calibrate(inputs: Any, method: str = "smyrf", **options: Any) -> Any:
    return fastattn.calibrate(inputs, method, **{"max_error": 0.5, "longest": 0, "draws": 2, **options})


def test_the_choice_is_the_fastest_setting_within_the_budget():
    # by the fake clock, small clusters take 10 µs, and one cluster, which is dense attention, 40
    grid = {**REFERENCE, "n_hashes": [1, 2], "q_cluster_size": [8, N]}
    found = calibrate(clustered_inputs(), grid=grid, max_error=1e-4)
    assert [row.time_us for row in found.rows] == [10, 20, 30, 40]
    assert found.knobs == {"impl": "reference", "n_hashes": 1, "q_cluster_size": N}
    assert found.choice.error < 1e-5 and found.choice.time_us == 20
    coarse = found.rows[0]
    assert coarse.error > 0.1 and coarse.spread > 0
    assert calibrate(clustered_inputs(), grid=grid, max_error=coarse.error).choice.knobs == coarse.knobs


def test_with_nothing_within_the_budget_there_is_no_choice_and_it_says_how_near_the_nearest_is():
    found = calibrate(clustered_inputs(), grid={**REFERENCE, "q_cluster_size": [8, 16]}, max_error=1e-6)
    assert found.choice is None and not found.has_choice
    with pytest.raises(ValueError, match=r"at most 1e-06: the least is 0\.\d+, with impl reference, q_cluster_size"):
        _ = found.knobs
    assert "at most 1e-06" in found.table()


ROWS = st.lists(
    st.builds(
        lambda error, time: Row({}, error, 0.0, Timing(time, time, time, 1), 0.5),
        st.floats(0.01, 2.0),
        st.floats(1.0, 1e4),
    ),
    min_size=1,
    max_size=12,
)


@given(ROWS, st.floats(0.01, 2.0), st.floats(0.0, 2.0))
@settings(max_examples=50, deadline=None)
def test_a_larger_budget_never_gives_a_slower_choice(rows: list[Row], budget: float, more: float):
    strict, generous = choose(rows, budget), choose(rows, budget + more)
    assert strict is None or (generous is not None and generous.time_us <= strict.time_us)


@given(ROWS, st.floats(0.01, 2.0))
@settings(max_examples=50, deadline=None)
def test_no_row_beats_one_on_the_front_and_the_choice_is_on_it(rows: list[Row], budget: float):
    front = pareto(rows)
    for best in front:
        assert not any(r.error < best.error and r.time_us <= best.time_us for r in rows)
        assert not any(r.error <= best.error and r.time_us < best.time_us for r in rows)
    chosen = choose(rows, budget)
    assert chosen is None or chosen in front


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_error_is_that_of_the_methods_own_function_against_float64(is_causal: bool):
    q, k, v = clustered_inputs(key_heads=1)
    knobs = {"n_hashes": 2, "q_cluster_size": 16, "impl": "reference"}
    found = calibrate((q, k, v), grid={name: [value] for name, value in knobs.items()}, is_causal=is_causal, scale=0.3)
    exact = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=is_causal, scale=0.3, enable_gqa=True
    )
    errors = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        out = fastattn.smyrf_attention(q, k, v, is_causal=is_causal, scale=0.3, generator=generator, **knobs)
        errors.append(float((out - exact).norm() / exact.norm()))
    assert found.rows[0].error == pytest.approx(sum(errors) / 2, rel=1e-6)
    assert found.rows[0].spread == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "coarse", "fine", "limit"),
    [
        ("smyrf", {"q_cluster_size": 8, "n_hashes": 1}, {"q_cluster_size": 16, "n_hashes": 4}, {"q_cluster_size": N}),
        ("lsh", {"bucket_size": 8, "n_hashes": 1}, {"bucket_size": 16, "n_hashes": 4}, {"bucket_size": N}),
        ("clustered", {"n_clusters": 1}, {"n_clusters": 4}, {"n_clusters": N, "n_iterations": 30}),
        ("improved_clustered", {"n_clusters": 2, "topk": 2}, {"n_clusters": 4, "topk": 16}, {"topk": N}),
        ("linear", {"n_directions": 4}, {"n_directions": 512}, None),
    ],
)
def test_every_method_is_held_against_what_it_approaches(method, coarse, fine, limit):
    q, k, v = (x / 2 for x in clustered_inputs())
    data = (q, q, v) if method == "lsh" else (q, k, v)
    errors = []
    for knobs in (coarse, fine, limit or fine):
        grid = {**REFERENCE, **{name: [value] for name, value in knobs.items()}}
        errors.append(calibrate(data, method, grid=grid, draws=3).rows[0].error)
    assert errors[0] > 1.2 * errors[1] > 0
    assert errors[2] < 0.1 if method == "clustered" else limit is None or errors[2] < 1e-5


def test_shared_queries_and_keys_are_held_against_unit_keys_without_the_own_one():
    q, _, v = clustered_inputs()
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[:, 50:] = False
    found = calibrate((q, q, v, mask), "lsh", grid={**REFERENCE, "bucket_size": [8], "n_hashes": [1]}, draws=1)
    logits = q.double() @ normalize(q.double(), dim=-1).mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.eye(N, dtype=torch.bool) | ~mask[:, None, None], -torch.inf)
    exact = (logits.softmax(-1) @ v.double())[:, :, :50]
    generator = torch.Generator().manual_seed(0)
    options = {"bucket_size": 8, "n_hashes": 1, "impl": "reference"}
    out = fastattn.lsh_attention(q, v, key_mask=mask, generator=generator, **options)[:, :, :50]
    assert found.rows[0].error == pytest.approx(float((out - exact).norm() / exact.norm()), rel=1e-6)


@pytest.mark.parametrize("method", ["smyrf", "clustered", "improved_clustered"])
def test_what_padding_holds_changes_no_error(method: str):
    q, k, v = clustered_inputs()
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[:, 40:] = False
    grid = {**REFERENCE, **({"q_cluster_size": [8]} if method == "smyrf" else {"n_clusters": [3]})}
    clean = calibrate((q, k, v, mask), method, grid=grid).rows[0].error
    spoilt = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (q, k, v)]
    assert calibrate((*spoilt, mask), method, grid=grid).rows[0].error == clean
    assert calibrate((q, k, v), method, grid=grid).rows[0].error != clean


def test_the_seed_decides_the_errors_and_torchs_own_draws_are_left_alone():
    grid = {**REFERENCE, "q_cluster_size": [8]}
    before = torch.get_rng_state()
    errors = [calibrate(clustered_inputs(), grid=grid, seed=seed).rows[0].error for seed in (3, 3, 4)]
    assert errors[0] == errors[1] != errors[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_long_inputs_are_compared_on_rows_that_are_spread_evenly(monkeypatch: pytest.MonkeyPatch):
    grid = {**REFERENCE, "q_cluster_size": [8]}
    every = calibrate(clustered_inputs(), grid=grid).rows[0].error
    monkeypatch.setattr("fastattn.integrations.calibrate_exact.MOST_ROWS", 24)
    assert calibrate(clustered_inputs(), grid=grid).rows[0].error == pytest.approx(every, rel=0.3)


@pytest.mark.parametrize("method", SPACES)
@pytest.mark.parametrize("length", [20, 512, 5000])
def test_the_grid_of_a_method_holds_settings_that_are_allowed_and_no_dearer_than_dense(method: str, length: int):
    space = SPACES[method]
    found = space.settings(length, False, None)
    for knobs in found:
        space.check(knobs)
        assert 0 < space.share(knobs, length) <= 2.01
    assert len({str(knobs) for knobs in found}) == len(found) <= 40
    if length >= 512:
        assert len(found) >= 5


@given(st.sampled_from(ladder(16384)), st.sampled_from(ladder(16384)))
@settings(max_examples=40, deadline=None)
def test_the_length_from_which_it_pays_is_found_in_few_steps(threshold: int, start: int):
    lengths = ladder(16384)
    asked = []

    def wins(index: int) -> bool:
        asked.append(index)
        return lengths[index] >= threshold

    at = [*range(lengths.index(start), len(lengths) - 1, 2), len(lengths) - 1]
    assert first(lengths, wins, at) == threshold
    assert len(asked) == len(set(asked)) <= 14
    assert first(lengths, lambda index: False, at) is None


def test_lengths_are_powers_of_two_and_half_as_much_again():
    assert ladder(600) == [64, 96, 128, 192, 256, 384, 512]
    assert ladder(40) == [40]


def test_min_length_is_sought_with_the_choice(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def wins(space: Any, sample: Any, knobs: Any, seed: int) -> bool:
        tried.append(knobs)
        return sample.length >= 192

    monkeypatch.setattr(calibrate_timing, "_wins", wins)
    found = calibrate(clustered_inputs(), grid={**REFERENCE, "q_cluster_size": [8, N]}, max_error=1e-4, longest=1024)
    assert found.min_length == 192
    assert all(knobs == found.knobs for knobs in tried)


def test_tables_and_drawings_show_all_settings(tmp_path: Path):
    pytest.importorskip("matplotlib")
    grid = {**REFERENCE, "n_hashes": [1, 2], "q_cluster_size": [8, N]}
    found = calibrate(clustered_inputs(), grid=grid, max_error=1e-4)
    lines = found.table().splitlines()
    assert "64 tokens, float32; dense attention takes 1 ms a layer" in lines[0]
    assert lines[1].split()[:3] == ["impl", "n_hashes", "q_cluster_size"]
    assert len(lines) == 6 and sum(line.startswith("chosen") for line in lines) == 1
    drawn = found.plot(tmp_path / "front.svg").read_text()
    assert "q_cluster_size 64" in drawn and "at the points: impl" in drawn and "dense" in drawn
    assert found.plot(tmp_path / "again.svg").read_text() == drawn


QKV = clustered_inputs()


@pytest.mark.parametrize(
    ("inputs", "options", "error", "words"),
    [
        (QKV, {"method": "magic"}, ValueError, ["'magic'", "'linear'"]),
        (QKV, {"max_error": 0}, ValueError, ["max_error", "above 0"]),
        (QKV, {"max_error": "0.1"}, TypeError, ["max_error", "str"]),
        (QKV, {"draws": 0}, ValueError, ["draws", "0"]),
        (QKV, {"seconds": -1}, ValueError, ["seconds", "-1"]),
        (QKV, {"grid": {"hashes": [1]}}, ValueError, ["'hashes'", "n_hashes"]),
        (QKV, {"grid": {"n_hashes": 4}}, TypeError, ["grid['n_hashes']", "4"]),
        (QKV, {"grid": {"n_hashes": [0]}}, ValueError, ["n_hashes", "at least 1"]),
        (QKV, {"method": "linear", "grid": {"n_directions": [1.5]}}, TypeError, ["n_directions", "int", "1.5"]),
        (QKV, {"method": "lsh"}, ValueError, ["k must be q itself"]),
        (QKV, {"method": "clustered", "is_causal": True}, ValueError, ["is_causal", "no causal form"]),
        (QKV, {"batch": {}}, ValueError, ["batch", "for a model"]),
        (QKV[:2], {}, TypeError, ["(q, k, v)"]),
        ((QKV[0], QKV[1][:, :, :9], QKV[2][:, :, :9]), {}, ValueError, ["q's length", "9 keys"]),
        ((*QKV, torch.zeros(1, N, dtype=torch.bool)), {}, ValueError, ["key_mask"]),
        ("bert", {}, TypeError, ["inputs", "str"]),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_named(inputs: Any, options: dict[str, Any], error: type[Exception], words: list[str]):
    with pytest.raises(error) as caught:
        calibrate(inputs, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
