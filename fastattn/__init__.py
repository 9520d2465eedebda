"""fastattn: attention that is cheap on long sequences.

Call a method: ``fastattn.smyrf_attention(q, k, v)``. Put it into a pre-trained Hugging Face model:
``fastattn.patch(model, "smyrf")``, ``fastattn.unpatch(model)`` or ``with fastattn.patched(model, "smyrf"):``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn.methods.smyrf import smyrf_attention

if TYPE_CHECKING:
    from fastattn.integrations.transformers import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = ["__version__", "patch", "patched", "smyrf_attention", "unpatch"]

# Imported at first use: whoever only calls an op shall not pay for what patching needs.
_LAZY = {name: "fastattn.integrations.transformers" for name in ("patch", "patched", "unpatch")}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
