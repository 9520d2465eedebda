"""Linear attention: a feature map of queries and keys in place of the softmax, so that sums over keys are made once.

With phi the feature map, y_i = sum_j (phi(q_i) . phi(k_j)) v_j / (sum_j phi(q_i) . phi(k_j) + eps), where j runs over
all keys, or those up to i (Katharopoulos et al. 2020, "Transformers are RNNs", sections 3.2 and 3.3). A state is the
pair S = sum_j phi(k_j) v_j^T (features x values) and Z = sum_j phi(k_j), which lie one after the other in memory, fp32.

Every pass has the same three steps. *States*: one for each chunk of rows, all at once. *Scan*: their running sums over
the chunks, or their sum. *Outputs* or *gradients*: each tile of rows meets the state before its chunk, and, if causal,
the rows of its own chunk by a masked product. The passes differ in which rows are *own*, those that results are for,
and which are *other*, those that are summed over: the forward and dq have queries as own and scan forward, dk and dv
have keys as own and scan backward, with phi(q), dout / denominator for phi(k), v. No atomics: each result has one
writer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .config import FEATURE_OPS, TIGHT, Config, Cost, TuningSpace, cdiv, next_power_of_2, products
from .launch import Launch, Lookup, device_kind, dot_precision, run_planned, unit_stride
from .linear_attention_triton import gradients_kernel, outputs_kernel, scan_kernel, states_kernel

_SPACE = TuningSpace(
    blocks={"BLOCK_M": (16, 32, 64, 128), "BLOCK_F": (16, 32, 64, 128), "BLOCK_DV": (16, 32, 64, 128)},
    num_warps=(4, 8), num_stages=(1, 2, 3),
)  # fmt: skip
TUNING: dict[str, TuningSpace] = {
    "linear_attention_states": TuningSpace(
        blocks={"BLOCK_N": (16, 32, 64, 128), "BLOCK_F": (16, 32, 64, 128), "BLOCK_DV": (16, 32, 64, 128)},
        num_warps=(4, 8), num_stages=(1, 2, 3),
    ),
    "linear_attention_scan": TuningSpace(blocks={"BLOCK_SIZE": (256, 512, 1024, 2048)}, num_stages=(1, 2, 4)),
    "linear_attention_outputs": _SPACE,
    "linear_attention_gradients": _SPACE,
}  # fmt: skip
KERNELS = {
    "linear_attention_states": states_kernel,
    "linear_attention_scan": scan_kernel,
    "linear_attention_outputs": outputs_kernel,
    "linear_attention_gradients": gradients_kernel,
}


def cost(
    kernel: str, *, batch: int, heads: int, length: int, features: int, value_dim: int, is_causal: bool,
    chunk: int = 64, element_size: int = 4, own_keys: bool = False, config: Config | None = None,
) -> Cost:  # fmt: skip
    """Work of one launch of ``kernel`` (a key of :data:`TUNING`) over ``length`` rows a head.

    chunk: rows of a state; without ``is_causal`` it matters to states and scan alone, and with it, to outputs and
    gradients, it is the BLOCK_M of ``config``.
    """
    if kernel not in TUNING:
        raise ValueError(f"kernel must be one of {sorted(TUNING)}, got {kernel!r}")
    blocks, reads_scan = dict(config.blocks) if config else {}, kernel.endswith(("outputs", "gradients"))
    if is_causal and reads_scan:
        chunk = blocks.get("BLOCK_M", chunk)
    heads, rows = batch * heads, batch * heads * length
    size = features * (value_dim + 1)  # of a state
    n_chunks = cdiv(length, chunk)
    if kernel == "linear_attention_scan":
        moved = ((2 if is_causal else 1) * n_chunks + 1) * heads * size * 4
        work = Cost(heads * n_chunks * size, moved, 0, rate="float32")
        if not blocks:
            return work
        steps = heads * cdiv(size, blocks["BLOCK_SIZE"]) * n_chunks
        size = steps * blocks["BLOCK_SIZE"]
        return replace(
            work, tile_flops=size, pointwise=size, steps=steps, held=4 * blocks["BLOCK_SIZE"], loaded=moved
        )  # fmt: skip
    of_x, of_y = features * element_size, value_dim * element_size  # bytes of a row
    met = 2 * rows * features * value_dim
    if kernel == "linear_attention_states":
        states = heads * n_chunks * size * 4
        work = Cost(met, rows * (of_x + of_y) + states, rows * features)
        if not blocks:
            return work
        n, f, dv = blocks["BLOCK_N"], blocks["BLOCK_F"], blocks["BLOCK_DV"]
        f_tiles, dv_tiles = cdiv(features, f), cdiv(value_dim, dv)
        steps = heads * f_tiles * dv_tiles * (length // chunk * cdiv(chunk, n) + cdiv(length % chunk, n))
        return replace(
            work, **products(steps, (f, dv, n)), tile_exps=steps * n * f, pointwise=steps * n * f * FEATURE_OPS,
            steps=steps, loaded=rows * (of_x * dv_tiles + of_y * f_tiles) + states,
        )  # fmt: skip
    both = 2 if is_causal else 1
    within = 2 * rows * chunk * (features + value_dim) if is_causal else 0
    # the denominators are met by all, the outputs by the gradients of queries
    reads_out = kernel.endswith("gradients") and not own_keys
    own = rows * (of_x + of_y) * both + (rows * (of_x if kernel.endswith("gradients") else 0))
    own += rows * (of_y * reads_out + 4)
    work = Cost(met + within, own + heads * (n_chunks if is_causal else 1) * size * 4, both * rows * features)
    if not blocks:
        return work
    m, f, dv = blocks["BLOCK_M"], blocks["BLOCK_F"], blocks["BLOCK_DV"]
    m_tiles, f_tiles, dv_tiles = cdiv(length, m), cdiv(features, f), cdiv(value_dim, dv)
    if kernel.endswith("outputs"):
        # every tile of a result's columns goes over all features
        tiles, inner, (wide, deep) = dv_tiles, f_tiles, (dv, f)
        exps = heads * m_tiles * tiles * inner * m * f * both
        loaded = rows * (both * (of_x * tiles + of_y) + 4)
        states = heads * m_tiles * (features * value_dim + features * tiles) * 4
    else:
        tiles, inner, (wide, deep) = f_tiles, dv_tiles, (f, dv)
        exps = heads * m_tiles * tiles * m * f * both
        loaded = rows * ((both + 1) * of_x + (both + reads_out) * of_y * tiles + 4)
        states = heads * m_tiles * size * 4
    programs = heads * m_tiles * tiles
    steps = programs * inner
    work = replace(
        work, **products(steps, (m, wide, deep), *([(m, m, deep)] if is_causal else [])), tile_exps=exps,
        pointwise=exps * FEATURE_OPS + programs * 2 * m * wide, steps=steps, loaded=loaded + states,
    )  # fmt: skip
    if not is_causal:
        return work
    last = products(programs, (m, wide, m))
    return replace(
        work, **{name: getattr(work, name) + value for name, value in last.items()},
        pointwise=work.pointwise + programs * 4 * m * m,
    )  # fmt: skip


def heuristic(
    kernel: str, device_type: str, features: int, value_dim: int, element_size: int = 4, is_causal: bool = False
) -> Config:  # fmt: skip
    """The configuration where nothing was tuned.

    device_type: as in block attention's. BLOCK_M of a causal pass is also the length of its chunks: with 64 the
    products within a chunk cost as much as those with 64 features' states, and the states take the memory of one more
    tensor like k. On a CPU, 32 and 128 were 1 and 1.5 times as slow.
    """
    if kernel == "linear_attention_scan":
        # on a CPU what its registers hold: 1024 took 1.4 times as long
        return Config({"BLOCK_SIZE": 256 if device_type == "cpu" else 1024})
    f, dv = (max(16, next_power_of_2(dim)) for dim in (features, value_dim))
    rows = "BLOCK_N" if kernel == "linear_attention_states" else "BLOCK_M"
    warps, stages = 4, 2
    if device_type == "cpu":
        blocks = {rows: 64 if is_causal else 128, "BLOCK_F": min(f, 128), "BLOCK_DV": min(dv, 128)}
    else:
        # exact fp32 dots run on the plain ALUs, with their operands in registers
        tile = 64 if element_size <= 2 else 32
        blocks = {rows: tile, "BLOCK_F": min(f, tile), "BLOCK_DV": min(dv, tile)}
        if device_type.startswith("cuda"):
            # of so many warps the registers suffice, and for outputs with fewer features at a time
            is_outputs = kernel.endswith("outputs")
            is_large = max(f, dv) > 64 or element_size > 2
            warps = 8 if is_large or not is_outputs else 4
            blocks["BLOCK_F"] = min(f, tile // 2 if is_large and is_outputs else tile)
            if device_type in TIGHT and max(f, dv) > 64 and kernel == "linear_attention_states":
                stages = 3  # with 2 it spills 8 bytes
    return Config(blocks, num_warps=warps, num_stages=stages)


@dataclass(frozen=True)
class Pattern:
    """feature_map: one of :data:`FEATURE_MAPS`. own_keys: the pass whose results belong to keys. has_initial: is there
    a state to begin with (going backward, a gradient of the last state)?"""

    feature_map: str = "elu"
    is_causal: bool = False
    own_keys: bool = False
    has_mask: bool = False
    has_initial: bool = False


def configurations(
    kernels: tuple[str, ...], device_type: str, features: int, value_dim: int, element_size: int, is_causal: bool,
    tuned: Mapping[str, Config | None],
) -> dict[str, Config]:  # fmt: skip
    """For each of ``kernels`` of one pass the tuned configuration or else the heuristic's.

    Those that read one scan's states share their length of a tile, which is that of the states' chunks: the first's."""
    chosen, tile = {}, None
    for kernel in kernels:
        config = tuned.get(kernel) or heuristic(kernel, device_type, features, value_dim, element_size, is_causal)
        tile = tile or config.blocks.get("BLOCK_M")
        if config.blocks.get("BLOCK_M") not in (None, tile):
            config = replace(config, blocks=config.blocks | {"BLOCK_M": tile})
        chosen[kernel] = config
    return chosen


