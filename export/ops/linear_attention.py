"""``fastattn::LinearAttention`` in standard ops: sums over keys are made once, by chunks where it is causal."""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto, helper
from onnxscript import opset18, script

from fastattn.export.ops import node as nodes
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import INT, ExportedOp, node
from fastattn.ops.linear_attention import FEATURE_MAPS

FLOAT, BOOL = TensorProto.FLOAT, TensorProto.BOOL
CHUNK = 64  # rows that meet one another by a masked product
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def Features(x, feature_map: int):
    """x fp32 -> phi(x) fp32. feature_map: 0 elu(x) + 1, 1 relu(x), 2 relu(x)^2, 3 x."""
    zero = op.Constant(value_float=0.0)
    chosen = op.Constant(value_int=feature_map)
    if chosen == 0:
        phi = op.Where(x > zero, x + 1.0, op.Exp(op.Min(x, zero)))
    else:
        rectified = op.Where(chosen == 3, x, op.Relu(x))
        phi = op.Where(chosen == 2, rectified * rectified, rectified)
    return phi


@script(DOMAIN, default_opset=op)
def AllKeys(x, y, values, state):
    """x (B, Hkv, G, N, F), y (B, Hkv, 1, S, F), values (B, Hkv, 1, S, W), state (B, Hkv, G, F, W) -> sums
    (B, Hkv, G, N, W) and the new state: every query meets all keys."""
    new_state = state + op.MatMul(op.Transpose(y, perm=[0, 1, 2, 4, 3]), values)
    return op.MatMul(x, new_state), new_state


@script(DOMAIN, default_opset=op)
def EarlierKeys(x, y, values, state):
    """The same where a query meets the keys up to its own row, and N is S. A chunk of rows meets the state of all
    chunks before, and its own rows by a product without its upper triangle: time and memory are linear in N."""
    chunk = op.Constant(value_ints=[CHUNK])
    zero = op.Constant(value_ints=[0])
    n = op.Shape(x, start=3, end=4)
    n_chunks = (n + chunk - 1) / chunk
    # rows of zeros behind the last: as keys they add nothing, as queries they are cut off again
    padding = op.Concat([0, 0, 0, 0, 0, 0, 0, 0], n_chunks * chunk - n, zero, axis=0)
    cut = op.Concat(n_chunks, chunk, axis=0)
    x_chunks = op.Reshape(op.Pad(x, padding), op.Concat(op.Shape(x, start=0, end=3), cut, op.Shape(x, start=4), axis=0))
    y_chunks = op.Reshape(op.Pad(y, padding), op.Concat(op.Shape(y, start=0, end=3), cut, op.Shape(y, start=4), axis=0))
    values_shape = op.Concat(op.Shape(values, start=0, end=3), cut, op.Shape(values, start=4), axis=0)
    value_chunks = op.Reshape(op.Pad(values, padding), values_shape)  # [B, Hkv, 1, n_chunks, CHUNK, W]

    y_turned = op.Transpose(y_chunks, perm=[0, 1, 2, 3, 5, 4])
    of_chunk = op.MatMul(y_turned, value_chunks)  # [B, Hkv, 1, n_chunks, F, W]
    earlier = op.Unsqueeze(state, [3]) + op.CumSum(of_chunk, op.Constant(value_int=3), exclusive=1)
    own = op.MatMul(op.Trilu(op.MatMul(x_chunks, y_turned), upper=0), value_chunks)
    sums = own + op.MatMul(x_chunks, earlier)  # [B, Hkv, G, n_chunks, CHUNK, W]
    sums = op.Reshape(sums, op.Concat(op.Shape(x, start=0, end=3), n_chunks * chunk, op.Shape(values, start=4), axis=0))
    new_state = state + op.ReduceSum(of_chunk, [3], keepdims=0)
    return op.Slice(sums, zero, n, [3]), new_state


