"""``fastattn::LshAttention`` in standard ops: Reformer's attention as hash, sort and block attention.

The definition is :func:`fastattn.lsh_attention`; each of the nested functions may be replaced by a library. T is fp32
or fp16; hashes and sums are fp32.

| input | shape | |
|---|---|---|
| qk | (B, H, N, D) T | |
| v | (B, Hkv, N, Dv) T | |
| rotations | (H or 1, D, R, W) fp32 | as of HashArgmax |
| key_mask | (B, N) bool | or (1, 1) for "all alike" |

| attribute | |
|---|---|
| factors | ints, as of HashArgmax |
| bucket_size, look_back, look_ahead | int |
| wrap, is_causal, across_buckets, correct_duplicates | int, 0 or 1 |
| self_mode | int, as of BlockAttentionWithOptions |
| local_window | int; 0: none |
| dense_threshold | int: up to so many rows every row meets every key, once |
| scale | float |

Output: out (B, H, N, Dv) T.
"""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.block_attention_with_options import BlockAttentionWithOptions
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.hash_argmax import HashArgmax
from fastattn.export.ops.local_blocks import LocalBlocks
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import FLOAT, INT, INTS, ExportedOp, NotExportable, as_fp32, node, shape_of
from fastattn.export.ops.sorted_blocks import SortedBlocks
from fastattn.methods import reformer as _defines_the_torch_op  # noqa: F401
from fastattn.ops.block_attention import SELF_MODES

FP32 = TensorProto.FLOAT
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def UnitRows(x):
    """x (..., D) T -> x / |x|, computed in fp32; rows of zeros stay what they are."""
    wide = op.Cast(x, to=FP32)
    norm = op.ReduceL2(wide, [-1], keepdims=1)
    zero = op.Constant(value_float=0.0)
    is_zero = op.Equal(norm, zero)
    inverse = op.Where(is_zero, zero, op.Reciprocal(op.Where(is_zero, zero + 1.0, norm)))
    return op.CastLike(wide * inverse, x)


@script(DOMAIN, default_opset=op)
def LshAttention(
    qk, v, rotations, key_mask,
    factors: Sequence[int], bucket_size: int, look_back: int, look_ahead: int, wrap: int, is_causal: int,
    across_buckets: int, correct_duplicates: int, self_mode: int, local_window: int, dense_threshold: int, scale: float,
):  # fmt: skip
    """Inputs, attributes and outputs: at the top of this file."""
    batch = op.Shape(qk, start=0, end=1)
    heads = op.Shape(qk, start=1, end=2)
    n = op.Shape(qk, start=2, end=3)
    one = op.Constant(value_ints=[1])
    nought = op.Constant(value_int=0)
    zero = op.Cast(nought, to=INT32)
    keep = op.Expand(key_mask, op.Concat(batch, n, axis=0))
    q = op.Where(op.Unsqueeze(keep, [1, 3]), qk, op.CastLike(nought, qk))
    k = UnitRows(q)
    head = op.Range(nought, op.Squeeze(heads), op.Constant(value_int=1))
    values = op.Gather(v, head / (heads / op.Shape(v, start=1, end=2)), axis=1)

    # a short input is dense: one round of one block, where nothing else makes a difference, neither how often a row
    # meets all the keys, nor the order in it
    limit = op.Reshape(op.Constant(value_int=dense_threshold), [1])
    bucket = op.Reshape(op.Constant(value_int=bucket_size), [1])
    is_dense = op.LessOrEqual(n, limit)
    size = op.Where(is_dense, n, bucket)
    n_blocks = (n + size - 1) / size
    n_real = op.ReduceSum(op.Cast(keep, to=INT64), [1], keepdims=1)  # [B, 1]
    # ... and so is a short example beside longer ones, but for buckets and a local round
    is_short = op.Or(is_dense, op.LessOrEqual(n_real, op.Min(limit, bucket)))

    buckets = HashArgmax(q, rotations, factors=factors)
    rounds = op.Where(is_dense, one, op.Shape(rotations, start=2, end=3))
    buckets = op.Slice(buckets, [0], rounds, [2])
    index = SortedBlocks(op.Cast(buckets, to=FP32), keep, n_blocks, size, packed=1)
    buckets = op.Where(op.Unsqueeze(is_short, [2, 3]), zero, buckets)
    in_local = op.And(keep, op.Not(is_short))
    local_index, _same = LocalBlocks(heads, in_local, in_local, window=local_window)
    n_used = op.Cast(op.Max(op.Squeeze((n_real + size - 1) / size, [1]), one), to=INT32)
    everyone = op.Cast(op.Expand(one, [1, 1]), to=TensorProto.BOOL)  # who stands in a block takes part
    out, _lse = BlockAttentionWithOptions(
        q, k, values, index, index, local_index, local_index, buckets, buckets, n_used, everyone,
        scale=scale, look_back=look_back, look_ahead=look_ahead, wrap=wrap, is_causal=is_causal, self_mode=self_mode,
        across_buckets=across_buckets, correct_duplicates=correct_duplicates,
    )  # fmt: skip
    return out


_FLAGS = ("look_back", "look_ahead", "wrap", "is_causal", "across_buckets", "correct_duplicates", "self_mode")
_NODE = node(
    "LshAttention",
    "qk v rotations:float key_mask:bool",
    "out",
    {"factors": INTS, "bucket_size": INT, "local_window": INT, "dense_threshold": INT, "scale": FLOAT}
    | dict.fromkeys(_FLAGS, INT),
)


def _translate(
    qk: Any,
    v: Any,
    rotations: Any = None,
    buckets: Any = None,
    key_mask: Any = None,
    bucket_size: int = 64,
    factors: Sequence[int] = (2,),
    look_back: int = 1,
    look_ahead: int = 0,
    wrap: bool = True,
    is_causal: bool = False,
    scale: float = 1.0,
    across_buckets: bool = True,
    correct_duplicates: bool = False,
    local_window: int = 0,
    merge: str = "lse",
    dense_threshold: int = 0,
    self_mode: str = "last_resort",
    padding: str = "last",
) -> Any:
    unknown = {"merge='mean'": merge == "mean", "padding='hashed'": padding == "hashed", "buckets": buckets is not None}
    if named := ", ".join(name for name, is_set in unknown.items() if is_set):
        raise NotExportable(f"lsh_attention can't be exported to ONNX with {named}: the node knows none of these")
    return _NODE(
        qk,
        v,
        as_fp32(rotations),
        or_all(key_mask),
        factors=list(factors),
        bucket_size=bucket_size,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=int(wrap),
        is_causal=int(is_causal),
        across_buckets=int(across_buckets),
        correct_duplicates=int(correct_duplicates),
        self_mode=SELF_MODES.index(self_mode),
        local_window=local_window,
        dense_threshold=dense_threshold,
        scale=scale,
    )


def _settings(node: ir.Node) -> dict[str, Any]:
    shape = shape_of(node.inputs[2])
    return {"n_hashes": None if shape is None else shape[2]}


OP = ExportedOp(
    functions=(LshAttention, UnitRows),
    translations={torch.ops.fastattn.lsh_attention.default: _translate},
    settings=_settings,
)
