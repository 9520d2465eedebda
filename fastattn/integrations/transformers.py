"""Put a method of this package into a pre-trained Hugging Face model, and take it out again.

Patching goes through transformers' attention and mask registries: no weight and no module is replaced, the settings of
a layer and its random draws sit on its attention module, and the state dict stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn.integrations import _modules
from fastattn.integrations._methods import Method, method_named
from fastattn.integrations._plans import DEFAULT_MIN_LENGTH, Plan, calibrated_plans
from fastattn.integrations._state import (
    ConfigPatch,
    LayerState,
    config_patch,
    device_of,
    draws_of,
    remove_state,
    set_state,
    state_of,
)

if TYPE_CHECKING:
    from fastattn.integrations.calibrate_result import Calibration


def patch(
    model: nn.Module,
    method: str = "smyrf",
    *,
    layers: Iterable[int] | None = None,
    min_length: int | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
    knobs: str | Calibration | None = None,
    **given: Any,
) -> nn.Module:
    """Make the self-attention of a Hugging Face encoder approximate, in place; returns ``model``.

    model: any module with transformers' attention modules below it. A submodule of a model will do: the encoder of one
        that has a decoder too, such as BART or Whisper.
    method: "smyrf", "clustered" or "improved_clustered".
    layers: which attention modules to patch, as indices into those that the AttentionInterface reaches, in the model's
        order (negative ones count from the end); None is all of them. The others run SDPA with the same mask.
    min_length: inputs of fewer tokens run SDPA, exactly as an unpatched model does; None is ``DEFAULT_MIN_LENGTH``, or
        what a calibration found, 0 forces the method. Only a model patched with 0 can be exported with a free length.
    seed, generator: the random draws of all layers come once, now, on the CPU, from ``generator`` or from a new one
        with ``seed``; a layer's draws do not depend on ``layers``. They are a buffer of the attention module that
        follows ``model.to(...)`` and is not part of the state dict.
    knobs: "calibrated": those that :func:`fastattn.calibrate` or ``fastattn calibrate`` stored for a model of this type
        and size, this method, device and dtype (of several lengths, the longest), with their min_length; or a
        :class:`~fastattn.integrations.calibrate_result.Calibration`. Where layers have choices of their own, one
        without a choice stays dense.
    given: knobs by name, instead. Of smyrf: n_hashes=4, q_cluster_size=64, k_cluster_size=None,
        correct_duplicates=False, local_window=0, directions="random", impl=None (see fastattn.smyrf_attention); of
        clustered: n_clusters=100, n_bits=63, n_iterations=10, impl=None (see fastattn.clustered_attention); of
        improved_clustered also topk=32.

    Padding: a 2-d ``attention_mask`` is honoured; attention gives 0 at padded positions. Patching a patched model gives
    the named layers new settings and leaves the others theirs.

    Raises, before anything is changed: ValueError for an unknown method, knob, layer or value; where no attention goes
    through the interface (it names the model's attention classes); and where a layer is anything but bidirectional
    self-attention over padded batches (causal, decoder, cross-attention, sliding window, position bias).
    A patched layer raises ValueError when it is called with a mask that is more than padding, a cache, packed
    sequences, ``output_attentions=True`` or, in training mode, attention dropout above 0 (patched layers have none).
    """
    _need_transformers()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    how = method_named(method)
    settings = how.with_knobs(given)
    least = _checked_min_length(min_length)
    found, chosen = layers_to_patch(model, layers)
    plans = dict.fromkeys(range(len(found)), Plan(settings, DEFAULT_MIN_LENGTH if least is None else least))
    if knobs is not None:
        plans |= calibrated_plans(how, knobs, given, least, found, chosen)
    draws = _draw_all(how, plans, found, _generator(seed, generator))

    from fastattn.integrations._interface import register

    register()
    modules = [module for _, module in found]
    shared: dict[int, ConfigPatch] = {}
    for layer in chosen:
        module, plan = modules[layer], plans[layer]
        if plan is None:
            remove_state(module)
            continue
        key = id(module.config)
        if key not in shared:
            shared[key] = config_patch(module, modules)
        state = LayerState(method, plan.knobs, plan.min_length, layer, shared[key])
        drawn = draws[layer]
        assert drawn is not None  # every chosen layer passed the checks
        set_state(module, state, drawn.to(device_of(module)))
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take the patches off ``model`` and everything below it, in place; returns ``model``.

    The attention implementation that was chosen before the first patch is back afterwards. A model without patches is
    left as it is.
    """
    for module in model.modules():
        remove_state(module)
    return model


@contextmanager
def patched(model: nn.Module, method: str = "smyrf", **options: Any) -> Iterator[nn.Module]:
    """``with patched(model, "smyrf", n_hashes=4): ...`` patches inside the block and puts back what was there before.

    Takes the arguments of :func:`patch`. A model that was patched already has its former settings and draws afterwards.
    """
    before = [
        (module, state, draws_of(module)) for module in model.modules() if (state := state_of(module)) is not None
    ]
    patch(model, method, **options)
    try:
        yield model
    finally:
        unpatch(model)
        for module, state, draws in before:
            # the model may have moved in the meantime
            set_state(module, state, draws.to(device_of(module)))


def layer_states(model: nn.Module) -> dict[str, LayerState]:
    """The settings of every patched attention module, by its qualified name."""
    return {name: state for name, module in model.named_modules() if (state := state_of(module)) is not None}


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError("patching needs transformers: pip install fastattn[transformers]") from error


def _checked_min_length(min_length: int | None) -> int | None:
    if min_length is None:
        return None
    if isinstance(min_length, bool) or not isinstance(min_length, int):
        raise TypeError(f"min_length must be None or an int of at least 0, got {min_length!r}")
    if min_length < 0:
        raise ValueError(f"min_length must be None or an int of at least 0, got {min_length}")
    return min_length


def _generator(seed: int, generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r} ({type(seed).__name__})")
        return torch.Generator("cpu").manual_seed(seed)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, so that draws are the same everywhere; got {generator.device}")
    return generator


def layers_to_patch(model: nn.Module, layers: Iterable[int] | None) -> tuple[list[tuple[str, nn.Module]], list[int]]:
    """All attention modules that could be reached, by name, and the indices of those that ``layers`` chooses.

    Raises what :func:`patch` does where there are none, or where one of those chosen can't be patched."""
    found = _reached(model)
    chosen = _chosen(len(found), layers)
    _check_modules(model, found, chosen)
    return found, chosen


def _reached(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = _modules.reached(model)
    if not found:
        classes = _modules.attention_classes(model)
        raise ValueError(
            f"no attention in {type(model).__name__} goes through transformers' AttentionInterface, so there is "
            f"nothing to patch; its attention classes: {', '.join(classes) if classes else 'none'}"
        )
    return found


def _chosen(count: int, layers: Iterable[int] | None) -> list[int]:
    if layers is None:
        return list(range(count))
    chosen = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must be ints, got {layer!r} ({type(layer).__name__})")
        if not -count <= layer < count:
            raise ValueError(
                f"layers has {layer}, but the model has {count} attention layers: allowed {-count} to {count - 1}"
            )
        chosen.append(layer % count)
    if not chosen:
        raise ValueError("layers is empty: name at least one layer, or None for all")
    return sorted(set(chosen))


def _check_modules(model: nn.Module, found: list[tuple[str, nn.Module]], chosen: list[int]) -> None:
    refused: dict[str, list[int]] = {}
    for layer in chosen:
        name, module = found[layer]
        if (why := _modules.why_not(name, module)) is not None:
            refused.setdefault(f"{type(module).__name__}: {why}", []).append(layer)
    if refused:
        what = "; ".join(f"{reason} (layers {', '.join(map(str, where))})" for reason, where in refused.items())
        raise ValueError(
            f"only bidirectional self-attention can be patched, and {type(model).__name__} has {what}. "
            "Choose other layers with layers=, or patch a submodule such as its encoder"
        )
    configs = [found[layer][1].config for layer in chosen]
    if classes := _modules.without_sdpa(model, configs):
        raise ValueError(
            f"transformers supports no SDPA for {', '.join(classes)}, which short inputs and unpatched layers would run"
        )
    if any(getattr(config, "output_attentions", False) for config in configs):
        raise ValueError(
            "the model's config says output_attentions=True, and a patched layer has no attention matrix to return"
        )


def _draw_all(
    how: Method, plans: Mapping[int, Plan | None], found: list[tuple[str, nn.Module]], generator: torch.Generator
) -> list[Tensor | None]:
    # for every layer that could be patched, chosen or not: a layer's draws don't depend on the choice of the others
    draws = []
    for layer, (name, module) in enumerate(found):
        size, plan = _modules.head_dim(module) if _modules.why_not(name, module) is None else None, plans[layer]
        draws.append(None if size is None or plan is None else how.draw(size, plan.knobs, generator))
    return draws
