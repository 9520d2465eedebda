"""The package's one settings object: where caches live."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

CACHE_DIR_VARIABLE = "FASTATTN_CACHE_DIR"


@dataclass(frozen=True)
class Settings:
    """Read from the environment at each call of :func:`settings`, so that tests and users may change it late.

    cache_dir: the folder of every cache (built CPU kernels in ``cpu/``, up to 512 MiB, tuned configurations in
        ``tune/``); ``FASTATTN_CACHE_DIR``, or the platform's user cache folder.
    """

    cache_dir: Path


def settings() -> Settings:
    place = os.environ.get(CACHE_DIR_VARIABLE)
    return Settings(cache_dir=Path(place) if place else Path(platformdirs.user_cache_dir("fastattn")))
