"""A method beside torch's attention and its peers: both passes, time and extra memory, one interleaved run a length.

A bench describes its methods as :class:`Method` and how long they are measured as a :class:`Bench`, which gives rows:

    METHOD = Method(
        "SMYRF, 4 rounds of 64",
        lambda length: partial(smyrf_attention, n_hashes=4, ...),
        (dense({FORWARD: {1024: 1.3}, BOTH: {1024: 1.3}}), Rival("reformer-pytorch", {FORWARD: {1024: 8.0}})),
    )
    BENCH = Bench((METHOD,), {1024: 8.0, 4096: 12.0})
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.autotune.measure import Timing, take_turns
from fastattn.cli.memory import extra_device_memory, extra_memory
from perf import peers
from perf.peers import Attention, Calls, attention_calls
from perf.report import Measured, Row, missing_row, ratio_row, refuse_if_off

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 8, 64
LENGTHS = (1024, 4096, 16384)
FORWARD, BOTH = "forward", "forward + backward"
PASSES = (FORWARD, BOTH)
CHECKED_LENGTH = 320
REFERENCE = "its definition"

Goals = Mapping[str, Mapping[int, float]]  # by pass and length


@dataclass(frozen=True)
class Rival:
    """What a method is held against.

    name: as rows say it; without ``attention`` it is that of a peer (:data:`perf.peers.PEERS`), measured only where
    peers are asked for. goals: how many times faster than it the method is to be, by pass and length. agrees: it
    computes the very same numbers, so results are compared before times are.
    """

    name: str
    goals: Goals = field(default_factory=dict)
    attention: Attention | None = None
    agrees: bool = False


@dataclass(frozen=True)
class Method:
    """What is measured.

    name: with its knobs. build: the attention, a function of (q, k, v, impl=None), for inputs of a length.
    memory_goals: most extra megabytes, by pass and length. check: raises RuntimeError if the kernels are wrong; None
    compares ``build(...)`` with the same with impl="reference", forward and backward.
    """

    name: str
    build: Callable[[int], Callable[..., Any]]
    rivals: Sequence[Rival]
    memory_goals: Goals = field(default_factory=dict)
    check: Callable[[], None] | None = None


def dense(goals: Goals, *, is_causal: bool = False) -> Rival:
    """Torch's own attention."""
    name = "SDPA causal" if is_causal else "SDPA"
    return Rival(name, goals, partial(scaled_dot_product_attention, is_causal=is_causal))


@dataclass(frozen=True)
class Place:
    """Where and on what inputs: (1, heads, N, 64) of a dtype. Goals are for the default alone."""

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    heads: int = HEADS


@dataclass(frozen=True)
class Bench:
    """methods: measured one after the other. seconds: of timing for each, by length."""

    methods: Sequence[Method]
    seconds: Mapping[int, float]

    def rows(
        self, lengths: Sequence[int] = LENGTHS, seconds: Mapping[int, float] | None = None, *,
        with_peers: bool = False, with_definition: bool = False, place: Place | None = None,
    ) -> Iterator[Row]:  # fmt: skip
        """:func:`rows` of every method; seconds: None takes the bench's own."""
        for method in self.methods:
            yield from rows(
                method, lengths, seconds or self.seconds, with_peers=with_peers, with_definition=with_definition,
                place=place or Place(),
            )  # fmt: skip


def rows(
    method: Method, lengths: Sequence[int], seconds: Mapping[int, float], *,
    with_peers: bool = False, with_definition: bool = False, place: Place = Place(),
) -> Iterator[Row]:  # fmt: skip
    """Rows for each length. seconds: of timing, by length; every call is made once at least, whatever it takes.

    with_peers: against other libraries too. with_definition: against the method's own definition in plain PyTorch.
    """
    if method.check is not None:
        method.check()
    else:
        for dtype in dict.fromkeys((torch.float32, place.dtype)):
            _check(method, replace(place, dtype=dtype, heads=2))
    if with_definition:
        method = replace(method, rivals=(*method.rivals, Rival(REFERENCE)))
    for length in lengths:
        yield from _rows(method, length, seconds[length], with_peers, place)


def inputs(length: int, place: Place) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, (1, heads, length, 64)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, place.heads, length, HEAD_DIM, generator=generator).to(place.device, place.dtype)
        for _ in range(4)
    )
    return q, k, v, dout


