"""Which kernels a call of an op runs: what has to be compiled for a model, or for head dims that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.export.ort.tuned import tuned
from fastattn.export.ort.variants import Variant

# lengths of examples, odd: what an ahead-of-time compiler finds divisible by 16 there is so always
_LENGTH = 77
_TUNED_LENGTH = 4096  # how long inputs will be is not known; they hold all clusters and lists
MOST_DIM = 256
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Call:
    """A node of an op, as far as its kernels depend on it.

    head_dim, dtype: of queries and keys, and of what is hashed. value_dim, value_dtype: of values. attributes: the
    node's own, and those of the nodes of ours whose bodies it stands in.
    """

    op: str
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    value_dim: int = 64
    value_dtype: torch.dtype = torch.float32
    attributes: Mapping[str, Any] = field(default_factory=dict)


def variants(calls: Iterable[Call], device_type: str = "cpu") -> list[Variant]:
    """What has to be compiled for ``calls``, each once. device_type: ``"cpu"``, or a GPU as the rooms' heuristics name
    it, ``"cuda:90"``, which then runs what the tuner found for it, where that is known."""
    found = {}
    for call in calls:
        if call.op in _ROOMS:
            for variant in _ROOMS[call.op](call, device_type):
                found.setdefault(variant.described(), variant)
    return [*found.values()]


def every_call(head_dims: Iterable[int], dtypes: Iterable[str]) -> Iterator[Call]:
    """What the methods call by their defaults, causal and not, for each head dim, which is that of values too, and
    dtype.

    Raises:
        ValueError: a dim is not from 1 to 256, or a dtype not one of :data:`DTYPES`.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        for dim in head_dims:
            if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MOST_DIM:
                raise ValueError(f"head_dim must be an int from 1 to {MOST_DIM}, got {dim!r}")
            for op in sorted(OPS):
                for attributes in _DEFAULTS.get(op, ({},)):
                    yield Call(op, DTYPES[name], dim, dim, DTYPES[name], attributes)


# what ops have among their attributes by the methods' defaults, where it is more than one thing, or not the ops' own
_SMYRF = {"self_mode": 3, "is_causal": 1, "local_window": 0}
_REFORMER = {"self_mode": 2, "look_back": 1, "local_window": 0}
_DEFAULTS: dict[str, tuple[dict[str, Any], ...]] = {
    "BlockAttentionWithOptions": (_SMYRF, _REFORMER, _REFORMER | {"is_causal": 1}),
    "CentroidAttention": ({"top_k": 0}, {"top_k": 32}),  # of clustered and of improved clustered attention
    "HashArgmax": ({"factors": (32,)}, {"factors": (64,)}, {"factors": (128,)}),
    "LinearAttention": ({"is_causal": 0}, {"is_causal": 1}),
    "TopkAttention": ({"is_causal": 0}, {"is_causal": 1}),
}


