"""Block attention's launches for the sanitizers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastattn.kernels.block_attention import Pattern, block_numbers, launches_of
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.ops.cases import Case, cut_after
from tests.sanitize.views import spread

# 17 and 19 rows a block make a whole tile of 16 and a nearly empty one; 47 and 53 rows leave places empty
ODD = Case(heads=4, kv_heads=2, n_queries=47, n_keys=53, head_dim=40, value_dim=24, c_q=17, c_k=19)
EVEN = Case(batch=2, heads=2, kv_heads=1, n_queries=31, n_keys=29, value_dim=1, rounds=3, n_blocks=2, c_k=15)


def _launches(
    kernel: str, dtype: torch.dtype, shape: Case, pattern: Pattern, is_strided: bool, used: list[int] | None = None
) -> list[Launch]:
    """All rounds of one pass. used: how many blocks of a round each example uses."""
    q, k, v = (spread(x) if is_strided else x for x in shape.inputs(dtype))
    q_index, k_index = shape.indices()
    if used is not None:
        n_used_blocks = torch.tensor(used, dtype=torch.int32)
        q_index, k_index = cut_after(q_index, n_used_blocks), cut_after(k_index, n_used_blocks)
    tensors = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))

    if used is not None:
        tensors["n_used_blocks"] = n_used_blocks
    rows = q.shape[:2]  # gradients of the keys stand apart for each query head
    tensors |= _tensors_of_options(shape, pattern, q_index, k_index)
    tensors["lse"] = 2 + random(*q.shape[:3])
    if kernel.endswith("_forward"):
        tensors["out"] = random(*q.shape[:3], v.shape[-1])
    else:
        tensors |= {"dout": random(*q.shape[:3], v.shape[-1]).to(dtype), "delta": random(*q.shape[:3])}
        tensors |= {name: random(*rows, *x.shape[2:]) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    config = {kernel: Config({"BLOCK_M": 16} if "own_key" in kernel else {"BLOCK_M": 16, "BLOCK_N": 16})}
    return list(launches_of(kernel, tensors, pattern, q.shape[-1] ** -0.5, config, 0.3 if pattern.dropout else 0.0))


def _tensors_of_options(shape: Case, pattern: Pattern, q_index: Tensor, k_index: Tensor) -> dict[str, Tensor]:
    tensors = {}
    if pattern.correct_duplicates:
        tensors["q_block"] = block_numbers("q_index", q_index, shape.n_queries)
        tensors["k_block"] = block_numbers("k_index", k_index, shape.n_keys)
        local = replace(shape, rounds=1, n_blocks=5, c_q=11, c_k=9).indices()
        tensors |= {"local_index_q": local[0], "local_index_k": local[1]}
    if pattern.buckets:
        tensors |= {"q_bucket": tensors["q_block"] % 2, "k_bucket": tensors["k_block"] % 2}
    if pattern.dropout:
        tensors["seed"] = torch.tensor(2**40 + 1)
    if pattern.own_key:
        tensors["own_mask"] = torch.arange(shape.n_keys).expand(shape.batch, -1) % 3 != 0
    return tensors


SQUARE = replace(ODD, n_keys=47)
REFORMER = Pattern(
    1, 1, is_causal=True, exclude_self=True, last_resort=True, correct_duplicates=True, buckets=True, dropout=True
)  # fmt: skip

CASES = {
    f"block_attention_{part}": {
        "odd-strided-wrap-some-used-later": lambda kernel, dtype: _launches(
            kernel, dtype, ODD, Pattern(1, 1), True, [2]
        )[-1:],
        "even-causal-cut-all": lambda kernel, dtype: _launches(
            kernel, dtype, EVEN, Pattern(1, 0, wrap=False, is_causal=True, exclude_self=True), False
        ),
        "odd-every-option-later": lambda kernel, dtype: _launches(kernel, dtype, SQUARE, REFORMER, False)[-2:],
    }
    for part in ("forward", "backward_dq", "backward_dkv")
}
CASES |= {
    f"block_attention_own_key_{part}": {
        "once-strided-dropout": lambda kernel, dtype: _launches(
            kernel, dtype, SQUARE, Pattern(once=True, dropout=True), True
        ),
        "last-resort": lambda kernel, dtype: _launches(kernel, dtype, SQUARE, Pattern(last_resort=True), False),
    }
    for part in ("forward", "backward")
}
