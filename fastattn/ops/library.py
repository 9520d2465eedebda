"""The one ``torch.library`` object of the package, and how an op is put on it.

``define`` and ``impl`` with an ``autograd.Function`` rather than ``torch.library.custom_op``: half the cost of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("fastattn", "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
) -> Any:
    """Defines ``fastattn::<schema>`` and returns the op.

    implementation: runs on every device. cpu: runs on the CPU instead. fake: outputs without contents, for tracing.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    if cpu is not None:
        LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastattn, name).default


def define_autograd(op: Any, function: type[torch.autograd.Function]) -> None:
    """Makes ``function`` the gradient of ``op``.

    Its ``forward(ctx, below, *args)`` gets, as ``below``, the op without its gradient, to be called with ``args``.
    """

    def dispatch(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        def below(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return function.apply(below, *args)
        return below(*args)

    LIBRARY.impl(op._schema.name.partition("::")[2], dispatch, "Autograd", with_keyset=True)


def refuse_gradient(op: Any, message: str) -> None:
    """Lets ``op`` run on inputs that require grad, and raises RuntimeError(message) if a gradient is asked of it."""

    class Refusal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, below: Callable[..., Any], *args: Any) -> Any:
            return below(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(message)

    define_autograd(op, Refusal)
