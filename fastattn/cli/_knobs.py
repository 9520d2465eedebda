"""A method's knobs, as a shell gives them: ``n_hashes=4``, ``correct_duplicates=true``, ``k_cluster_size=none``."""

from __future__ import annotations

from typing import Any

_WORDS = {"true": True, "false": False, "none": None}


def pair(text: str, example: str) -> tuple[str, str]:
    """A name and what stands after its ``=``; ``example`` is for the message where that is not what ``text`` has."""
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise ValueError(f"a knob is {example}; got {text!r}")
    return name, value


def value(text: str) -> Any:
    """A bool, None, a whole number, or the word itself: whether a knob takes it is for the method to say."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return int(text)
    except ValueError:
        return text