def _check(method: Method, place: Place) -> None:
    """No speed is reported of a kernel that is wrong: it must agree with the definition, forward and backward."""
    q, k, v, dout = inputs(CHECKED_LENGTH, place)
    attention = method.build(CHECKED_LENGTH)
    results = []
    for impl in (None, "reference"):
        calls = attention_calls(partial(attention, impl=impl), q, k, v, dout)
        results.append([x for x in (calls.forward(), *calls.both()) if x is not None])
    refuse_if_off(method.name, *results)


def _rows(method: Method, length: int, seconds: float, with_peers: bool, place: Place) -> Iterator[Row]:
    tensors = inputs(length, place)
    contenders, missing = {method.name: attention_calls(method.build(length), *tensors)}, {}
    for rival in method.rivals:
        if rival.attention is None and rival.name != REFERENCE and not with_peers:
            continue
        try:
            contenders[rival.name] = _ready(method, rival, contenders[method.name], length, tensors, place)
        except peers.Missing as problem:
            missing[rival.name] = str(problem)
    measured = _measure(contenders, length, seconds, place.device)
    for rival in method.rivals:
        for name in PASSES:
            what = f"{method.name}, {name}, against {rival.name}"
            goal = rival.goals.get(name, {}).get(length) if place == Place() else None
            if rival.name in missing:
                yield missing_row(what, length, goal, missing[rival.name])
            elif rival.name in contenders:
                yield ratio_row(what, length, measured[rival.name, name], measured[method.name, name], goal)
    yield from _memory_rows(method, contenders, length, measured, has_goal=place == Place())


def _ready(
    method: Method, rival: Rival, ours: Calls, length: int, tensors: tuple[Tensor, Tensor, Tensor, Tensor], place: Place
) -> Calls:
    """The rival's calls; on a GPU they were made once, for there even what runs elsewhere may not fit into memory."""
    back: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if rival.attention is not None:
        calls = attention_calls(rival.attention, *tensors)
    elif rival.name == REFERENCE:
        calls = attention_calls(partial(method.build(length), impl="reference"), *tensors)
    else:
        peer = peers.peer(rival.name, length, place.heads, HEAD_DIM, place.device)
        calls, back = peer.calls(*tensors), peer.back
    if place.device.type != "cpu":
        try:
            calls.forward()
            calls.both()
        except Exception as problem:  # whatever another library, or the want of memory, raises
            why = f"it does not run here: {type(problem).__name__}: {problem}"
            raise peers.Missing(why.splitlines()[0]) from problem
    if rival.agrees:
        refuse_if_off(f"{method.name}, held against {rival.name},", (ours.forward(),), (back(calls.forward()),))
    return calls


def _measure(
    contenders: Mapping[str, Calls], length: int, seconds: float, device: torch.device
) -> dict[tuple[str, str], Measured]:
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, both in contenders.items():
        calls |= {(name, FORWARD): both.forward, (name, BOTH): both.both}
    ours, memory = next(iter(contenders)), {}
    for key, call in calls.items():
        if key[0] == ours or length == LENGTHS[0]:
            call()  # builds or loads kernels, or the libraries behind a rival; too dear to do at every length
        memory[key] = extra_memory(call) if device.type == "cpu" else extra_device_memory(call, device)
    times: dict[tuple[str, str], Timing] = take_turns(calls, time.monotonic() + seconds, give_up=math.inf)
    return {key: Measured(*key, length, timing, memory[key]) for key, timing in times.items()}


def _memory_rows(
    method: Method, contenders: Mapping[str, Calls], length: int, measured: Mapping[tuple[str, str], Measured], *,
    has_goal: bool,
) -> Iterator[Row]:  # fmt: skip
    for name in PASSES:
        ours, *others = (measured[contender, name] for contender in contenders)
        if ours.memory is None:
            continue
        used = ours.memory / 1e6
        detail = "; ".join(["results included", *(f"{x.call} {(x.memory or 0) / 1e6:.0f} MB" for x in others)])
        yield Row(
            f"{method.name}, {name}, extra peak memory", length, "MB", used, used, used,
            method.memory_goals.get(name, {}).get(length) if has_goal else None, detail, smaller=True,
        )  # fmt: skip
