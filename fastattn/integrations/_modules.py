"""Which attention modules of a model transformers' AttentionInterface reaches, and which of them may be replaced."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

_OTHER_KEYS = ("key_value_states", "encoder_hidden_states")
_SOFT_CAPS = ("attn_logit_softcapping", "softcap", "logits_soft_cap")


def reached(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of all attention modules that ask the AttentionInterface what to run, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if _asks_interface(type(module))]


def attention_classes(model: nn.Module) -> list[str]:
    """Names of the model's classes that look like attention, for messages."""
    return sorted({type(module).__name__ for module in model.modules() if "attention" in type(module).__name__.lower()})


def why_not(name: str, module: nn.Module) -> str | None:
    """Why this attention can't be replaced by bidirectional self-attention over padded batches; None if it can.

    What a module shows only when it is called (a bias, a causal flag or keys of another length among its arguments) is
    refused at the call.
    """
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]
    takes_other_keys = any(word in parameters for word in _OTHER_KEYS)
    says_no_decoder = any(getattr(module, word, None) is False for word in ("is_decoder", "is_cross_attention"))
    if getattr(module, "is_causal", None) is True:
        return "causal attention"
    if (
        getattr(module, "is_decoder", False)
        or getattr(module, "is_cross_attention", False)
        or "cross" in type(module).__name__.lower()
        or _is_cross_by_name(name)
        or (takes_other_keys and not says_no_decoder)
    ):
        return "decoder or cross-attention"
    if parameters[:1] != ["hidden_states"]:
        return "queries and keys from different places"
    if getattr(module, "sliding_window", None) is not None:
        return "a sliding window"
    if "position_bias" in parameters:
        return "a position bias"
    if any(getattr(module, word, None) is not None for word in _SOFT_CAPS):
        return "soft-capped scores"
    if head_dim(module) is None or getattr(module, "config", None) is None:
        return "no head_dim or no config to go by"
    return None


def head_dim(module: nn.Module) -> int | None:
    """Size of one head's queries and keys; None where the module doesn't say."""
    for word in ("head_dim", "attention_head_size", "head_size"):
        size = getattr(module, word, None)
        if isinstance(size, int):
            return size
    return None


def without_sdpa(model: nn.Module, configs: list[Any]) -> list[str]:
    """Names of the model's classes that transformers keeps from SDPA, which short inputs and unpatched layers run."""
    return sorted(
        {
            type(module).__name__
            for module in model.modules()
            if getattr(module, "_supports_sdpa", True) is False
            and any(getattr(module, "config", None) is config for config in configs)
        }
    )


def _asks_interface(cls: type) -> bool:
    for ancestor in cls.__mro__:
        forward = ancestor.__dict__.get("forward")
        if forward is None:
            continue
        code = getattr(inspect.unwrap(forward), "__code__", None)
        if code is None:
            return False
        if "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return True
        if "super" not in code.co_names:
            return False
    return False


def _is_cross_by_name(name: str) -> bool:
    last = name.lower().split(".")[-2:]
    return any("cross" in part or part in ("encoder_attn", "encdecattention") for part in last)
