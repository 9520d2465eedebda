"""Block attention's launches for the sanitizers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.block_attention import Pattern, launches_of
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.ops.cases import Case
from tests.sanitize.views import spread

# 17 and 19 rows a block make a whole tile of 16 and a nearly empty one; 47 and 53 rows leave places empty
ODD = Case(heads=4, kv_heads=2, n_queries=47, n_keys=53, head_dim=40, value_dim=24, c_q=17, c_k=19)
EVEN = Case(batch=2, heads=2, kv_heads=1, n_queries=31, n_keys=29, value_dim=1, rounds=3, n_blocks=2, c_k=15)


def _launches(kernel: str, dtype: torch.dtype, shape: Case, pattern: Pattern, is_strided: bool) -> list[Launch]:
    """All rounds of one pass."""
    q, k, v = (spread(x) if is_strided else x for x in shape.inputs(dtype))
    q_index, k_index = shape.indices()
    tensors = {"q": q, "k": k, "v": v, "q_index": q_index, "k_index": k_index}

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))

    rows = q.shape[:2]  # gradients of the keys stand apart for each query head
    tensors["lse"] = 2 + random(*q.shape[:3])
    if kernel == "block_attention_forward":
        tensors["out"] = random(*q.shape[:3], v.shape[-1])
    else:
        tensors |= {"dout": random(*q.shape[:3], v.shape[-1]).to(dtype), "delta": random(*q.shape[:3])}
        like = {"dq": q} if kernel == "block_attention_backward_dq" else {"dk": k, "dv": v}
        tensors |= {name: random(*rows, *x.shape[2:]) for name, x in like.items()}
    config = {kernel: Config({"BLOCK_M": 16, "BLOCK_N": 16})}
    return list(launches_of(kernel, tensors, pattern, q.shape[-1] ** -0.5, config))


CASES = {
    f"block_attention_{part}": {
        "odd-strided-wrap-later": lambda kernel, dtype: _launches(kernel, dtype, ODD, Pattern(1, 1), True)[-1:],
        "even-causal-cut-all": lambda kernel, dtype: _launches(
            kernel, dtype, EVEN, Pattern(1, 0, wrap=False, is_causal=True, exclude_self=True), False
        ),
    }
    for part in ("forward", "backward_dq", "backward_dkv")
}
