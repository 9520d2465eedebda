"""How tests of wrong arguments are listed: (argument, error, what is wrong, the value made of the good arguments)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

Change = Callable[[dict[str, Any]], Any]
Bad = tuple[str, type[Exception], str, Change]


def each_of(bad: Sequence[Bad]) -> pytest.MarkDecorator:
    """Runs a test of (name, error, change) for each wrong argument."""
    return pytest.mark.parametrize(
        ("name", "error", "change"),
        [pytest.param(name, error, change, id=f"{name}: {why}") for name, error, why, change in bad],
    )
