"""A method is held against its rivals only if it is right, and what could not be measured is said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from perf import __main__, peers, plot, report, versus
from perf.versus import BOTH, FORWARD, Bench, Method, Place, Rival, dense

FACTS = {"CPU": "Some CPU", "vectors": "avx2", "threads": "1"}
SECONDS = {128: 0.05, 256: 0.05}


def attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


def wrong_attention(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
    return attention(q, k, v) * (1.0 if impl == "reference" else 1.001)


def wrong_gradient(q: Tensor, k: Tensor, v: Tensor, impl: str | None = None) -> Tensor:
    return attention(q, k, v) if impl == "reference" else attention(q, k.detach(), v) + 0 * k.sum()


def method(of: Any = attention, *rivals: Rival) -> Method:
    return Method("it", lambda length: of, (dense({FORWARD: {128: 1.0}}), *rivals), {BOTH: {256: 1000.0}})


def test_rows_are_of_both_passes_against_every_rival_and_of_memory():
    rows = list(versus.rows(method(), (128, 256), SECONDS))
    speeds = [(row.what, row.length, row.goal) for row in rows if row.unit == "x"]
    assert speeds == [
        ("it, forward, against SDPA", 128, 1.0),
        ("it, forward + backward, against SDPA", 128, None),
        ("it, forward, against SDPA", 256, None),
        ("it, forward + backward, against SDPA", 256, None),
    ]
    assert all(row.low <= row.value <= row.high for row in rows)
    assert {row.goal for row in rows if row.unit == "MB" and row.length == 256} in ({None, 1000.0}, set())


def test_a_bench_measures_all_of_its_methods():
    whats = [row.what for row in Bench((method(), replace(method(), name="the other")), SECONDS).rows((128,))]
    assert [what.partition(",")[0] for what in dict.fromkeys(whats)][::2] == ["it", "it", "the other", "the other"]


def test_on_another_place_a_method_has_no_goals_and_may_be_held_against_its_definition():
    place = Place(dtype=torch.float16, heads=2)
    rows = list(versus.rows(method(), (128,), SECONDS, with_definition=True, place=place))
    assert all(row.goal is None for row in rows)
    assert [row.what for row in rows if row.unit == "x"] == [
        f"it, {which}, against {whom}" for whom in ("SDPA", "its definition") for which in versus.PASSES
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [wrong_attention, wrong_gradient])
def test_nothing_is_reported_of_a_method_that_is_wrong(wrong: Any, dtype: torch.dtype):
    with pytest.raises(RuntimeError, match="it is wrong on this machine"):
        next(versus.rows(method(wrong), (128,), SECONDS, place=Place(dtype=dtype)))


@pytest.fixture
def some_peer(monkeypatch: pytest.MonkeyPatch) -> str:
    """A peer whose layout is (B, N, H, D)."""

    def build(length: int, heads: int, head_dim: int) -> peers.Peer:
        def own(x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous()

        return peers.Peer(lambda q, k, v: own(attention(own(q), own(k), own(v))), own, lambda x: x.transpose(1, 2))

    monkeypatch.setitem(peers.PEERS, "some peer", build)
    return "some peer"


def test_peers_are_measured_where_they_are_asked_for(some_peer: str):
    whats = [row.what for row in versus.rows(method(attention, Rival(some_peer)), (128,), SECONDS)]
    assert not any(some_peer in what for what in whats)
    whats = [row.what for row in versus.rows(method(attention, Rival(some_peer)), (128,), SECONDS, with_peers=True)]
    assert [what for what in whats if some_peer in what] == [
        "it, forward, against some peer",
        "it, forward + backward, against some peer",
    ]


def test_a_peer_that_computes_the_same_must_give_the_same(some_peer: str):
    next(versus.rows(method(attention, Rival(some_peer, agrees=True)), (128,), SECONDS, with_peers=True))
    off = method(lambda q, k, v, impl=None: 1.01 * attention(q, k, v), Rival(some_peer, agrees=True))
    with pytest.raises(RuntimeError, match="held against some peer"):
        next(versus.rows(off, (128,), SECONDS, with_peers=True))


def test_a_peer_that_does_not_load_leaves_rows_that_say_so(monkeypatch: pytest.MonkeyPatch):
    def build(length: int, heads: int, head_dim: int) -> peers.Peer:
        raise ImportError("no such library")

    monkeypatch.setitem(peers.PEERS, "some peer", build)
    rows = list(versus.rows(method(attention, Rival("some peer")), (128,), SECONDS, with_peers=True))
    missing = [row for row in rows if "some peer" in row.what]
    assert [(row.verdict, row.detail) for row in missing] == 2 * [
        ("not measured", "not installed, or does not load: no such library")
    ]
    assert all(math.isnan(row.value) for row in missing)


def test_gradients_come_back_for_each_input_that_is_used():
    q, k, v, dout = versus.inputs(64, Place(heads=2))
    calls = peers.attention_calls(lambda q, k, v: attention(q, q, v), q, k, v, dout)
    assert calls.forward().is_inference()
    assert [x is None for x in calls.both()] == [False, True, False]


def test_time_and_memory_are_drawn_over_the_length_from_the_json(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = report.write("some", list(versus.rows(method(), (128, 256), SECONDS)), FACTS, tmp_path)
    __main__.main(["plot", "--results", str(tmp_path)])
    for name in ("time.svg", "memory.svg"):
        drawn = path.with_name(name).read_text()
        assert "forward + backward" in drawn
        assert len(drawn) < 100_000
    assert all(word in path.with_name("time.svg").read_text() for word in ("SDPA", "it", "128", "256", "milliseconds"))


def test_a_series_leaves_out_what_is_not_known():
    measured = {("a", FORWARD, 128): 2.0, ("a", FORWARD, 256): 0.0, ("a", BOTH, 128): 5.0, ("b", FORWARD, 128): 1.0}
    assert plot.series(measured, FORWARD, lambda x: x) == {"a": {128: 2.0}, "b": {128: 1.0}}


def test_every_bench_of_a_method_runs_on_a_factor_of_its_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    asked: dict[str, Any] = {}

    class Asked(Bench):
        def rows(self, *args: Any, **knobs: Any):
            asked.update(knobs)
            return versus.rows(method(), (128,), {128: 0.05})

    monkeypatch.setattr(__main__, "METHODS", {"some": Asked((method(),), {128: 4.0})})
    threads = torch.get_num_threads()
    try:
        __main__.main(["methods", "--seconds", "0.5", "--peers", "--threads", "1", "--results", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert asked == {"seconds": {128: 2.0}, "with_peers": True}
    assert "it, forward, against SDPA" in capsys.readouterr().out
    assert list(tmp_path.rglob("some.json"))
