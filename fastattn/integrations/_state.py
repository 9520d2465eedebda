"""What patching leaves on a model: the settings of each patched attention module, and what its config said before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "fastattn"  # in transformers' registries, and so in a patched model's config
STATE = "fastattn_state"
DRAWS = "fastattn_draws"


class ConfigPatch:
    """One config that says ``NAME``: what it said before, and how many patched modules read it.

    Several attention modules, also of different models, may read one config object; the last one to be unpatched puts
    the former word back. Copies (deepcopy, pickle) carry their own copy of the config and of this count.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.previous: str | None = config._attn_implementation
        self.users = 0

    def add_user(self) -> None:
        self.users += 1
        # the attribute behind the property: the property's setter would also overwrite every sub-config
        self.config._attn_implementation_internal = NAME

    def remove_user(self) -> None:
        self.users -= 1
        if self.users == 0:
            self.config._attn_implementation_internal = self.previous


@dataclass
class LayerState:
    """Settings of one patched attention module, kept on it as ``STATE``; its draws are the buffer ``DRAWS``.

    method, knobs: as :func:`fastattn.patch` took them, completed with defaults.
    min_length: inputs shorter than this many tokens run dense.
    layer: index among the model's attention modules, for messages.
    record: while a calibration looks on: gets each call's (q, k, v, key_mask, scale), and the layer runs dense.
    """

    method: str
    knobs: dict[str, Any]
    min_length: int
    layer: int
    shared: ConfigPatch
    record: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a patched model that is unpickled in a fresh process finds its attention function there
        from fastattn.integrations._interface import register

        register()
        self.__dict__.update(state)


# by the id of the config, which a ConfigPatch keeps alive: an id in here is never another object's
_config_patches: weakref.WeakValueDictionary[int, ConfigPatch] = weakref.WeakValueDictionary()


def state_of(module: nn.Module) -> LayerState | None:
    return getattr(module, STATE, None)


def draws_of(module: nn.Module) -> Tensor:
    return module.get_buffer(DRAWS)


def set_state(module: nn.Module, state: LayerState, draws: Tensor) -> None:
    remove_state(module)
    state.shared.add_user()
    setattr(module, STATE, state)
    module.register_buffer(DRAWS, draws, persistent=False)


def remove_state(module: nn.Module) -> None:
    state = state_of(module)
    if state is None:
        return
    delattr(module, STATE)
    delattr(module, DRAWS)
    state.shared.remove_user()


def config_patch(module: nn.Module, others: list[nn.Module]) -> ConfigPatch:
    """The record of ``module``'s config: the one in use, if some patched module has it (``others`` of the same model
    are asked too, for records that came with a copy or a pickle), otherwise a new one."""
    config = module.config
    known = _config_patches.get(id(config))
    if known is not None and known.users > 0:
        return known
    for other in others:
        state = state_of(other)
        if state is not None and state.shared.config is config:
            return state.shared
    fresh = ConfigPatch(config)
    if fresh.previous == NAME:  # a config that was left behind by a deleted patched model: dense is what it means
        fresh.previous = "sdpa"
    _config_patches[id(config)] = fresh
    return fresh


def device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
