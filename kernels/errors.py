"""The one error by which a kernel says that it can't run here."""

from __future__ import annotations


class Unsupported(RuntimeError):
    """This machine can't run this kernel; the message says why (no compiler, an operation that the engine lacks, ...).

    Callers answer with the reference definition: the result is right, only slower.
    """
