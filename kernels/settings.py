"""The package's one settings object: where caches live, and whether choices are pinned."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

CACHE_DIR_VARIABLE = "FASTATTN_CACHE_DIR"


@dataclass(frozen=True)
class Settings:
    """Read from the environment at each call of :func:`settings`, so that tests and users may change it late.

    cache_dir: the folder of every cache (built CPU kernels in ``cpu/``, up to 512 MiB, tuned configurations in
        ``tune/``); ``FASTATTN_CACHE_DIR``, or the platform's user cache folder.
    pins: the file of pinned configurations that :func:`configure` named; None is ``tune/pins.json`` of ``cache_dir``,
        if there is one. With such a file kernels run by its entries, else by their heuristics, whatever is tuned.
    """

    cache_dir: Path
    pins: Path | None = None


_pins: str | None = None


def settings() -> Settings:
    place = os.environ.get(CACHE_DIR_VARIABLE)
    cache_dir = Path(place) if place else Path(platformdirs.user_cache_dir("fastattn"))
    return Settings(cache_dir, None if _pins is None else Path(_pins))


def configure(*, pins: str | os.PathLike[str] | None) -> None:
    """Sets what this process, not a file or the environment, says.

    pins: a file that ``fastattn cache pin`` wrote: from the next call on, kernels run by it. None is that of the cache
    folder again, if there is one. Raises FileNotFoundError where there is no such file: a run that is meant to be
    reproducible does not fall back on what happens to be tuned.
    """
    global _pins
    if pins is not None and not os.path.isfile(pins):
        raise FileNotFoundError(f"pins must be a file that fastattn cache pin wrote, got {os.fspath(pins)!r}")
    _pins = None if pins is None else os.path.abspath(pins)


# os.environ.get takes up to 1 µs of a launch's 20, to decode names or to find that there is none. The table behind it
# is CPython's own, and always as new.
_VARIABLES: Mapping[Any, object] = getattr(os.environ, "_data", os.environ)
_VARIABLE = CACHE_DIR_VARIABLE if _VARIABLES is os.environ else os.environ.encodekey(CACHE_DIR_VARIABLE)


def fingerprint() -> tuple[object, ...]:
    """What :func:`settings` is made from: equal as long as that is, and cheap enough to be asked for at every call."""
    return _VARIABLES.get(_VARIABLE), _pins
