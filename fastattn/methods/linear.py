"""Linear attention (Katharopoulos et al. 2020, "Transformers are RNNs"): time and memory linear in the length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastattn.methods import common
from fastattn.methods.feature_maps import RANDOM_FEATURES, random_directions
from fastattn.ops import checks
from fastattn.ops.autocast import no_autocast
from fastattn.ops.linear_attention import attend_linear
from fastattn.ops.linear_attention_step import step_linear

FUSED_MAPS = ("elu", "relu", "relu2")
FeatureMap = str | Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """What linear attention keeps of the keys that it met; never written to, so that it may be kept or shared.

    s: (B, H, F, Dv), the sum of phi(k) v^T. z: (B, H, F), the sum of phi(k). Both fp32 (fp64 for fp64), with H query
    heads and F features: D for "elu", "relu" and "relu2"; see :mod:`fastattn.methods.feature_maps` for the others.
    """

    s: Tensor
    z: Tensor


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: FeatureMap = ..., is_causal: bool = ...,
    key_mask: Tensor | None = ..., eps: float = ..., omega: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor] | None = ..., return_state: Literal[False] = ...,
    generator: torch.Generator | None = ..., impl: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: FeatureMap = ..., is_causal: bool = ...,
    key_mask: Tensor | None = ..., eps: float = ..., omega: Tensor | None = ...,
    initial_state: tuple[Tensor, Tensor] | None = ..., return_state: Literal[True],
    generator: torch.Generator | None = ..., impl: str | None = ...,
) -> tuple[Tensor, LinearState]: ...  # fmt: skip


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMap = "elu",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    omega: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    generator: torch.Generator | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention with weights phi(q_i) . phi(k_j) in place of exp(q_i . k_j / sqrt(D)).

    y_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps), over all keys or, if causal, those up to
    i (Katharopoulos et al. 2020, sections 3.2 and 3.3). Sums over keys are made once, so time is O((N + S) * F * Dv)
    and extra memory O(N + S). It is a layer of its own: a model that was trained with softmax attention has to be
    trained with it, but with "favor" and many features, which approach softmax attention.

    Args:
        q: (B, H, N, D); fp32, fp16 or bf16 (fp64 with impl="reference"), any strides. Not scaled by 1 / sqrt(D), but
            by "favor" and "rff".
        k: (B, Hkv, S, D) and v: (B, Hkv, S, Dv) in q's dtype. H is a multiple of Hkv; fewer key heads give what keys
            and values repeated for each group of query heads would.
        feature_map: "elu" (elu(x) + 1), "relu" or "relu2" (relu(x)^2): F = D, applied within the kernels; "favor",
            "rff" or "grf": random features, see :mod:`fastattn.methods.feature_maps`; or a callable that maps
            (..., D) to (..., F), applied to q and to k, such as a learned layer. These are made before, in fp32.
        is_causal: query i meets the keys up to i; then N must be S.
        key_mask: (B, S) bool, True for keys that take part. What the others hold has no effect. Queries are not masked.
        eps: added to each denominator as it is, whatever the features' scale is. At least 0. Where a denominator is
            exactly 0, as of a row that met no key, the result is 0.
        omega: (D, m), the directions of random features: F = 2 m for "favor" and "rff", m for "grf". None draws D
            orthogonal ones; but with a state, or where one is asked for, the same must be given each time.
        initial_state: the :class:`LinearState` of keys that all queries meet as well; gradients flow to it.
        return_state: also return the state after all keys, to go on from; gradients flow from it.
        generator: draws omega, where that is not given.
        impl: None runs the fused kernels, or their PyTorch definition, with one warning, where this machine can't run
            them; "triton" raises :class:`~fastattn.kernels.errors.Unsupported` there; "reference" always runs the
            definition, under plain autograd (fp64 and second derivatives too).

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, state). Sums, denominators and states are fp32 for fp16 and bf16.

    Under autocast q, k and v are cast to its dtype. States are fp32 all the same. Exported graphs (``torch.export``)
    hold one node, ``fastattn::linear_attention``, whatever ``impl`` says, behind what makes the features; a drawn omega
    is a constant.

    Raises:
        TypeError, ValueError: naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, None, impl)
    checks.check_bool("is_causal", is_causal)
    checks.check_bool("return_state", return_state)
    if is_causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k must have q's length {q.shape[2]} with is_causal=True, got {k.shape[2]}; for keys before the first "
            "query, pass their state as initial_state"
        )
    checks.check_mask("key_mask", key_mask, k.shape[0], k.shape[2], q.device)
    keeps_state = initial_state is not None or return_state
    x, y, name = _features(q, k, feature_map, eps, omega, keeps_state, generator, key_mask)
    initial = None
    if initial_state is not None:
        initial = _flat(_check_state("initial_state", initial_state, x, v))
    if torch.compiler.is_exporting() and v.dtype != torch.float64:
        impl = None  # it says how torch computes, which is nothing to a graph
    out, state = attend_linear(
        x,
        y,
        v,
        feature_map=name,
        is_causal=is_causal,
        key_mask=key_mask,
        eps=float(eps),
        initial=initial,
        impl=impl,
    )
    return (out, _split(state, x.shape[3], v.shape[3])) if return_state else out


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    feature_map: FeatureMap = "elu",
    eps: float = 1e-6,
    omega: Tensor | None = None,
) -> tuple[Tensor, LinearState]:
    """The next token of causal linear attention: its time and memory do not depend on how many came before.

    Args:
        q: (B, H, 1, D), k: (B, Hkv, 1, D), v: (B, Hkv, 1, Dv): of the next token, as :func:`linear_attention` takes
            them.
        state: the :class:`LinearState` after the tokens before, from ``linear_attention(..., return_state=True)`` or
            from the last step; :func:`empty_state` before the first token. It is not changed.
        feature_map, eps, omega: as the tokens before had them.

    Returns:
        (out (B, H, 1, Dv) in q's dtype, the state after this token): what the causal form gives at this position.

    Gradients flow to all inputs. Raises TypeError or ValueError naming the argument that is at fault.
    """
    q, k, v = common.check_inputs(q, k, v, None, None)
    if q.shape[2] != 1 or k.shape[2] != 1:
        name, length = ("q", q.shape[2]) if q.shape[2] != 1 else ("k", k.shape[2])
        raise ValueError(f"{name} must have length 1, got {length}; linear_attention takes more tokens at a time")
    x, y, name = _features(q, k, feature_map, eps, omega, True, None, None)
    s, z = _check_state("state", state, x, v)
    out, s, z = step_linear(x, y, v, s, z, feature_map=name, eps=float(eps))
    return out, LinearState(s, z)


def empty_state(
    batch: int, heads: int, features: int, value_dim: int, *, device: torch.device | str | None = None
) -> LinearState:
    """The state before the first token, in fp32."""
    for name, size in (("batch", batch), ("heads", heads), ("features", features), ("value_dim", value_dim)):
        checks.check_int(name, size, 1)
    return LinearState(
        torch.zeros(batch, heads, features, value_dim, dtype=torch.float32, device=device),
        torch.zeros(batch, heads, features, dtype=torch.float32, device=device),
    )


def _features(
    q: Tensor,
    k: Tensor,
    feature_map: Any,
    eps: Any,
    omega: Any,
    keeps_state: bool,
    generator: Any,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, str]:
    """What stands for q and k in the kernels, and the map that is still to be applied there."""
    _check_eps(eps)
    if not callable(feature_map):
        checks.check_choice("feature_map", feature_map, (*FUSED_MAPS, *RANDOM_FEATURES))
    if omega is not None and feature_map not in RANDOM_FEATURES:
        names = ", ".join(map(repr, RANDOM_FEATURES))
        raise ValueError(f"omega must be None but for {names}, got it for {feature_map!r}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if isinstance(feature_map, str) and feature_map in FUSED_MAPS:
        return q, k, feature_map
    if not callable(feature_map):
        omega = _directions(q, omega, feature_map, keeps_state, generator)
    if key_mask is not None:
        # else NaN there would reach the gradients of omega and of what a callable has learned
        k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
    x: Any
    y: Any
    if callable(feature_map):
        x, y = feature_map(q), feature_map(k)
        _check_features(x, y, q, k)
    else:
        with no_autocast(q.device.type):
            x, y = (RANDOM_FEATURES[feature_map](part, omega) for part in (q, k))
    if x.dtype != q.dtype or y.dtype != q.dtype:
        wide = torch.promote_types(q.dtype, torch.float32)
        x, y = x.to(wide), y.to(wide)
    return x, y, "identity"


def _directions(q: Tensor, omega: Any, feature_map: str, keeps_state: bool, generator: Any) -> Tensor:
    head_dim = q.shape[3]
    if omega is None:
        if keeps_state:
            raise ValueError(
                f"omega must be given where {feature_map!r} goes with a state, which holds for these directions alone; "
                "fastattn.methods.feature_maps.random_directions draws some"
            )
        return random_directions(head_dim, head_dim, generator=generator, device=q.device)
    checks.check_tensors(omega=omega)
    if not omega.is_floating_point():
        raise TypeError(f"omega must be of a floating dtype, got {omega.dtype}")
    if omega.dim() != 2 or omega.shape[0] != head_dim or omega.shape[1] == 0:
        raise ValueError(f"omega must have shape (head_dim, directions) = ({head_dim}, ...), got {tuple(omega.shape)}")
    checks.check_device("omega", omega, q.device)
    return omega


def _check_eps(eps: Any) -> None:
    if isinstance(eps, torch.SymFloat):  # of a dynamic trace
        return
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a float, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def _check_features(x: Any, y: Any, q: Tensor, k: Tensor) -> None:
    for made, source, name in ((x, q, "q"), (y, k, "k")):
        if not isinstance(made, Tensor):
            raise TypeError(f"feature_map must return a torch.Tensor, got {type(made).__name__} for {name}")
        if not made.is_floating_point():
            raise TypeError(f"feature_map must return floating features, got {made.dtype} for {name}")
        if (
            made.dim() != 4
            or made.shape[:3] != source.shape[:3]
            or made.shape[3] in (0,)
            or made.shape[3] != x.shape[3]
        ):
            raise ValueError(
                f"feature_map must map (..., head_dim) to (..., features), the same number for q and k; got "
                f"{tuple(made.shape)} for {name} of shape {tuple(source.shape)}"
            )


def _check_state(name: str, state: Any, x: Tensor, v: Tensor) -> LinearState:
    """x: features of the queries."""
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{name} must be a LinearState (s, z), got {type(state).__name__}")
    dtype = torch.promote_types(v.dtype, torch.float32)
    shapes = ((*x.shape[:2], x.shape[3], v.shape[3]), (*x.shape[:2], x.shape[3]))
    for part, tensor, shape, meaning in zip(
        "sz", state, shapes, ("(batch, heads, features, value_dim)", "(batch, heads, features)"), strict=True
    ):
        checks.check_tensors(**{f"{name}.{part}": tensor})
        if tensor.dtype != dtype:
            raise TypeError(f"{name}.{part} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}.{part} must have shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}")
        checks.check_device(f"{name}.{part}", tensor, x.device)
    return LinearState(*state)


def _flat(state: LinearState) -> Tensor:
    """(B, H, F * (Dv + 1)), as the op takes it."""
    return torch.cat([state.s.flatten(2), state.z], -1)


def _split(state: Tensor, features: int, value_dim: int) -> LinearState:
    s, z = state.split([features * value_dim, features], -1)
    return LinearState(s.unflatten(-1, (features, value_dim)), z)