def _block_attention(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels.block_attention import Pattern

    for first in (True, False):
        yield _round(call, device_type, Pattern(), first=first)


def _block_attention_with_options(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels.block_attention import Pattern

    given = call.attributes
    self_mode = given.get("self_mode", 0)
    pattern = Pattern(
        look_back=given.get("look_back", 0), look_ahead=given.get("look_ahead", 0), wrap=bool(given.get("wrap", 1)),
        is_causal=bool(given.get("is_causal", 0)), exclude_self=self_mode != 0, last_resort=self_mode == 2,
        once=self_mode == 3, correct_duplicates=bool(given.get("correct_duplicates", 0)),
        buckets=not given.get("across_buckets", 1),
    )  # fmt: skip
    for first in (True, False):
        yield _round(call, device_type, pattern, first=first, n_used_blocks=True)
    if given.get("local_window", 1):
        yield _round(call, device_type, pattern, local=True, n_used_blocks=True)
    if pattern.own_key:
        yield _round(call, device_type, pattern, kernel="block_attention_own_key_forward")


def _round(
    call: Call, device_type: str, pattern: Any, *, kernel: str = "block_attention_forward", **which: bool
) -> Variant:
    from fastattn.kernels import block_attention as room

    c_q = int(call.attributes.get("q_cluster_size", call.attributes.get("bucket_size", 64)))
    c_k = int(call.attributes.get("k_cluster_size", 0)) or c_q
    config = kernel in room.TUNING and tuned(
        kernel, device_type, call.dtype, vars(pattern), cluster_size=c_q, head_dim=call.head_dim,
        value_dim=call.value_dim,
    )  # fmt: skip
    config = config or room.heuristic(kernel, device_type, c_q, c_k, call.head_dim, call.dtype.itemsize, pattern)
    launch = room.example_launch(
        kernel, call.dtype, head_dim=call.head_dim, value_dim=call.value_dim, c_q=_LENGTH, c_k=_LENGTH,
        device_type=device_type, pattern=pattern, config=config, **which,
    )  # fmt: skip
    return Variant(kernel, launch)


def _steps(device_type: str, *names: str) -> Iterator[Variant]:
    """What a GPU has kernels for where the CPU has loops."""
    if device_type != "cpu":
        from fastattn.export.ort import cuda_steps

        for name in names:
            for launch in cuda_steps.examples(name):
                yield Variant(name, launch)


def _centroid_attention(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import centroid_attention as room

    top_k, n_queries = int(call.attributes.get("top_k", 32)), int(call.attributes.get("n_clusters", 100))
    flags = {"HAS_MASK": True, "HAS_VALUES": call.op == "CentroidAttention", "HAS_PEAKS": top_k > 0}
    q = _empty(1, 3, n_queries, call.head_dim, dtype=call.dtype)
    k = _empty(1, 3, _LENGTH, call.head_dim, dtype=call.dtype)
    v = _empty(1, 3, _LENGTH, call.value_dim, dtype=call.dtype) if flags["HAS_VALUES"] else k
    tensors = {"q": q, "k": k, "v": v, "key_mask": _empty(1, _LENGTH, dtype=torch.bool)}
    tensors |= {"seed": _empty(1, dtype=torch.int64), "groups": _empty(1, 3, n_queries, 5, dtype=torch.int32)}
    tensors |= {name: _empty(1, 3, _LENGTH) for name in ("out", "lse", "peaks", "logits")}
    kernels = ["centroid_attention_forward"] + ["centroid_attention_candidates"] * (top_k > 0)
    for kernel in kernels:
        # a mask is always given here; what is tuned has none
        tuned_flags = {**(flags if kernel == kernels[0] else {}), "HAS_MASK": False, "HAS_DROPOUT": False}
        config = tuned(
            kernel, device_type, call.dtype, tuned_flags, n_queries=n_queries, head_dim=call.head_dim,
            value_dim=v.shape[3],
        )  # fmt: skip
        config = config or room.heuristic(kernel, device_type, n_queries, call.head_dim, call.dtype.itemsize)
        yield Variant(kernel, room.launch_of(kernel, tensors, flags, 1.0, 0.0, config))
    yield from _steps(device_type, *["fold"] * flags["HAS_VALUES"], *["largest", "listed_keys"] * flags["HAS_PEAKS"])


def _cluster_sums(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import cluster_attention as room

    kernel, n_clusters = "cluster_attention_sums", int(call.attributes.get("n_clusters", 100))
    config = tuned(kernel, device_type, call.dtype, {}, n_clusters=n_clusters, head_dim=call.head_dim)
    launch = room.example_launch(
        kernel, call.dtype, head_dim=call.head_dim, n_clusters=n_clusters, device_type=device_type, config=config
    )
    yield Variant(kernel, launch)
    yield from _steps(device_type, "sum_parts")


def _hamming_kmeans(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import hamming as room

    n_clusters = int(call.attributes.get("n_clusters", 100))
    for kernel in ("hamming_assign", "hamming_count", "hamming_update"):
        sizes = {"n_clusters": n_clusters, "length": max(_TUNED_LENGTH, n_clusters)}
        config = tuned(kernel, device_type, torch.int64, {}, **sizes)
        config = config or room.heuristic(kernel, device_type, n_clusters)
        launch = room.example_launch(
            kernel, call.dtype, n_clusters=n_clusters, masked=True, device_type=device_type, config=config
        )
        yield Variant(kernel, launch)
    yield from _steps(device_type, "first_centroids")


def _hash_argmax(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import hash_argmax as room

    factors = call.attributes.get("factors") or (64,)
    kernel = "hash_argmax_digit"
    for half in dict.fromkeys(factor // 2 for factor in factors):
        config = tuned(kernel, device_type, call.dtype, {}, head_dim=call.head_dim, columns=half)
        for first in (True, False)[: len(factors)]:
            launch = room.example_launch(
                kernel, call.dtype, head_dim=call.head_dim, columns=half, first=first, device_type=device_type,
                config=config,
            )  # fmt: skip
            yield Variant(kernel, launch)


def _hash_bits(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import hamming as room

    kernel = "hamming_hash"
    config = tuned(kernel, device_type, call.dtype, {}, head_dim=call.head_dim)
    launch = room.example_launch(kernel, call.dtype, head_dim=call.head_dim, device_type=device_type, config=config)
    yield Variant(kernel, launch)


FEATURE_MAPS = ("elu", "relu", "relu2", "identity")  # as nodes number them


def _linear_attention(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import linear_attention as room

    given = call.attributes
    pattern = room.Pattern(
        FEATURE_MAPS[given.get("feature_map", 0)], bool(given.get("is_causal", 0)), has_mask=True, has_initial=True
    )
    kernels = ("linear_attention_states", "linear_attention_scan", "linear_attention_outputs")
    q, k = (_empty(1, 3, _LENGTH, call.head_dim, dtype=call.dtype) for _ in "qk")
    v = _empty(1, 3, _LENGTH, call.value_dim, dtype=call.value_dtype)
    state, rows = _empty(1, 3, call.head_dim * (call.value_dim + 1)), _empty(1, 3, _LENGTH)
    tensors = {"own_x": q, "other_x": k, "other_y": v, "result": v, "key_mask": _empty(1, _LENGTH, dtype=torch.bool)}
    tensors |= {name: state for name in ("initial", "states", "before", "final", "delta")} | {"den": rows}
    # masks and initial states are always given here; what is tuned has neither
    flags = vars(room.Pattern(pattern.feature_map, pattern.is_causal))
    sizes = {"head_dim": call.head_dim, "value_dim": call.value_dim}
    found = {kernel: tuned(kernel, device_type, call.value_dtype, flags, **sizes) for kernel in kernels}
    config = room.configurations(
        kernels, device_type, call.head_dim, call.value_dim, call.value_dtype.itemsize, pattern.is_causal, found
    )
    for kernel, launch in zip(kernels, room.launches_of(kernels, tensors, pattern, 1e-6, config, _LENGTH), strict=True):
        yield Variant(kernel, launch)


def _linear_attention_step(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import linear_attention_step as room

    kernel = "linear_attention_step"
    q, k = (_empty(1, 3, 1, call.head_dim, dtype=call.dtype) for _ in "qk")
    v = _empty(1, 3, 1, call.value_dim, dtype=call.value_dtype)
    s, z = _empty(1, 3, call.head_dim, call.value_dim), _empty(1, 3, call.head_dim)
    tensors = {"q": q, "k": k, "v": v, "s": s, "z": z, "out": v, "new_s": s, "new_z": z}
    feature_map = FEATURE_MAPS[call.attributes.get("feature_map", 0)]
    sizes = {"head_dim": call.head_dim, "value_dim": call.value_dim}
    config = tuned(kernel, device_type, call.value_dtype, {"feature_map": feature_map}, **sizes)
    config = config or room.heuristic(kernel, device_type, call.head_dim, call.value_dim)
    for launch in room.launches_of(kernel, tensors, feature_map, 1e-6, config):
        yield Variant(kernel, launch)


def _smyrf_hash(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import smyrf_hash as room

    # a mask is always given here
    kernel = "smyrf_hash_project"
    config = tuned(kernel, device_type, call.dtype, {}, head_dim=call.head_dim)
    launch = room.example_launch(
        kernel, call.dtype, head_dim=call.head_dim, is_masked=True, device_type=device_type, config=config
    )
    yield Variant(kernel, launch)
    kernel = "smyrf_hash_lift"  # for directions of any length
    config = tuned(kernel, device_type, torch.float32, {})
    launch = room.example_launch(kernel, torch.float32, head_dim=_LENGTH, device_type=device_type, config=config)
    yield Variant(kernel, launch)


def _topk_attention(call: Call, device_type: str) -> Iterator[Variant]:
    from fastattn.kernels import topk_attention as room

    kernel, given = "topk_attention_forward", call.attributes
    top_k, n_clusters = int(given.get("topk", 32)), int(given.get("n_clusters", 100))
    q, k = (_empty(1, 3, _LENGTH, call.head_dim, dtype=call.dtype) for _ in "qk")
    v = _empty(1, 3, _LENGTH, call.value_dim, dtype=call.dtype)
    integers, rows = _empty(1, 3, _LENGTH, dtype=torch.int32), _empty(1, 3, _LENGTH)
    tensors = {"q": q, "k": k, "v": v, "order": integers, "offsets": integers, "mass": rows, "rest": rows, "out": v}
    tensors |= {"topk_index": _empty(1, 3, n_clusters, top_k, dtype=torch.int32), "lse": rows}
    tensors |= {"seed": _empty(1, dtype=torch.int64)}
    is_causal = bool(given.get("is_causal", 0))
    sizes = {"n_clusters": n_clusters, "top_k": top_k, "length": max(_TUNED_LENGTH, n_clusters, top_k)}
    sizes |= {"head_dim": call.head_dim, "value_dim": call.value_dim}
    flags = {"is_causal": is_causal, "dropout": False}
    config = tuned(kernel, device_type, call.dtype, flags, **sizes)
    config = config or room.heuristic(kernel, device_type, top_k, call.head_dim, call.dtype.itemsize)
    yield Variant(kernel, room.launch_of(kernel, tensors, is_causal, 1.0, 0.0, config))
    yield from _steps(device_type, "sort_by_cluster")


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


_ROOMS: dict[str, Callable[[Call, str], Iterator[Variant]]] = {
    "BlockAttention": _block_attention,
    "BlockAttentionWithOptions": _block_attention_with_options,
    "CentroidAttention": _centroid_attention,
    "ClusterSums": _cluster_sums,
    "HammingKmeans": _hamming_kmeans,
    "HashArgmax": _hash_argmax,
    "HashBits": _hash_bits,
    "LinearAttention": _linear_attention,
    "LinearAttentionStep": _linear_attention_step,
    "SmyrfHash": _smyrf_hash,
    "TopkAttention": _topk_attention,
    "TopkKeys": _centroid_attention,
}
# those that do all of their work in kernels
GPU_OPS = frozenset(_ROOMS)
# SMYRF's sort is C++ for the CPU
OPS = frozenset({*_ROOMS, "SortedBlocks"})
