"""Any attention method by its name, on batches or on packed sequences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastattn.methods import packed
from fastattn.methods.clustered import clustered_attention
from fastattn.methods.dense import dense_attention
from fastattn.methods.improved_clustered import improved_clustered_attention
from fastattn.methods.linear import linear_attention
from fastattn.methods.reformer import lsh_attention
from fastattn.methods.smyrf import smyrf_attention
from fastattn.ops import checks

METHODS: dict[str, Callable[..., Any]] = {
    "dense": dense_attention,
    "smyrf": smyrf_attention,
    "lsh": lsh_attention,
    "clustered": clustered_attention,
    "improved_clustered": improved_clustered_attention,
    "linear": linear_attention,
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    method: str = "smyrf",
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    **knobs: Any,
) -> Any:
    """Attention by the method of that name: ``attend(q, k, v, method="smyrf", n_hashes=8)``.

    Args:
        q: (B, H, N, D), k: (B, Hkv, S, D), v: (B, Hkv, S, Dv), as the method takes them. For "lsh", whose queries are
            its keys, k must be the very tensor q.
        method: "dense" (torch's scaled_dot_product_attention), "smyrf", "lsh", "clustered", "improved_clustered" or
            "linear".
        cu_seqlens: None, or (n + 1,) int32: the packed form. Sequence i is the rows cu_seqlens[i] to
            cu_seqlens[i + 1] - 1 of q (total, H, D), and of k (total, Hkv, D) and v (total, Hkv, Dv); the result is
            (total, H, Dv), each sequence's rows as a call of its own gives them. See :mod:`fastattn.methods.packed`
            for the methods, the knobs and the cost.
        cu_seqlens_k: the same for k and v, where queries and keys are of different sequences. None: ``cu_seqlens``.
        knobs: of the method's function: see :func:`fastattn.smyrf_attention`, :func:`fastattn.lsh_attention` and so on;
            for "dense" :func:`fastattn.methods.dense.dense_attention`.

    Returns:
        What the method's function returns: out, or out and more where a knob such as return_lse asks for it.

    Raises:
        TypeError, ValueError: naming the argument that is at fault; for an unknown knob, with those of the method.
    """
    checks.check_choice("method", method, tuple(METHODS))
    _check_knobs(method, knobs)
    if method == "lsh" and k is not q:
        raise ValueError("k must be q itself with method='lsh', whose queries are its keys")
    if cu_seqlens is not None:
        return packed.attend_packed(q, k, v, method, METHODS[method], cu_seqlens, cu_seqlens_k, knobs)
    if cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_k needs cu_seqlens, which is None")
    if method == "lsh":
        return lsh_attention(q, v, **knobs)
    return METHODS[method](q, k, v, **knobs)


def _check_knobs(method: str, knobs: dict[str, Any]) -> None:
    parameters = inspect.signature(METHODS[method]).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := ", ".join(repr(name) for name in knobs if name not in allowed):
        raise ValueError(f"unknown knob {unknown} for method {method!r}; allowed: {', '.join(allowed)}")
