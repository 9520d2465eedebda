"""The errors by which a kernel says that it can't run here."""

from __future__ import annotations


class Unsupported(RuntimeError):
    """This machine can't run this kernel; the message says why (no compiler, an operation that the engine lacks, ...).

    Callers answer with the reference definition: the result is right, only slower.
    """


class UnsupportedNow(Unsupported):
    """It can't now, but it may in a while: the disk is full, the compiler was killed or took too long."""
