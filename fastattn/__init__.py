"""fastattn: attention that is cheap on long sequences.

Call a method: ``fastattn.smyrf_attention(q, k, v)``. Put it into a pre-trained Hugging Face model:
``fastattn.patch(model, "smyrf")``, ``fastattn.unpatch(model)`` or ``with fastattn.patched(model, "smyrf"):``. Find out
how far to go: ``fastattn.calibrate(model, "smyrf", batch=..., max_error=...)``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn.methods.attend import attend
from fastattn.methods.clustered import clustered_attention
from fastattn.methods.improved_clustered import improved_clustered_attention
from fastattn.methods.linear import linear_attention, linear_attention_step
from fastattn.methods.reformer import lsh_attention
from fastattn.methods.reformer_decoding import lsh_attention_step, lsh_decoding_state
from fastattn.methods.smyrf import smyrf_attention

if TYPE_CHECKING:
    from fastattn.integrations.calibrate import calibrate
    from fastattn.integrations.transformers import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attend",
    "calibrate",
    "clustered_attention",
    "improved_clustered_attention",
    "linear_attention",
    "linear_attention_step",
    "lsh_attention",
    "lsh_attention_step",
    "lsh_decoding_state",
    "patch",
    "patched",
    "smyrf_attention",
    "unpatch",
]

# Imported at first use: whoever only calls an op shall not pay for what patching needs.
_LAZY = {name: "fastattn.integrations.transformers" for name in ("patch", "patched", "unpatch")}
_LAZY["calibrate"] = "fastattn.integrations.calibrate"


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
