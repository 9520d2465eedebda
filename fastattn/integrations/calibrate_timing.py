"""Times of calibration: settings in turn with dense attention, and the length from which one is faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.autotune.measure import Timing, take_turns
from fastattn.autotune.problem import wait
from fastattn.integrations.calibrate_spaces import Knobs, Sample, Space

DENSE = "dense"
SHORTEST = 64
LENGTH_SECONDS = 0.5  # of turns at one length; the first turn is finished however long it takes


def dense(sample: Sample) -> Tensor:
    """What transformers, and so a short input of a patched model, runs."""
    mask = None if sample.key_mask is None else sample.key_mask[:, None, None]
    if sample.is_causal and mask is not None:
        length = sample.length
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return scaled_dot_product_attention(
        sample.q, sample.k, sample.v, attn_mask=mask, is_causal=sample.is_causal and mask is None, scale=sample.scale,
        enable_gqa=sample.q.shape[1] != sample.k.shape[1],
    )  # fmt: skip


def times(
    space: Space, sample: Sample, settings: Sequence[Knobs], seed: int, seconds: float
) -> tuple[Timing, list[Timing]]:
    """Times of dense attention and of each setting, forward, in turns for ``seconds``. All are built before."""
    calls: dict[int | str, Callable[[], object]] = {DENSE: lambda: dense(sample)}
    for index, knobs in enumerate(settings):
        calls[index] = _call(space, sample, knobs, seed)
    for call in calls.values():
        call()
    found = take_turns(calls, time.monotonic() + seconds, give_up=math.inf, wait=lambda: wait(sample.q.device))
    return found[DENSE], [found[index] for index in range(len(settings))]


def min_length(
    space: Space, sample: Sample, knobs: Knobs, seed: int, longest: int, on_length: Callable[[int], object]
) -> int | None:
    """The shortest length at which the method beats dense attention with ``knobs``, of 64, 96, 128, 192, ... tokens.

    Batch and heads are the sample's. Looks upward from the sample's length as far as ``longest``, then halves the
    range: dense attention is taken to lose for good once it loses. None where it never loses.
    """
    lengths = ladder(longest)

    def wins(index: int) -> bool:
        on_length(lengths[index])
        return _wins(space, sample.resized(lengths[index]), knobs, seed)

    start = max((index for index, length in enumerate(lengths) if length <= sample.length), default=0)
    at = [*range(start, len(lengths) - 1, 2), len(lengths) - 1]  # the next power of two, and the longest
    return first(lengths, wins, at)


def first(lengths: Sequence[int], wins: Callable[[int], bool], at: Sequence[int]) -> int | None:
    """The first of ``lengths`` whose index wins, if all after it do: from those at ``at``, upward, then by halves."""
    lost = -1
    for index in at:
        if wins(index):
            break
        lost = index
    else:
        return None
    won = index
    while won - lost > 1:
        middle = (lost + won) // 2
        lost, won = (lost, middle) if wins(middle) else (middle, won)
    return lengths[won]


def ladder(longest: int) -> list[int]:
    """64, 96, 128, 192, ... up to ``longest``."""
    lengths = []
    power = SHORTEST
    while power <= longest:
        lengths += [length for length in (power, power * 3 // 2) if length <= longest]
        power *= 2
    return lengths or [longest]


def _wins(space: Space, sample: Sample, knobs: Knobs, seed: int) -> bool:
    against, (own,) = times(space, sample, [knobs], seed, LENGTH_SECONDS)
    return own.median_us < against.median_us


def _call(space: Space, sample: Sample, knobs: Knobs, seed: int) -> Callable[[], object]:
    draws = space.draw(sample, knobs, torch.Generator().manual_seed(seed)).to(sample.q.device)
    return lambda: space.attend(sample, draws, knobs)
