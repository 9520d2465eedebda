"""A model to calibrate: the q, k and v of its attention layers, and what it returns with a choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations import _modules, calibrate_store
from fastattn.integrations._methods import METHODS
from fastattn.integrations._state import state_of
from fastattn.integrations.calibrate_result import Calibration
from fastattn.integrations.calibrate_spaces import Sample
from fastattn.integrations.transformers import layers_to_patch, patched


class ModelInputs:
    """A model with a batch, and the layers that are to be calibrated. Raises TypeError or ValueError, naming what is
    wrong, before the model runs."""

    def __init__(self, model: nn.Module, method: str, batch: Any, layers: Iterable[int] | None) -> None:
        if method not in METHODS:
            raise ValueError(
                f"a model can't be patched with {method!r}; allowed: {', '.join(map(repr, METHODS))}. "
                "Give q, k and v to calibrate the method on them"
            )
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batch must hold the model's arguments by name, as in model(**batch), got {type(batch).__name__}"
            )
        if model.training:
            raise ValueError("the model must be in evaluation mode: call model.eval()")
        self.model, self.method, self.batch = model, method, batch
        self.found, self.layers = layers_to_patch(model, layers)
        self._output: Any = None
        self._length = 0

    def samples(self) -> dict[int, list[Sample]]:
        """Runs the model; layer -> its inputs."""
        samples, self._output = capture(self.model, self.batch, self.layers)
        shapes = {sample.q.shape for own in samples.values() for sample in own}
        if len(shapes) > 1:
            raise ValueError(
                f"layers must have inputs of one shape to be timed together, got {sorted(map(tuple, shapes))}: "
                "calibrate them apart, with layers="
            )
        self._length = shapes.pop()[2]
        return samples

    def with_cosines(self, found: Calibration, seed: int) -> Calibration:
        """``found`` with cosines of the model's last hidden state, of the choice and of the rows on the one front."""
        if not isinstance(getattr(self._output, "last_hidden_state", None), Tensor):
            return found
        fronts = found.fronts
        if len(fronts) == 1:
            best = fronts[0].best
            rows = [
                replace(row, cosine=self._cosine(seed, **row.knobs)) if row in best else row for row in fronts[0].rows
            ]
            choice = None if fronts[0].choice is None else rows[fronts[0].rows.index(fronts[0].choice)]
            cosine = None if choice is None else choice.cosine
            return replace(found, fronts=(replace(fronts[0], rows=tuple(rows), choice=choice),), cosine=cosine)
        return replace(found, cosine=self._cosine(seed, knobs=found)) if found.has_choice else found

    def store(self, found: Calibration) -> Path:
        """Writes the choice to the cache's folder; returns the file."""
        key = calibrate_store.key_of(self.found, self.layers[0], self.method, self._length)
        facts = {"max_error": found.max_error, "longest": found.longest, "threads": found.threads}
        return calibrate_store.write(key, found.layer_choices(self.layers), **facts)

    @torch.no_grad()
    def _cosine(self, seed: int, **knobs: Any) -> float:
        with patched(self.model, self.method, layers=self.layers, min_length=0, seed=seed, **knobs):
            hidden = self.model(**self.batch).last_hidden_state
        cosines = nn.functional.cosine_similarity(hidden.double(), self._output.last_hidden_state.double(), dim=-1)
        mask = self.batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == cosines.shape:
            cosines = cosines[mask.bool()]
        return float(cosines.mean())


def capture(model: nn.Module, batch: Mapping[str, Any], layers: Sequence[int]) -> tuple[dict[int, list[Sample]], Any]:
    """The inputs of the attention modules ``layers`` in one forward, dense in every layer, and what the model returns.

    A module that is called several times in a forward (as ALBERT's is) has a sample for each call. Raises ValueError
    where a layer is not called, or is called with what a patched layer refuses.
    """
    found = _modules.reached(model)
    samples: dict[int, list[Sample]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Callable[..., None]:
        def record(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> None:
            if layer in samples:
                samples[layer].append(Sample(q, k, v, key_mask, scale))

        return record

    # all that could be patched, so that layers that are patched already run dense as well
    patchable = [layer for layer, (name, module) in enumerate(found) if _modules.why_not(name, module) is None]
    with torch.no_grad(), patched(model, "smyrf", layers=patchable, min_length=0):
        for layer in patchable:
            state = state_of(found[layer][1])
            assert state is not None
            state.record = keep(layer)
        output = model(**batch)
    if missing := [layer for layer in layers if not samples[layer]]:
        raise ValueError(f"layers {', '.join(map(str, missing))} were not called with this batch")
    return samples, output
