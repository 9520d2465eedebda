"""What patching puts on each layer, where a calibration says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastattn.integrations._methods import Method

if TYPE_CHECKING:
    from fastattn.integrations.calibrate_result import Calibration
    from fastattn.integrations.calibrate_store import LayerChoice

# a round figure to start from, not a calibrated one: about where four rounds of 64 begin to pay on a CPU
DEFAULT_MIN_LENGTH = 1024
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class Plan:
    """knobs: of one layer, complete. min_length: as :func:`fastattn.patch` has it."""

    knobs: dict[str, Any]
    min_length: int


def calibrated_plans(
    how: Method,
    knobs: str | Calibration,
    given: Mapping[str, Any],
    min_length: int | None,
    found: Sequence[tuple[str, nn.Module]],
    chosen: Sequence[int],
) -> dict[int, Plan | None]:
    """The plan of each layer that the calibration is about; None for a layer that it leaves dense.

    knobs: "calibrated", or a calibration. given: knobs by name, which must not be there as well. min_length: what the
    user says. found, chosen: all attention modules of the model, and the indices of those to patch.
    """
    if given:
        raise ValueError(f"knobs= says all of them, and {', '.join(map(repr, given))} came as well")
    choices, longest = _choices(how.name, knobs, found, chosen)
    if missing := [layer for layer in chosen if layer not in choices]:
        known, others = (", ".join(map(str, layers)) for layers in (sorted(choices), missing))
        raise ValueError(f"the calibration is about layers {known}, not {others}: choose layers with layers=")
    plans: dict[int, Plan | None] = {}
    for layer, choice in choices.items():
        if choice.knobs is None:
            plans[layer] = None
            continue
        least = min_length
        if least is None:
            least = choice.min_length if longest else DEFAULT_MIN_LENGTH
        if least is None:
            raise ValueError(
                f"the calibration found no length up to {longest} at which {how.name!r} with its choice is faster "
                "than dense attention on this device: give min_length=, 0 to run it all the same"
            )
        plans[layer] = Plan(how.with_knobs(choice.knobs), least)
    return plans


def _choices(
    method: str, knobs: Any, found: Sequence[tuple[str, nn.Module]], chosen: Sequence[int]
) -> tuple[dict[int, LayerChoice], int]:
    """The choice of each layer, and up to which length it was held against dense attention."""
    from fastattn.integrations.calibrate_result import Calibration
    from fastattn.integrations.calibrate_store import find, key_of, store_file

    if isinstance(knobs, Calibration):
        if knobs.method != method:
            raise ValueError(f"knobs is a calibration of {knobs.method!r}, and the method is {method!r}")
        if not knobs.has_choice:
            raise ValueError(knobs.why_not())
        return knobs.layer_choices(chosen), knobs.longest
    if not isinstance(knobs, str):
        raise TypeError(f"knobs must be {CALIBRATED!r} or a Calibration, got {type(knobs).__name__}")
    if knobs != CALIBRATED:
        raise ValueError(f"knobs is {knobs!r}; allowed: {CALIBRATED!r}, a Calibration, or knobs by name")
    key = key_of(found, chosen[0], method)
    entry = find(key)
    if entry is None:
        what = ", ".join(f"{name} {size}" for name, size in key.model.items())
        raise ValueError(
            f"{store_file()} has no calibration of {method!r} for this model ({what}) in {key.dtype} on {key.device}: "
            f"run fastattn calibrate MODEL_FOLDER --method {method}, or "
            f"fastattn.calibrate(model, {method!r}, batch=..., max_error=...)"
        )
    return entry.layers, entry.longest
