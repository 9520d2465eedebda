"""``fastattn::SmyrfAttention`` and ``SmyrfAttentionWithOptions`` in standard ops: hash, cut into blocks, attend.

The definition is :func:`fastattn.smyrf_attention`; each of the nested functions may be replaced by a library. T is fp32
or fp16; hashes and sums are fp32.

| input | shape | |
|---|---|---|
| q | (B, H, N, D) T | |
| k, v | (B, Hkv, S, D), (B, Hkv, S, Dv) T | |
| projections | (D + 2, R) fp32 | |
| key_mask, query_mask | (B, S), (B, N) bool | or (1, 1) for "all alike" |

| attribute | |
|---|---|
| q_cluster_size, k_cluster_size | int; 0 for keys: as many as it takes |
| scale | float |
| packed | int; 1: blocks are filled one after the other; 0: queries and keys are cut at the same quantiles |

packed=1 is for queries and keys that are the same tokens, with one mask and one cluster size.

SmyrfAttentionWithOptions has besides, and N = S with the first three:

| attribute | |
|---|---|
| is_causal | int, 0 or 1 |
| self_mode | int, as of BlockAttentionWithOptions: 3 ("once") if causal, else 0 |
| local_window | int; 0: none |
| correct_duplicates | int, 0 or 1 |

Outputs: out (B, H, N, Dv) T, lse (B, H, N) fp32.
"""

# onnxscript evaluates annotations: no `from __future__ import annotations` here

from typing import Any

import onnx_ir as ir
import torch
from onnx import TensorProto
from onnxscript import opset18, script

from fastattn.export.ops.block_attention import BlockAttention
from fastattn.export.ops.block_attention_with_options import BlockAttentionWithOptions
from fastattn.export.ops.domain import DOMAIN
from fastattn.export.ops.local_blocks import LocalBlocks
from fastattn.export.ops.masks import or_all
from fastattn.export.ops.node import FLOAT, INT, ExportedOp, NotExportable, as_fp32, node, shape_of
from fastattn.export.ops.smyrf_hash import SmyrfHash
from fastattn.export.ops.sorted_blocks import SortedBlocks
from fastattn.methods import smyrf as _defines_the_torch_op  # noqa: F401
from fastattn.ops.block_attention import SELF_MODES

BOOL = TensorProto.BOOL
op: Any = opset18  # a body is a graph that looks like Python: its types are ONNX's


@script(DOMAIN, default_opset=op)
def SmyrfBlocks(q, k, projections, key_mask, query_mask, q_cluster_size: int, k_cluster_size: int, packed: int):
    """q, k, projections and attributes as of SmyrfAttention, key_mask (B, S) and query_mask (B, N) bool -> q_index
    (B, H, R, nb, Cq), k_index (B, H, R, nb, Ck) int32: the rows that take part, as BlockAttention takes them."""
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    q_hash, k_hash = SmyrfHash(q, k, projections, query_mask, key_mask)

    is_packed = op.Cast(op.Constant(value_int=packed), to=BOOL)
    q_size = op.Reshape(op.Constant(value_int=q_cluster_size), [1])
    k_size = op.Reshape(op.Constant(value_int=k_cluster_size), [1])
    wanted = (n + q_size - 1) / q_size
    n_blocks = op.Where(is_packed, wanted, op.Min(wanted, s))
    # fewer keys than blocks: as many blocks as keys, of more queries
    q_size = op.Where(op.Less(n_blocks, wanted), (n + n_blocks - 1) / n_blocks, q_size)
    k_needed = op.Where(is_packed, q_size, (s + n_blocks - 1) / n_blocks)
    k_size = op.Where(op.Equal(k_size, 0), k_needed, k_size)

    q_index = SortedBlocks(q_hash, query_mask, n_blocks, q_size, packed=packed)
    k_index = SortedBlocks(k_hash, key_mask, n_blocks, k_size, packed=packed)
    return q_index, k_index


@script(DOMAIN, default_opset=op)
def SmyrfAttention(
    q, k, v, projections, key_mask, query_mask, q_cluster_size: int, k_cluster_size: int, scale: float, packed: int
):
    """Inputs, attributes and outputs: at the top of this file."""
    batch = op.Shape(q, start=0, end=1)
    query_keep = op.Expand(query_mask, op.Concat(batch, op.Shape(q, start=2, end=3), axis=0))
    key_keep = op.Expand(key_mask, op.Concat(batch, op.Shape(k, start=2, end=3), axis=0))
    q_index, k_index = SmyrfBlocks(
        q, k, projections, key_keep, query_keep,
        q_cluster_size=q_cluster_size, k_cluster_size=k_cluster_size, packed=packed,
    )  # fmt: skip
    out, lse = BlockAttention(q, k, v, q_index, k_index, scale=scale)
    return out, lse


