"""What the methods share: the checks of their common arguments, masks, and draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastattn.ops import checks
from fastattn.ops.autocast import cast_inputs


def check_inputs(q: Any, k: Any, v: Any, scale: Any, impl: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Checks q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) and returns them in autocast's dtype, if it is on."""
    checks.check_tensors(q=q, k=k, v=v)
    checks.check_choice("impl", impl, checks.IMPLS)
    q, k, v = cast_inputs(q, k, v)
    checks.check_qkv(q, k, v, impl)
    checks.check_scale(scale)
    return q, k, v


def check_masks(q: Tensor, k: Tensor, key_mask: Any, query_mask: Any) -> Tensor | None:
    """Checks the masks and returns the query mask: ``query_mask``, or, for equal lengths, ``key_mask`` if None."""
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], q.device)
    checks.check_mask("query_mask", query_mask, q.shape[0], q.shape[2], q.device)
    if query_mask is None and key_mask is not None and q.shape[2] == k.shape[2]:
        return key_mask
    return query_mask


def check_draw(name: str, draw: Any, shape: tuple[int, ...], meaning: str, device: torch.device) -> None:
    """Checks a random draw that was passed in. meaning: the shape in words, for the message."""
    checks.check_tensors(**{name: draw})
    if not draw.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {draw.dtype}")
    if tuple(draw.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(draw.shape)}")
    checks.check_device(name, draw, device)


@contextmanager
def drawn_now() -> Iterator[None]:
    """Around random draws: in a graph that ``torch.export`` makes they are constants, drawn while it is made."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        with _disable_current_modes():  # else a trace has the drawing itself as an operation
            yield
    else:
        yield


def draw_normal(shape: tuple[int, ...], generator: Any, device: torch.device) -> Tensor:
    """Standard normal fp32 numbers on ``device``, drawn on the generator's device."""
    _check_generator(generator)
    place = device if generator is None else generator.device
    with drawn_now():
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=place).to(device)


def draw_seed(generator: Any, device: torch.device) -> Tensor:
    """A seed, int64 without dimensions on ``device``, drawn on the generator's device; no host looks at it."""
    _check_generator(generator)
    place = device if generator is None else generator.device
    with drawn_now():
        return torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=place).to(device)


def _check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