@script(DOMAIN, default_opset=op)
def LinearAttention(q, k, v, key_mask, initial, feature_map: int, is_causal: int, eps: float):
    """q (B, H, N, F) and k (B, Hkv, S, F) of one type, v (B, Hkv, S, Dv), each fp32 or fp16, key_mask (B, S) bool or
    (1, 1) for "all", initial (B, H, F * (Dv + 1)) fp32, or (1, 1, 1), which is 0, for "nothing" -> out (B, H, N, Dv) in
    v's type, den (B, H, N) and state (B, H, F * (Dv + 1)) fp32.

    With w_ij = phi(q_i) . phi(k_j), den_i is the sum of w_ij and eps, out_i the sum of w_ij v_j over den_i, 0 where
    that is 0; over the keys that the mask has, is_causal: up to row i, where N is S. A state is the sum of phi(k_j)
    v_j^T, (F, Dv), then that of phi(k_j), (F,), flattened; ``initial`` is of keys that all queries meet as well.
    feature_map, the phi: 0 elu(x) + 1, 1 relu(x), 2 relu(x)^2, 3 x. What masked keys and values hold, NaN too, has no
    effect."""
    zero = op.Constant(value_float=0.0)
    one = op.Constant(value_ints=[1])
    lead = op.Shape(q, start=0, end=2)
    kv_lead = op.Shape(k, start=0, end=2)
    features = op.Shape(q, start=3, end=4)
    value_dim = op.Shape(v, start=3, end=4)
    grouped = op.Concat(kv_lead, op.Shape(q, start=1, end=2) / op.Shape(k, start=1, end=2), axis=0)  # B, Hkv, G

    takes_part = op.Unsqueeze(key_mask, [1, 3])  # [B, 1, S, 1]
    x = Features(op.Cast(q, to=FLOAT), feature_map=feature_map)
    x = op.Reshape(x, op.Concat(grouped, op.Shape(q, start=2), axis=0))  # [B, Hkv, G, N, F]
    y = Features(op.Where(takes_part, op.Cast(k, to=FLOAT), zero), feature_map=feature_map)
    y = op.Unsqueeze(op.Where(takes_part, y, zero), [2])
    values = op.Where(takes_part, op.Cast(v, to=FLOAT), zero)
    # a one behind each value makes the denominator one more sum
    values = op.Unsqueeze(op.Pad(values, [0, 0, 0, 0, 0, 0, 0, 1], zero + 1.0), [2])

    size = features * value_dim
    begin = op.Expand(initial, op.Concat(lead, size + features, axis=0))
    begin_s = op.Reshape(op.Slice(begin, [0], size, [2]), op.Concat(grouped, features, value_dim, axis=0))
    begin_z = op.Reshape(op.Slice(begin, size, size + features, [2]), op.Concat(grouped, features, one, axis=0))
    begin = op.Concat(begin_s, begin_z, axis=4)  # [B, Hkv, G, F, Dv + 1]
    if op.Cast(op.Constant(value_int=is_causal), to=BOOL):
        sums, state = EarlierKeys(x, y, values, begin)
    else:
        sums, state = AllKeys(x, y, values, begin)

    wide = op.Concat(op.Shape(q, start=0, end=3), value_dim + 1, axis=0)
    sums, total = op.Split(op.Reshape(sums, wide), op.Concat(value_dim, one, axis=0), axis=3)
    den = total + op.Constant(value_float=eps)
    empty = op.Equal(den, zero)
    out = op.CastLike(op.Where(empty, zero, sums / op.Where(empty, zero + 1.0, den)), v)
    s, z = op.Split(state, op.Concat(value_dim, one, axis=0), axis=4)
    s = op.Reshape(s, op.Concat(lead, size, axis=0))
    z = op.Reshape(z, op.Concat(lead, features, axis=0))
    return out, op.Squeeze(den, [3]), op.Concat(s, z, axis=2)


_NODE = node(
    "LinearAttention",
    "q k v key_mask:bool initial:float",
    "out den:float state:float",
    {"feature_map": INT, "is_causal": INT, "eps": nodes.FLOAT},
)


def _translate(
    q: Any,
    k: Any,
    v: Any,
    key_mask: Any,
    initial: Any,
    feature_map: str,
    is_causal: bool,
    eps: float,
    fallback: bool = True,
) -> Any:
    if initial is None:
        initial = op.Constant(value=helper.make_tensor("nothing", FLOAT, [1, 1, 1], [0.0]))
    knobs = {"feature_map": FEATURE_MAPS.index(feature_map), "is_causal": int(is_causal), "eps": eps}
    return _NODE(q, k, v, or_all(key_mask), initial, **knobs)


OP = ExportedOp(
    functions=(LinearAttention, AllKeys, EarlierKeys, Features),
    translations={torch.ops.fastattn.linear_attention.default: _translate},
)
