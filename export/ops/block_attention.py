"""``fastattn::BlockAttention`` in standard ops: blocks of gathered queries attend to blocks of gathered keys.

T: fp32 or fp16, computed in fp32. This is :func:`fastattn.ops.block_attention.block_attention` without options; with
them it is ``BlockAttentionWithOptions``.
"""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import torch
from onnx import TensorProto, helper
from onnxscript import opset18, script

from fastattn.export.ops import block_attention_with_options as with_options
from fastattn.export.ops.block_softmax import BlockSoftmax, MergeRounds
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import FLOAT, ExportedOp, NotExportable, node
from fastattn.ops.block_attention import SELF_MODES

op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def BlockAttention(q, k, v, q_index, k_index, scale: float):
    """q (B, H, N, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), T; q_index (B, H, R, nb, Cq) and k_index (B, H, R, nb, Ck)
    int32 with -1 for padding -> out (B, H, N, Dv) T, lse (B, H, N) fp32. The rounds are one softmax over all keys that
    a row met. A row that meets no key has out 0 and lse -inf."""
    is_key = op.Unsqueeze(op.GreaterOrEqual(k_index, op.CastLike(op.Constant(value_int=0), k_index)), [4])
    round_out, round_lse = BlockSoftmax(q, k, v, q_index, k_index, is_key, scale=scale)
    out, lse = MergeRounds(round_out, round_lse)
    return op.CastLike(out, q), lse


_NODE = node("BlockAttention", "q k v q_index:int32 k_index:int32", "out lse:float", {"scale": FLOAT})


def _translate(
    q: Any,
    k: Any,
    v: Any,
    q_index: Any,
    k_index: Any,
    scale: float = 1.0,
    fallback: bool = True,
    look_back: int = 0,
    look_ahead: int = 0,
    wrap: bool = True,
    is_causal: bool = False,
    self_mode: str = "attend",
    correct_duplicates: bool = False,
    dropout_p: float = 0.0,
    key_mask: Any = None,
    q_bucket: Any = None,
    k_bucket: Any = None,
    local_index_q: Any = None,
    local_index_k: Any = None,
    seed: Any = None,
    n_used_blocks: Any = None,
) -> Any:
    if dropout_p > 0:
        raise NotExportable(f"block_attention can't be exported to ONNX with dropout_p={dropout_p}")
    given = (key_mask, q_bucket, local_index_q, n_used_blocks)
    if not (look_back or look_ahead or is_causal or self_mode != "attend" or correct_duplicates) and all(
        tensor is None for tensor in given
    ):
        return _NODE(q, k, v, q_index, k_index, scale=scale)
    nowhere = op.Constant(value=helper.make_tensor("nowhere", TensorProto.INT32, [1, 1, 1, 1, 1], [-1]))
    alike = op.Constant(value=helper.make_tensor("alike", TensorProto.INT32, [1, 1, 1, 1], [0]))
    return with_options.NODE(
        q,
        k,
        v,
        q_index,
        k_index,
        nowhere if local_index_q is None else local_index_q,
        nowhere if local_index_k is None else local_index_k,
        alike if q_bucket is None else q_bucket,
        alike if k_bucket is None else k_bucket,
        op.Cast(op.Shape(q_index, start=3, end=4), to=TensorProto.INT32) if n_used_blocks is None else n_used_blocks,
        or_all(key_mask),
        scale=scale,
        look_back=look_back,
        look_ahead=look_ahead,
        wrap=int(wrap),
        is_causal=int(is_causal),
        self_mode=SELF_MODES.index(self_mode),
        across_buckets=int(q_bucket is None),
        correct_duplicates=int(correct_duplicates),
    )


OP = ExportedOp(functions=(BlockAttention,), translations={torch.ops.fastattn.block_attention.default: _translate})
