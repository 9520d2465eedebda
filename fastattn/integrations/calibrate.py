"""How far to go: which knobs of a method are fastest within an error budget, measured on real q, k and v."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.autotune.device import describe
from fastattn.autotune.measure import Timing
from fastattn.integrations import calibrate_timing
from fastattn.integrations.calibrate_capture import ModelInputs
from fastattn.integrations.calibrate_exact import Exact
from fastattn.integrations.calibrate_result import Calibration, Front, Row, choose
from fastattn.integrations.calibrate_result import describe as in_words
from fastattn.integrations.calibrate_spaces import Knobs, Sample, Space, space_named
from fastattn.methods import common
from fastattn.ops import checks

LONGEST = 16384
Samples = dict[int, list[Sample]]  # by layer


def calibrate(
    inputs: nn.Module | Sequence[Tensor | None],
    method: str = "smyrf",
    *,
    max_error: float,
    batch: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    per_layer: bool = False,
    grid: Mapping[str, Sequence[Any]] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    draws: int = 3,
    seed: int = 0,
    seconds: float = 10.0,
    longest: int = LONGEST,
    store: bool = True,
    on_progress: Callable[[str], object] | None = None,
) -> Calibration:
    """The front of error against time over a method's knobs on real data, and the fastest setting within a budget.

    Every setting's attention output is compared with exact attention in float64, on ``draws`` random draws, and timed
    in turn with the others and with dense attention. With a model, the data are the q, k and v of its attention layers
    with dense attention, taken where a patched layer gets them; the choice is stored, and
    ``fastattn.patch(model, method, knobs="calibrated")`` uses it.

    Args:
        inputs: (q, k, v) or (q, k, v, key_mask), with q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv) and key_mask
            (B, N) bool, True for rows that take part; or a Hugging Face model in evaluation mode, as for
            :func:`fastattn.patch`. Everything is measured on its device, in its dtype, under autocast if that is on.
            For "lsh", whose queries are its keys, k must be the very tensor q.
        method: "smyrf", "clustered" or "improved_clustered"; for q, k and v also "lsh" (against dense shared-QK
            attention) or "linear" (random features "favor"; its knob, ``n_directions``, is the number of columns of
            ``omega`` that :func:`fastattn.methods.feature_maps.random_directions` draws).
        max_error: the budget: norm of the difference to exact attention over the norm of that, over all rows that take
            part, mean over draws and over layers (for each layer alone with ``per_layer``). Above 0.
        batch: the model's arguments, as in ``model(**batch)``: texts such as it will see, of the length that matters.
        layers: of the model, as for :func:`fastattn.patch`.
        per_layer: each layer gets its own choice. A layer that no setting brings within the budget stays dense.
        grid: knob -> values to try, in all combinations. None: a grid of the method's main knobs, with no more work
            than dense attention.
        is_causal, scale: for q, k and v; a model's layers say themselves.
        draws: random draws of each setting that its error is a mean over.
        seed: of the draws. The same seed on the same device gives the same errors.
        seconds: for timing all settings together; each is run at least once or twice however long that takes.
        longest: tokens up to which the length is sought from which the choice is faster than dense attention, with the
            sample's batch and heads; 0 leaves this out.
        store: keep a model's choice in the cache's folder (``calibrations.json``), in place of an earlier one for the
            same method, model, device, dtype and length, up to a power of two.
        on_progress: is told in words what is done next.

    Returns:
        :class:`~fastattn.integrations.calibrate_result.Calibration`: rows, front, choice, ``table()``, ``plot(path)``.
        Where no setting is within the budget there is no choice, ``choice`` is None, ``why_not()`` says how near the
        nearest is, and nothing is stored.

    The model, its patches and torch's random state are as they were afterwards.

    Raises:
        TypeError, ValueError: naming the argument that is at fault, before anything is measured.
    """
    space = space_named(method)
    _check_numbers(max_error, draws, seed, seconds, longest)
    say = on_progress or (lambda text: None)
    model = None
    if isinstance(inputs, nn.Module):
        if is_causal or scale is not None:
            raise ValueError("is_causal and scale are for q, k and v: a model's layers say themselves")
        model = ModelInputs(inputs, method, batch, layers)
        say("running the model with dense attention")
        samples = model.samples()
    else:
        if batch is not None or layers is not None or per_layer:
            raise ValueError("batch, layers and per_layer are for a model, and inputs are q, k and v")
        samples = {0: [_sample(inputs, space, is_causal, scale)]}
    first = samples[next(iter(samples))][0]
    settings = space.settings(first.length, first.is_causal, grid)
    with torch.no_grad():
        errors = _errors(space, samples, settings, draws, seed, say)
        say(f"timing {len(settings)} settings")
        dense, timings = calibrate_timing.times(space, first, settings, seed, seconds)
        fronts = []
        for group in [(layer,) for layer in samples] if per_layer else [tuple(samples)]:
            rows = _rows(space, settings, errors, group, timings, first.length)
            fronts.append(Front(() if model is None else group, rows, choose(rows, max_error)))
        if longest:
            fronts = _with_lengths(space, first, fronts, seed, longest, say)
    device = describe(first.q.device)
    found = Calibration(
        method=method,
        max_error=max_error,
        device=device.name,
        threads=device.threads,
        dtype=str(first.q.dtype).removeprefix("torch."),
        shape=(first.q.shape[0], first.q.shape[1], first.length, first.q.shape[3]),
        dense=dense,
        fronts=tuple(fronts),
        longest=longest,
    )
    if model is not None:
        say("running the model with the settings on the front")
        found = model.with_cosines(found, seed)
        if store and found.has_choice:
            found = replace(found, file=model.store(found))
    return found


def _errors(
    space: Space,
    samples: Samples,
    settings: Sequence[Knobs],
    draws: int,
    seed: int,
    say: Callable[[str], object],
) -> list[dict[int, list[float]]]:
    """For each setting: layer -> relative error of each draw, mean over the layer's samples."""
    say("exact attention")
    exact = {layer: [Exact(sample, space.is_shared) for sample in own] for layer, own in samples.items()}
    found = []
    for index, knobs in enumerate(settings):
        say(f"errors of setting {index + 1} of {len(settings)}")
        errors: dict[int, list[float]] = {layer: [] for layer in samples}
        for draw in range(draws):
            generator = torch.Generator().manual_seed(seed + draw)
            for layer, own in samples.items():
                drawn = space.draw(own[0], knobs, generator).to(own[0].q.device)
                outs = (space.attend(sample, drawn, knobs) for sample in own)
                errors[layer].append(
                    statistics.mean(truth.error(out) for truth, out in zip(exact[layer], outs, strict=True))
                )
        found.append(errors)
    return found