@script(DOMAIN, default_opset=op)
def SmyrfAttentionWithOptions(
    q, k, v, projections, key_mask, query_mask,
    q_cluster_size: int, k_cluster_size: int, scale: float, packed: int,
    is_causal: int, self_mode: int, local_window: int, correct_duplicates: int,
):  # fmt: skip
    """Inputs, attributes and outputs: at the top of this file."""
    batch = op.Shape(q, start=0, end=1)
    n = op.Shape(q, start=2, end=3)
    s = op.Shape(k, start=2, end=3)
    query_keep = op.Expand(query_mask, op.Concat(batch, n, axis=0))
    key_keep = op.Expand(key_mask, op.Concat(batch, s, axis=0))
    q_index, k_index = SmyrfBlocks(
        q, k, projections, key_keep, query_keep,
        q_cluster_size=q_cluster_size, k_cluster_size=k_cluster_size, packed=packed,
    )  # fmt: skip
    # a local round needs a key for each query: where there is none, this cuts or prolongs the mask, and nobody looks
    row = op.Min(op.Range(op.Constant(value_int=0), op.Squeeze(n), op.Constant(value_int=1)), s - 1)
    local_q_index, local_k_index = LocalBlocks(
        op.Shape(q, start=1, end=2), query_keep, op.Gather(key_keep, row, axis=1), window=local_window
    )
    no_bucket = op.Expand(op.Cast([0], to=TensorProto.INT32), [1, 1, 1, 1])
    n_blocks = op.Cast(op.Shape(q_index, start=3, end=4), to=TensorProto.INT32)
    out, lse = BlockAttentionWithOptions(
        q, k, v, q_index, k_index, local_q_index, local_k_index, no_bucket, no_bucket, n_blocks, key_keep,
        scale=scale, look_back=0, look_ahead=0, wrap=1, is_causal=is_causal, self_mode=self_mode, across_buckets=1,
        correct_duplicates=correct_duplicates,
    )  # fmt: skip
    return out, lse


_INPUTS = "q k v projections:float key_mask:bool query_mask:bool"
_ATTRIBUTES = {"q_cluster_size": INT, "k_cluster_size": INT, "scale": FLOAT, "packed": INT}
_OPTIONS = dict.fromkeys(("is_causal", "self_mode", "local_window", "correct_duplicates"), INT)
_NODE = node("SmyrfAttention", _INPUTS, "out lse:float", _ATTRIBUTES)
_NODE_WITH_OPTIONS = node("SmyrfAttentionWithOptions", _INPUTS, "out lse:float", _ATTRIBUTES | _OPTIONS)


def _translate(
    q: Any,
    k: Any,
    v: Any,
    projections: Any = None,
    key_mask: Any = None,
    query_mask: Any = None,
    q_cluster_size: int = 64,
    k_cluster_size: int | None = None,
    scale: float = 1.0,
    n_hashes: int = 1,
    is_causal: bool = False,
    correct_duplicates: bool = False,
    local_window: int = 0,
) -> Any:
    if projections is None:
        raise NotExportable(
            "smyrf_attention can't be exported to ONNX with directions='principal': they are eigenvectors, for which "
            "ONNX has no operator"
        )
    same_length = q.shape[2] == k.shape[2]
    if query_mask is None and not same_length and not all(isinstance(x.shape[2], int) for x in (q, k)):
        raise NotExportable(
            f"can't tell at export whether {q.shape[2]} queries and {k.shape[2]} keys are the same tokens: "
            "give a query_mask"
        )
    self_like = query_mask is None and same_length
    key_mask = or_all(key_mask)
    query_mask = key_mask if self_like else or_all(query_mask)
    inputs = (q, k, v, as_fp32(projections), key_mask, query_mask)
    attributes = {
        "q_cluster_size": q_cluster_size,
        "k_cluster_size": k_cluster_size or 0,
        "scale": scale,
        "packed": int(self_like and k_cluster_size in (None, q_cluster_size)),
    }
    options = {"is_causal": is_causal, "local_window": local_window, "correct_duplicates": correct_duplicates}
    if not any(options.values()):
        return _NODE(*inputs, **attributes)
    self_mode = SELF_MODES.index("once" if is_causal else "attend")
    options = {name: int(value) for name, value in options.items()}
    return _NODE_WITH_OPTIONS(*inputs, **attributes, **options, self_mode=self_mode)


def _settings(node: ir.Node) -> dict[str, Any]:
    shape = shape_of(node.inputs[3])
    return {"n_hashes": None if shape is None else shape[1]}


OP = ExportedOp(
    functions=(SmyrfAttention, SmyrfAttentionWithOptions, SmyrfBlocks),
    translations={torch.ops.fastattn.smyrf_attention.default: _translate},
    settings=_settings,
)