def chunk_length(length: int, is_causal: bool, config: Mapping[str, Config]) -> int:
    """Rows of a state. Causal: a tile of the rows that meet it; else as many as keep all cores at work."""
    if not is_causal:
        return max(512, next_power_of_2(cdiv(length, 64)))
    return next(chosen.blocks["BLOCK_M"] for chosen in config.values() if "BLOCK_M" in chosen.blocks)


def launches_of(
    kernels: tuple[str, ...], tensors: Mapping[str, torch.Tensor], pattern: Pattern, eps: float,
    config: Mapping[str, Config], chunk: int, device_type: str | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """Launches of a pass on ``tensors``, named as the kernels' pointer arguments without ``_ptr``; there may be more.

    kernels: in the order in which they run. config: one for each. chunk: rows of a state. device_type: as heuristics
    take it; None is that of the tensors.
    """
    own, x, y = tensors["own_x"], tensors["other_x"], tensors["other_y"]
    batch, other_heads, n_other, features = x.shape
    n_own, value_dim = own.shape[2], y.shape[3]
    n_heads = max(own.shape[1], other_heads)
    size = features * (value_dim + 1)
    n_chunks = cdiv(n_other, chunk)
    is_half = y.dtype != torch.float32
    # fp16 has no room for sums over keys, nor for squares of features; features that come in fp32 keep their precision
    narrow = is_half and x.dtype == y.dtype and (y.dtype == torch.bfloat16 or pattern.feature_map != "relu2")
    args: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in tensors.items()}
    for name in ("own_x", "own_y", "other_x", "other_y"):
        if name in tensors:
            args |= dict(zip((f"{name}_stride_{axis}" for axis in "bhn"), tensors[name].stride(), strict=False))
    args |= {"n_heads": n_heads, "n_other_heads": other_heads, "n_own": n_own, "n_other": n_other}
    args |= {"own_group": n_heads // own.shape[1], "other_group": n_heads // other_heads}
    args |= {"group_size": n_heads // other_heads, "n_chunks": n_chunks, "chunk": chunk, "size": size, "eps": eps}
    args |= {"FEATURES": features, "VALUE_DIM": value_dim, "FEATURE_MAP": pattern.feature_map}
    args |= {"OWN_KEYS": pattern.own_keys, "IS_CAUSAL": pattern.is_causal, "KEEPS_BEFORE": pattern.is_causal}
    args |= {"OWN_MASK": pattern.has_mask and pattern.own_keys, "HAS_INITIAL": pattern.has_initial}
    args |= {"OTHER_MASK": pattern.has_mask and not pattern.own_keys}
    args |= {"NARROW": narrow, "NARROW_SUMS": narrow and y.dtype == torch.bfloat16}
    args |= {"PRECISION": _precision(y.dtype, device_type or device_kind(y.device))}
    for kernel in kernels:
        blocks = config[kernel].blocks
        if kernel == "linear_attention_states":
            tiles = cdiv(features, blocks["BLOCK_F"]) * cdiv(value_dim, blocks["BLOCK_DV"])
            grid = batch * other_heads * n_chunks * tiles
        elif kernel == "linear_attention_scan":
            grid = batch * n_heads * cdiv(size, blocks["BLOCK_SIZE"])
        else:
            dim, block = (value_dim, "BLOCK_DV") if kernel == "linear_attention_outputs" else (features, "BLOCK_F")
            grid = batch * n_heads * cdiv(n_own, blocks["BLOCK_M"]) * cdiv(dim, blocks[block])
        given = {name: args[name] for name in KERNELS[kernel].arg_names if name in args}
        yield Launch(KERNELS[kernel], (grid,), given, config[kernel])


def _precision(dtype: torch.dtype, device_type: str) -> str:
    """What is fp32 beside fp16 or bf16 inputs needs no more than TF32's precision, which AMD's GPUs do not all have."""
    return dot_precision(dtype) if dtype == torch.float32 or device_type.startswith("hip") else "tf32"


@lru_cache(maxsize=1024)
def _choose(
    kernels: tuple[str, ...], device: torch.device, dtype: torch.dtype, batch: int, heads: int, length: int,
    features: int, value_dim: int, pattern: Pattern, lookup: Lookup | None, stamp: Hashable,
) -> tuple[dict[str, Config], int]:  # fmt: skip
    """(a configuration for each kernel, rows of a state). stamp: names the answers of ``lookup``."""
    shape = {"batch": batch, "heads": heads, "n_rows": length, "head_dim": features, "value_dim": value_dim}
    tuned = {kernel: lookup(kernel, device, dtype, shape, vars(pattern)) if lookup else None for kernel in kernels}
    config = configurations(kernels, device_kind(device), features, value_dim, dtype.itemsize, pattern.is_causal, tuned)
    return config, chunk_length(length, pattern.is_causal, config)


def _run(
    kernels: tuple[str, ...], given: dict[str, torch.Tensor | None], results: dict[str, torch.Tensor],
    pattern: Pattern, eps: float, state: torch.Tensor | None, lookup: Lookup | None, stamp: Hashable,
) -> torch.Tensor:  # fmt: skip
    """Runs a pass, and returns the state at its end, (B, H, F * (Dv + 1)).

    given: the kernels' tensors by name, strides any but for the last; a None is one that no kernel of this pass reads.
    results: those that they write. state: what outputs and gradients meet, where no state is to be summed up.
    """
    x, y = given["other_x"], given["other_y"]
    assert x is not None and y is not None and given["own_x"] is not None
    batch, other_heads, length, features = x.shape
    heads, value_dim = max(given["own_x"].shape[1], other_heads), y.shape[3]
    config, chunk = _choose(
        kernels, y.device, y.dtype, batch, heads, length, features, value_dim, pattern, lookup, stamp
    )
    size = features * (value_dim + 1)
    fp32 = y if y.dtype == torch.float32 else y.new_empty((), dtype=torch.float32)
    final = before = fp32.new_empty((batch, heads, size)) if state is None else state
    tensors = {name: final if tensor is None else tensor for name, tensor in given.items()}
    made = len(results)
    if state is None:
        n_chunks = cdiv(length, chunk)
        results["states"] = fp32.new_empty((batch, other_heads, n_chunks, size))
        if pattern.is_causal:
            shared = heads == other_heads
            before = results["states"] if shared else fp32.new_empty((batch, heads, n_chunks, size))
        made += 3
        results["final"] = final
    tensors |= results
    tensors["before"] = before
    key = (kernels, pattern, eps, torch.get_float32_matmul_precision(), stamp)

    def launches() -> Iterator[Launch]:
        return launches_of(kernels, tensors, pattern, eps, config, chunk)

    run_planned(key, tensors, launches, made=made)
    return final


_SUMMED = ("linear_attention_states", "linear_attention_scan")


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, initial: torch.Tensor | None,
    feature_map: str, is_causal: bool, eps: float, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, denominator, state) of linear attention; the arguments are checked by ``fastattn.ops.linear_attention``.

    q (B, H, N, F), k (B, Hkv, S, F), v (B, Hkv, S, Dv): of one dtype, or q and k in fp32. key_mask (B, S) bool,
    contiguous. initial (B, H, F * (Dv + 1)) fp32, contiguous: S, then Z; so is the state that is returned. lookup:
    gives tuned configurations; its answers are kept while ``stamp`` stays the same. Returns out (B, H, N, Dv) in v's
    dtype and the denominator with eps (B, H, N) in fp32. Raises what :func:`~fastattn.kernels.launch.run` does.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    batch, heads, n_queries, _ = q.shape
    out = v.new_empty((batch, heads, n_queries, v.shape[3]))
    den = v.new_empty((batch, heads, n_queries), dtype=torch.float32)
    given = {"own_x": q, "other_x": k, "other_y": v, "key_mask": key_mask, "initial": initial, "delta": None}
    results = {"result": out, "den": den}
    pattern = Pattern(feature_map, is_causal, False, key_mask is not None, initial is not None)
    state = _run((*_SUMMED, "linear_attention_outputs"), given, results, pattern, eps, None, lookup, stamp)
    return out, den, state


def backward(
    dout: torch.Tensor, dstate: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    key_mask: torch.Tensor | None, initial: torch.Tensor | None, out: torch.Tensor, den: torch.Tensor,
    state: torch.Tensor, feature_map: str, is_causal: bool, lookup: Lookup | None = None, stamp: Hashable = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv, dinitial) from the gradients of :func:`forward`'s out and state and from what it took and gave."""
    q, k, v, dout = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(dout)
    heads, kv_heads = q.shape[1], k.shape[1]
    delta = den.new_empty(den.shape)  # dout . out, which the queries' pass makes
    weights = {"key_mask": key_mask, "den": den}
    dq = q.new_empty(q.shape)
    given = {"own_x": q, "own_y": dout, "other_x": k, "other_y": v, "initial": initial, "out": out, **weights}
    pattern = Pattern(feature_map, is_causal, False, key_mask is not None, initial is not None)
    kernels = (*(_SUMMED if is_causal else ()), "linear_attention_gradients")
    _run(kernels, given, {"dx": dq, "delta": delta}, pattern, 0.0, None if is_causal else state, lookup, stamp)

    # of keys that several query heads share, each head's part is made in fp32 and summed afterwards
    shape = (k.shape[0], heads, *k.shape[2:])
    dk, dv = (
        x.new_empty((*shape[:3], x.shape[3]), dtype=x.dtype if heads == kv_heads else torch.float32) for x in (k, v)
    )
    weights |= {"delta": delta, "out": None}
    given = {"own_x": k, "own_y": v, "other_x": q, "other_y": dout, "initial": dstate, **weights}
    pattern = Pattern(feature_map, is_causal, True, key_mask is not None, dstate is not None)
    kernels = (*_SUMMED, "linear_attention_gradients", "linear_attention_outputs")
    dinitial = _run(kernels, given, {"dx": dk, "result": dv}, pattern, 0.0, None, lookup, stamp)
    if heads != kv_heads:
        dk, dv = (x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for x in (dk, dv))
    return dq, dk.to(k.dtype), dv.to(v.dtype), dinitial


def example_launch(
    kernel: str, dtype: torch.dtype, *, head_dim: int = 64, value_dim: int | None = None, device_type: str = "cuda",
    pattern: Pattern | None = None, config: Config | None = None,
) -> Launch:  # fmt: skip
    """A launch of ``kernel`` on tensors without memory: what an ahead-of-time compiler needs to see."""
    value_dim, pattern = value_dim or head_dim, pattern or Pattern(is_causal=True)
    config = config or heuristic(kernel, device_type, head_dim, value_dim, dtype.itemsize, pattern.is_causal)

    def empty(*shape: int, like: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, 1, *shape, dtype=like, device="meta")

    x, y, rows = empty(64, head_dim, like=dtype), empty(64, value_dim, like=dtype), empty(64)
    state = empty(head_dim * (value_dim + 1))
    tensors = {"own_x": x, "own_y": y, "other_x": x, "other_y": y, "den": rows, "delta": rows, "dx": x, "result": y}
    tensors |= {"states": state, "before": state, "final": state, "initial": state}
    tensors["out"] = state if pattern.own_keys else y
    tensors["key_mask"] = torch.empty(1, 64, dtype=torch.bool, device="meta") if pattern.has_mask else state
    (launch,) = launches_of((kernel,), tensors, pattern, 1e-6, {kernel: config}, 64, device_type)
    return launch