def _rows(
    space: Space,
    settings: Sequence[Knobs],
    errors: Sequence[Mapping[int, Sequence[float]]],
    layers: Sequence[int],
    timings: Sequence[Timing],
    length: int,
) -> tuple[Row, ...]:
    """One row a setting, with its errors on ``layers``, by time."""
    rows = []
    for knobs, of_layer, timing in zip(settings, errors, timings, strict=True):
        of_draw = [statistics.mean(draw) for draw in zip(*(of_layer[layer] for layer in layers), strict=True)]
        spread = statistics.stdev(of_draw) if len(of_draw) > 1 else 0.0
        rows.append(Row(knobs, statistics.mean(of_draw), spread, timing, space.share(knobs, length)))
    return tuple(sorted(rows, key=lambda row: row.time_us))


def _with_lengths(
    space: Space, sample: Sample, fronts: Sequence[Front], seed: int, longest: int, say: Callable[[str], object]
) -> list[Front]:
    """``fronts`` with the lengths from which their choices are faster than dense attention."""
    known: dict[str, int | None] = {}  # by knobs, which layers may share
    for front in fronts:
        if front.choice is None or (name := in_words(front.choice.knobs)) in known:
            continue
        known[name] = calibrate_timing.min_length(
            space, sample, front.choice.knobs, seed, longest, lambda length: say(f"against dense at {length} tokens")
        )
    return [
        front if front.choice is None else replace(front, min_length=known[in_words(front.choice.knobs)])
        for front in fronts
    ]


def _sample(inputs: Any, space: Space, is_causal: Any, scale: Any) -> Sample:
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or len(inputs) not in (3, 4):
        raise TypeError(f"inputs must be a model, (q, k, v) or (q, k, v, key_mask), got {type(inputs).__name__}")
    q, k, v = inputs[:3]
    key_mask = inputs[3] if len(inputs) == 4 else None
    if space.is_shared and k is not q:
        raise ValueError(f"k must be q itself with method={space.name!r}, whose queries are its keys")
    q, k, v = common.check_inputs(q, k, v, scale, None)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k must have q's length: got {q.shape[2]} queries and {k.shape[2]} keys")
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], q.device)
    if key_mask is not None and not bool(key_mask.any()):
        raise ValueError("key_mask leaves no row")
    checks.check_bool("is_causal", is_causal)
    if is_causal and not space.causal:
        raise ValueError(f"is_causal is True, but method {space.name!r} has no causal form")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return Sample(q, k, v, key_mask, scale, is_causal)


def _check_numbers(max_error: Any, draws: Any, seed: Any, seconds: Any, longest: Any) -> None:
    for name, value in (("max_error", max_error), ("seconds", seconds)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number above 0, got {value!r} ({type(value).__name__})")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value}")
    for name, value, least in (("draws", draws, 1), ("seed", seed, 0), ("longest", longest, 0)):
        checks.check_int(name, value, least)
