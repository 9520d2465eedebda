"""The two functions that transformers calls for a patched model: one builds masks, one attends.

Both are registered under one name. With the attention function alone, transformers would build no mask at all and
padded batches would silently attend to their padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastattn.integrations._methods import METHODS
from fastattn.integrations._state import NAME, LayerState, draws_of, state_of

# arguments that change what attention computes, by which models ask for more than padded softmax attention
_REFUSED = {
    "position_bias": "a position bias",
    "softcap": "soft-capped scores",
    "sliding_window": "a sliding window",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse key indices",
    "block_indices": "sparse block indices",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "head_mask": "a head mask",
}


def register() -> None:
    """Make ``NAME`` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, build_mask)


def build_mask(
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **rest: Any,
) -> Tensor | None:
    """A padding mask (B, 1, 1, S), True where a token takes part, or None when all do; other patterns as SDPA has them.

    The broadcast form is a valid SDPA mask, so layers that are not patched, and models that work on the mask
    themselves, see what they are used to, without its N x S elements.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function
    from transformers.utils.import_utils import is_tracing

    only_padding = (
        mask_function is bidirectional_mask_function
        and local_size is None
        and allow_is_bidirectional_skip
        and not use_vmap
        and (attention_mask is None or attention_mask.ndim == 2)
    )
    if not only_padding:
        given = {} if mask_function is None else {"mask_function": mask_function}
        return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            kv_length=kv_length,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            **given,
            **rest,
        )
    if attention_mask is None:
        return None
    # a trace must not look at values; otherwise "nothing is padded" is worth one look a forward
    if not torch.compiler.is_exporting() and not is_tracing(attention_mask) and bool(attention_mask.all()):
        return None
    return attention_mask[:, None, None, kv_offset : kv_offset + kv_length].to(torch.bool)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, N, D), key and value (B, Hkv, S, D) -> (B, N, H, D), None, as transformers' attention functions.

    A module without settings of ours, or an input shorter than its ``min_length``, gets transformers' own SDPA.
    """
    state = state_of(module)
    if state is None:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs)
    _check_extras(module, state, kwargs)
    _check_bidirectional(module, state, is_causal, attention_mask)
    if _runs_dense(module, state, key.shape[2]):
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, False, kwargs)
    if query.shape[2] != key.shape[2]:
        _refuse(
            module, state, f"got {query.shape[2]} queries and {key.shape[2]} keys: only self-attention without a cache"
        )
    if dropout > 0.0:
        _refuse(
            module,
            state,
            f"was called in training mode with attention dropout {dropout}, which patched layers do not have: "
            "set the model's attention dropout to 0 (in its config before it is built, or on its attention modules), "
            "or call model.eval()",
        )
    key_mask = _key_mask(module, state, attention_mask, key)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    if state.record is not None:
        state.record(query, key, value, key_mask, scale)
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, False, kwargs)
    out = METHODS[state.method].attend(query, key, value, key_mask, scale, draws_of(module), state.knobs)
    return out.transpose(1, 2).contiguous(), None


def _runs_dense(module: nn.Module, state: LayerState, length: int) -> bool:
    if state.min_length == 0:
        return False
    if torch.compiler.is_exporting() and not isinstance(length, int):
        _refuse(
            module,
            state,
            f"can't be exported for every length: min_length={state.min_length} makes short inputs dense, and a graph "
            "does not choose. Patch with min_length=0",
        )
    return length < state.min_length


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def _refuse(module: nn.Module, state: LayerState, why: str) -> NoReturn:
    raise ValueError(f"layer {state.layer} ({type(module).__name__}), patched with {state.method!r}, {why}")


def _check_extras(module: nn.Module, state: LayerState, kwargs: dict[str, Any]) -> None:
    if kwargs.get("output_attentions"):
        _refuse(
            module, state, "has no attention matrix to return: output_attentions=True needs fastattn.unpatch(model)"
        )
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            _refuse(module, state, f"was called with {what} ({name}=), which the method does not support")


def _check_bidirectional(
    module: nn.Module, state: LayerState, is_causal: bool | None, attention_mask: Tensor | None
) -> None:
    # the call's word goes before the module's, and no word at all means causal, as in transformers' own functions;
    # a mask stands in for the module's word
    said = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if said and (is_causal or attention_mask is None):
        _refuse(module, state, "was called for causal attention: only bidirectional attention is supported")


def _key_mask(module: nn.Module, state: LayerState, attention_mask: Tensor | None, key: Tensor) -> Tensor | None:
    """(B, S) boolean, from the mask that the model hands over."""
    if attention_mask is None:
        return None
    shape, batch, length = tuple(attention_mask.shape), key.shape[0], key.shape[2]
    if attention_mask.ndim != 4 or shape[1] != 1 or shape[2] != 1 or attention_mask.dtype != torch.bool:
        _refuse(
            module,
            state,
            f"got an attention mask of shape {shape} and dtype {attention_mask.dtype}: only padding is supported, in "
            f"the boolean form (batch, 1, 1, {length}) that transformers makes of a 2-d attention_mask",
        )
    return attention_mask[:, 0, 0, :].expand(batch, length)
