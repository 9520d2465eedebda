"""How an op runs: its fused kernel, or, with one warning, its PyTorch definition where this machine can't run that."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from fastattn.kernels.errors import Unsupported

Result = TypeVar("Result")
_warned: set[tuple[str, str]] = set()


@lru_cache
def kernel_room(name: str) -> Any:
    """The module ``fastattn.kernels.<name>``. Imported at the first call: it needs Triton, which ``import fastattn``
    does not. Raises Unsupported where Triton is missing."""
    try:
        module: ModuleType = import_module(f"fastattn.kernels.{name}")
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed") from error
    return module


def fused_or_defined(
    what: str, fused: Callable[[], Result], defined: Callable[[], Result], *, fallback: bool
) -> Result:
    """``fused()``, or ``defined()`` where that raises :class:`~fastattn.kernels.errors.Unsupported`.

    what: the op in words, for the warning, which comes once for each op and reason. fallback: False raises instead.
    """
    try:
        return fused()
    except Unsupported as error:
        if not fallback:
            raise
        _warn_once(what, str(error))
    return defined()


def _warn_once(what: str, reason: str) -> None:
    if (what, reason) in _warned:
        return
    _warned.add((what, reason))
    warnings.warn(
        f"fastattn runs {what} by its PyTorch definition, because {reason}. "
        "Results are right, but it takes more time and memory.",
        stacklevel=4,
    )
