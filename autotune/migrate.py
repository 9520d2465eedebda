"""Older versions of the cache's file format, brought up to the present one when they are read.

A file keeps its version until somebody writes to it, so that an older fastattn beside this one can read it until then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Document = dict[str, Any]

# Version -> what makes a document of the next version of one of this version. A migration keeps every row, or says what
# a row lacks in a field that the next version has for it; it may change the document that it is given.
MIGRATIONS: dict[int, Callable[[Document], Document]] = {}


class NoWay(Exception):
    """A document cannot be brought up to the present version; the message says why."""


def migrate(document: Document, version: int, present: int) -> Document:
    """The document of schema version ``version`` in the format of version ``present``, step by step.

    Raises :class:`NoWay` for a version that is newer or that no step begins at, and where a step fails on the document.
    """
    if version > present:
        raise NoWay(f"it has schema version {version}, and this fastattn knows up to {present}")
    for step in range(version, present):
        if step not in MIGRATIONS:
            raise NoWay(f"it has schema version {version}, which this fastattn no longer reads")
        try:
            document = MIGRATIONS[step](document)
        except Exception as error:  # what stands in a damaged file, nobody knows
            reason = f"{type(error).__name__}: {error}"
            raise NoWay(f"it has schema version {step}, from which it cannot be upgraded ({reason})") from error
    return document
