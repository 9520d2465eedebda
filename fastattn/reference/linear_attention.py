"""Linear attention by definition: a feature map of queries and keys in place of the softmax.

With w_ij = phi(q_i) . phi(k_j), y_i = sum_j w_ij v_j / (sum_j w_ij + eps), over all keys or, if causal, those up to i
(Katharopoulos et al. 2020, sections 3.2 and 3.3). Causal rows go by in chunks: a chunk meets the state of all before,
S = sum_j phi(k_j) v_j^T and Z = sum_j phi(k_j), and its own rows by a masked product, so that memory is linear.

:func:`linear_attention` is differentiable by plain autograd, any number of times. :func:`linear_attention_backward` is
the same gradient written out, with nothing kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def phi(x: Tensor, feature_map: str) -> Tensor:
    """ "elu" (elu + 1), "relu", "relu2" (its square) or "identity"."""
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu":
        return x.relu()
    return x.relu().square() if feature_map == "relu2" else x


def slope(x: Tensor, feature_map: str) -> Tensor:
    """The derivative of :func:`phi`."""
    if feature_map == "elu":
        return x.clamp(max=0).exp()
    if feature_map == "relu":
        return (x > 0).to(x.dtype)
    return 2 * x.relu() if feature_map == "relu2" else torch.ones_like(x)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    initial: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, denominator, state) of linear attention.

    q (B, H, N, F), k (B, Hkv, S, F), v (B, Hkv, S, Dv). key_mask (B, S) bool: keys that take part; what the others hold
    has no effect. initial (B, H, F * (Dv + 1)): S, then Z, to begin with. chunk: rows at a time, of no effect on the
    result. fp16 and bf16 are computed in fp32. out (B, H, N, Dv) has v's dtype; the denominator (B, H, N) with eps
    and the state are fp32 (fp64 for fp64). A row whose denominator is 0 gives 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    x = phi(q.to(dtype), feature_map)
    y, values = _keys(q, k, v, key_mask, feature_map)
    s, z = _begin(initial, x, values)
    if is_causal:
        parts = []
        for rows in range(0, x.shape[2], chunk):
            a, b, c = (part[:, :, rows : rows + chunk] for part in (x, y, values))
            weights = (a @ b.mT).tril()
            parts.append((a @ s + weights @ c, (a @ z.unsqueeze(-1)).squeeze(-1) + weights.sum(-1)))
            s, z = s + b.mT @ c, z + b.sum(2)
        sums, total = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    else:
        s, z = s + y.mT @ values, z + y.sum(2)
        sums, total = x @ s, (x @ z.unsqueeze(-1)).squeeze(-1)
    den = total + eps
    out = sums * _inverse(den)
    return out.to(v.dtype), den, torch.cat([s.flatten(2), z], -1)


def linear_attention_backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    *,
    feature_map: str = "elu",
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    initial: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dinitial) of :func:`linear_attention` from the gradients of its out and state."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    x = phi(q.to(dtype), feature_map)
    y, values = _keys(q, k, v, key_mask, feature_map)
    g = dout.to(dtype) * _inverse(den)  # of the sums
    dz = -(g * out.to(dtype)).sum(-1, keepdim=True)  # of the denominators
    # a one behind each value makes the denominator one more sum
    values = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    g = torch.cat([g, dz], -1)
    s = torch.cat([*_begin(initial, x, values[..., :-1], column=True)], -1)
    r = torch.cat([*_begin(dstate, x, values[..., :-1], column=True)], -1)
    if is_causal:
        edges = range(0, x.shape[2], chunk)
        dx, dy, dvalues = [], [], []
        for rows in edges:
            b, c, e = (part[:, :, rows : rows + chunk] for part in (y, values, g))
            dx.append(e @ s.mT + (e @ c.mT).tril() @ b)
            s = s + b.mT @ c
        for rows in reversed(edges):
            a, b, c, e = (part[:, :, rows : rows + chunk] for part in (x, y, values, g))
            dy.append(c @ r.mT + (c @ e.mT).triu() @ a)
            dvalues.append(b @ r + (b @ a.mT).triu() @ e)
            r = r + a.mT @ e
        dx, dy, dvalues = torch.cat(dx, 2), torch.cat(dy[::-1], 2), torch.cat(dvalues[::-1], 2)
    else:
        dx = g @ (s + y.mT @ values).mT
        r = r + x.mT @ g
        dy, dvalues = values @ r.mT, y @ r
    dq = dx * slope(q.to(dtype), feature_map)
    dvalues = dvalues[..., :-1]
    group = q.shape[1] // k.shape[1]
    dy, dvalues = (part.unflatten(1, (-1, group)).sum(2) for part in (dy, dvalues))
    dk = dy * slope(k.to(dtype), feature_map)
    if key_mask is not None:
        dk, dvalues = (torch.where(key_mask[:, None, :, None], part, 0.0) for part in (dk, dvalues))
    dinitial = torch.cat([r[..., :-1].flatten(2), r[..., -1]], -1)
    return dq.to(q.dtype), dk.to(k.dtype), dvalues.to(v.dtype), dinitial


def _keys(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, feature_map: str) -> tuple[Tensor, Tensor]:
    """phi(k) and v for each query head, 0 where a key takes no part."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = k.to(dtype), v.to(dtype)
    if key_mask is not None:
        keep = key_mask[:, None, :, None]
        k, v = torch.where(keep, k, 0.0), torch.where(keep, v, 0.0)
    y = phi(k, feature_map)
    if key_mask is not None:
        y = torch.where(keep, y, 0.0)
    group = q.shape[1] // k.shape[1]
    return (y, v) if group == 1 else (y.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _begin(state: Tensor | None, x: Tensor, values: Tensor, *, column: bool = False) -> tuple[Tensor, Tensor]:
    """S (B, H, F, Dv) and Z (B, H, F), or Z as a column (B, H, F, 1); zeros where there is no state."""
    features, value_dim = x.shape[3], values.shape[3]
    if state is None:
        state = x.new_zeros((*x.shape[:2], features * (value_dim + 1)))
    s, z = state.split([features * value_dim, features], -1)
    return s.unflatten(-1, (features, value_dim)), z.unsqueeze(-1) if column else z


def _inverse(den: Tensor) -> Tensor:
    """1 / denominator (B, H, N, 1), 0 where that is 0."""
    empty = den == 0
    return torch.where(empty, 0.0, 1 / torch.where(empty, 1.0, den)).unsqueeze(-1)
