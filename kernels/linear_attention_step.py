"""One token of causal linear attention: the state takes the token's key and value in, and its query reads it.

With S and Z as in :mod:`fastattn.kernels.linear_attention`: S' = S + phi(k) v^T, Z' = Z + phi(k) and
y = phi(q) S' / (phi(q) . Z' + eps) (Katharopoulos et al. 2020, section 3.4). One pass over S, which is read and written
once; that is all there is to do, so no tensor cores.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from .config import FEATURE_OPS, Config, Cost, TuningSpace, cdiv, next_power_of_2
from .feature_tiles import feature
from .launch import Launch, Lookup, device_kind, run_planned, unit_stride
from .tiles import head_of


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, s_ptr, z_ptr, out_ptr, new_s_ptr, new_z_ptr,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    s_stride_b, s_stride_h, z_stride_b, z_stride_h, n_heads, group_size, eps,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_DV: tl.constexpr,
    FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    # one program = BLOCK_DV columns of one head
    pid = tl.program_id(0)
    dv_tiles: tl.constexpr = (VALUE_DIM + BLOCK_DV - 1) // BLOCK_DV
    row = (pid // dv_tiles).to(tl.int64)
    q_ptr = head_of(q_ptr, row, n_heads, 1, q_stride_b, q_stride_h)
    k_ptr = head_of(k_ptr, row, n_heads, group_size, k_stride_b, k_stride_h)
    v_ptr = head_of(v_ptr, row, n_heads, group_size, v_stride_b, v_stride_h)
    s_ptr = head_of(s_ptr, row, n_heads, 1, s_stride_b, s_stride_h)
    z_ptr = head_of(z_ptr, row, n_heads, 1, z_stride_b, z_stride_h)
    dv_start = pid % dv_tiles * BLOCK_DV
    dv = dv_start + tl.arange(0, BLOCK_DV)
    v = tl.load(v_ptr + dv, mask=dv < VALUE_DIM, other=0.0).to(tl.float32)  # [BLOCK_DV]
    acc = tl.zeros([BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, FEATURES, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = f < FEATURES
        phi_q = feature(tl.load(q_ptr + f, mask=mask, other=0.0).to(tl.float32), FEATURE_MAP)  # [BLOCK_F]
        phi_k = feature(tl.load(k_ptr + f, mask=mask, other=0.0).to(tl.float32), FEATURE_MAP)  # [BLOCK_F]
        phi_q, phi_k = tl.where(mask, phi_q, 0.0), tl.where(mask, phi_k, 0.0)
        z = tl.load(z_ptr + f, mask=mask, other=0.0) + phi_k  # [BLOCK_F]
        if dv_start == 0:
            tl.store(new_z_ptr + row * FEATURES + f, z, mask=mask)
        total += phi_q * z
        at = f[:, None] * VALUE_DIM + dv[None, :]
        inside = mask[:, None] & (dv < VALUE_DIM)[None, :]
        s = tl.load(s_ptr + at, mask=inside, other=0.0) + phi_k[:, None] * v[None, :]  # [BLOCK_F, BLOCK_DV]
        tl.store(new_s_ptr + row * (FEATURES * VALUE_DIM) + at, s, mask=inside)
        acc += tl.sum(phi_q[:, None] * s, 0)
    den = tl.sum(total, 0) + eps
    out = acc * tl.where(den == 0.0, 0.0, 1.0 / den)
    tl.store(out_ptr + row * VALUE_DIM + dv, out.to(out_ptr.dtype.element_ty), mask=dv < VALUE_DIM)


TUNING: dict[str, TuningSpace] = {
    "linear_attention_step": TuningSpace(
        blocks={"BLOCK_F": (16, 32, 64, 128), "BLOCK_DV": (16, 32, 64, 128)}, num_warps=(1, 2, 4), num_stages=(1, 2)
    )
}
KERNELS = {"linear_attention_step": step_kernel}


def cost(
    kernel: str, *, batch: int, heads: int, features: int, value_dim: int, element_size: int = 4,
    config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one step."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {sorted(KERNELS)}, got {kernel!r}")
    rows = batch * heads
    state = features * (value_dim + 1)
    given = 2 * features + 2 * value_dim
    moved = rows * (8 * state + given * element_size)
    work = Cost(4 * rows * state, moved, 2 * rows * features, rate="float32")
    if config is None:
        return work
    f, dv = config.blocks["BLOCK_F"], config.blocks["BLOCK_DV"]
    dv_tiles = cdiv(value_dim, dv)
    steps = rows * dv_tiles * cdiv(features, f)
    return replace(
        work, tile_flops=4 * steps * f * (dv + 1), tile_exps=2 * steps * f, pointwise=steps * f * (dv + FEATURE_OPS),
        steps=steps, held=4 * f * dv, loaded=moved + rows * (dv_tiles - 1) * features * (4 + 2 * element_size),
    )  # fmt: skip


def heuristic(kernel: str, device_type: str, features: int, value_dim: int) -> Config:
    """The configuration where nothing was tuned. A GPU gets several programs a head, for there is only one token."""
    f, dv = (max(16, next_power_of_2(dim)) for dim in (features, value_dim))
    if device_type == "cpu":
        return Config({"BLOCK_F": min(f, 32), "BLOCK_DV": min(dv, 128)})  # 64 features took 1.2 times as long
    return Config({"BLOCK_F": min(f, 64), "BLOCK_DV": min(dv, 32)}, num_warps=2, num_stages=2)


def launches_of(
    kernel: str, tensors: Mapping[str, torch.Tensor], feature_map: str, eps: float, config: Config
) -> Iterator[Launch]:
    """The launch of ``kernel`` on ``tensors``, named as its pointer arguments without ``_ptr``."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    batch, heads, _, features = q.shape
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name in ("q", "k", "v", "s", "z"):
        args |= {f"{name}_stride_b": tensors[name].stride(0), f"{name}_stride_h": tensors[name].stride(1)}
    args |= {"n_heads": heads, "group_size": heads // k.shape[1], "eps": eps}
    args |= {"FEATURES": features, "VALUE_DIM": v.shape[3], "FEATURE_MAP": feature_map}
    yield Launch(KERNELS[kernel], (batch * heads * cdiv(v.shape[3], config.blocks["BLOCK_DV"]),), args, config)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor, z: torch.Tensor, feature_map: str, eps: float,
    lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, new S, new Z) from q (B, H, 1, F), k (B, Hkv, 1, F), v (B, Hkv, 1, Dv), S (B, H, F, Dv) and Z (B, H, F)."""
    q, k, v, z = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(z)
    batch, heads, _, features = q.shape
    value_dim = v.shape[3]
    if s.stride()[2:] != (value_dim, 1):
        s = s.contiguous()
    out = v.new_empty((batch, heads, 1, value_dim))
    new_s, new_z = s.new_empty((batch, heads, features, value_dim)), s.new_empty((batch, heads, features))
    tensors = {"q": q, "k": k, "v": v, "s": s, "z": z, "out": out, "new_s": new_s, "new_z": new_z}
    (kernel,) = KERNELS

    def launches() -> Iterator[Launch]:
        shape = {"batch": batch, "heads": heads, "head_dim": features, "value_dim": value_dim}
        tuned = lookup(kernel, v.device, v.dtype, shape, {"feature_map": feature_map}) if lookup else None
        config = tuned or heuristic(kernel, device_kind(v.device), features, value_dim)
        return launches_of(kernel, tensors, feature_map, eps, config)

    run_planned((kernel, feature_map, eps, stamp), tensors, launches, made=3)
    return out, new_s, new_z


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, device_type: str = "cuda", config: Config | None = None,
    feature_map: str = "elu",
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    row = torch.empty(1, 1, 1, head_dim, dtype=dtype, device="meta")
    s = torch.empty(1, 1, head_dim, head_dim, device="meta")
    z = torch.empty(1, 1, head_dim, device="meta")
    tensors = {"q": row, "k": row, "v": row, "s": s, "z": z, "out": row, "new_s": s, "new_z": z}
    config = config or heuristic(kernel, device_type, head_dim, head_dim)
    (launch,) = launches_of(kernel, tensors, feature_map, 1e-6, config)
    return launch
