"""Nodes of every op that GPUs have, and what each launches as the kernels' own files make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.export.ort import needs
from fastattn.export.ort.variants import Variant
from fastattn.kernels import block_attention as block_kernels
from fastattn.kernels import centroid_attention as centroid_kernels
from fastattn.kernels import cluster_attention as cluster_kernels
from fastattn.kernels import hamming as hamming_kernels
from fastattn.kernels import hash_argmax as hash_kernels
from fastattn.kernels import linear_attention as linear_kernels
from fastattn.kernels import linear_attention_step as step_kernels
from fastattn.kernels import smyrf_hash as smyrf_kernels
from fastattn.kernels import topk_attention as topk_kernels
from fastattn.kernels.config import Config, cdiv
from fastattn.kernels.launch import Launch
from tests.export.ort.on_cuda import (
    Memory,
    Node,
    Run,
    assert_range,
    block_numbers,
    narrow,
    repeat,
    scratch_of,
    step,
    step_over,
    tensors_of,
    turn,
)

DIM = 16  # of heads: small kernels compile fast
TARGETS = ("cuda:80", "cuda:90")
FP32, FP16, INT32, INT64 = torch.float32, torch.float16, torch.int32, torch.int64
# lengths and counts that divide by nothing
BATCH, HEADS, KV_HEADS, LENGTH, KEYS, ROUNDS, BLOCKS, C_Q, C_K = 3, 6, 2, 77, 91, 3, 5, 17, 19
OF_CLUSTERS = {"CentroidAttention", "ClusterSums", "HammingKmeans", "TopkAttention", "TopkKeys"}
# more clusters than a tile has, more rows than are summed together, more keys than one program sees
N_CLUSTERS, TOP_K, ROWS, ALL_KEYS = 37, 9, 777, 4099

Launches = Iterator[tuple[str, Launch]]


@dataclass(frozen=True)
class Case:
    """A node, and what it launches as the kernels' own files make it: from a run and a configuration by kernel."""

    name: str
    node: Node
    launches: Callable[[Run, Memory, Mapping[str, Config]], Launches]
    config: Config | None = None

    @property
    def target(self) -> str:
        return f"cuda:{self.node.capability}"

    def variants(self) -> list[Variant]:
        """Those that this node needs."""
        node = self.node
        first = next(iter(node.inputs.values()))
        (_, q_type), (v_shape, v_type) = first, node.inputs.get("v", first)
        attributes = {"q_cluster_size": DIM, "local_window": int("local" in self.name), "topk": TOP_K}
        attributes |= {"n_clusters": N_CLUSTERS, **node.attributes}
        found = needs.variants([needs.Call(node.op, q_type, DIM, v_shape[-1], v_type, attributes)], self.target)
        if self.config is None:
            return found
        return [replace(x, launch=replace(x.launch, config=self.config)) for x in found]


def attention_inputs(dtype: torch.dtype, keys: int = KEYS) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    key = (BATCH, KV_HEADS, keys, DIM), dtype
    return {"q": ((BATCH, HEADS, LENGTH, DIM), dtype), "k": key, "v": key}


def block_inputs(dtype: torch.dtype, keys: int = KEYS) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    index = (BATCH, HEADS, ROUNDS, BLOCKS)
    return attention_inputs(dtype, keys) | {"q_index": ((*index, C_Q), INT32), "k_index": ((*index, C_K), INT32)}


def block_attention_node(dtype: torch.dtype, **changes: Any) -> Node:
    return replace(Node("BlockAttention", block_inputs(dtype), {"scale": 0.125}), **changes)


def block_attention(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    tensors = tensors_of(run, memory, "out", "lse")
    out = tensors["out"]
    if out.dtype == FP16:
        tensors |= scratch_of(run, memory, out=(tuple(out.shape), FP32))
    yield assert_range(tensors["q_index"], -1, LENGTH - 1)
    yield assert_range(tensors["k_index"], -1, KEYS - 1)
    yield from _rounds("block_attention_forward", tensors, block_kernels.Pattern(), config)
    if out.dtype == FP16:
        yield narrow(tensors["out"], out)


def _rounds(
    kernel: str, tensors: Mapping[str, Tensor], pattern: block_kernels.Pattern, config: Mapping[str, Config]
) -> Launches:
    for launch in block_kernels.launches_of(kernel, tensors, pattern, 0.125, config):
        yield kernel, launch


def with_options_node(dtype: torch.dtype, *, one: bool, **attributes: int) -> Node:
    """one: counts and masks are one number for all, and a local round is given; else it is none of that."""
    heads, place = (BATCH, HEADS), (1, 1, 1, 1)
    of_rounds = place if one else (*heads, ROUNDS, LENGTH)
    local_q, local_k = ((BLOCKS, C_Q), (BLOCKS, C_K)) if one else ((1, 1), (1, 1))
    inputs = block_inputs(dtype, LENGTH) | {
        "local_q_index": ((*heads, 1, *local_q), INT32), "local_k_index": ((*heads, 1, *local_k), INT32),
        "q_bucket": (of_rounds, INT32), "k_bucket": (of_rounds, INT32),
        "n_used_blocks": ((1,) if one else (BATCH,), INT32),
        "own_mask": ((1, 1) if one else (BATCH, LENGTH), torch.bool),
    }  # fmt: skip
    return Node("BlockAttentionWithOptions", inputs, {"scale": 0.125, "wrap": 1, **attributes})


def reformer(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    """Buckets, duplicates counted once, an own key as the last resort; fp32 results need no narrowing."""
    tensors = tensors_of(run, memory, "out", "lse")
    numbers = (BATCH, HEADS, ROUNDS, LENGTH), INT32
    tensors |= scratch_of(run, memory, q_block=numbers, k_block=numbers)
    for name in ("q_index", "k_index"):
        yield assert_range(tensors[name], -1, LENGTH - 1)
    yield assert_range(tensors["n_used_blocks"], 1, BLOCKS)
    for side in "qk":
        yield block_numbers(tensors[f"{side}_index"], tensors[f"{side}_block"])
    pattern = block_kernels.Pattern(
        look_back=1, is_causal=True, exclude_self=True, last_resort=True, correct_duplicates=True, buckets=True
    )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("local_")}
    yield from _rounds("block_attention_forward", tensors, pattern, config)
    yield from _rounds("block_attention_own_key_forward", tensors, pattern, config)


def causal_smyrf(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    """An own key that counts once, a local round; one number stands for all counts and for all masks."""
    given = tensors_of(run, memory, "out", "lse")
    out, n_used, mask = given["out"], given["n_used_blocks"], given["own_mask"]
    made = {"out": (tuple(out.shape), FP32), "n_used_blocks": ((BATCH,), INT32)}
    tensors = given | scratch_of(run, memory, **made, own_mask=((BATCH, LENGTH), torch.bool))
    yield repeat(n_used, tensors["n_used_blocks"])
    yield repeat(mask, tensors["own_mask"])
    for name in ("q_index", "k_index"):
        yield assert_range(tensors[name], -1, LENGTH - 1)
    yield assert_range(tensors["n_used_blocks"], 1, BLOCKS)
    for side in "qk":
        tensors[f"local_index_{side}"] = tensors.pop(f"local_{side}_index")
        del tensors[f"{side}_bucket"]
        yield assert_range(tensors[f"local_index_{side}"], -1, LENGTH - 1)
    pattern = block_kernels.Pattern(is_causal=True, exclude_self=True, once=True)
    yield from _rounds("block_attention_forward", tensors, pattern, config)
    yield from _rounds("block_attention_own_key_forward", tensors, pattern, config)
    yield narrow(tensors["out"], out)


def linear_node(dtype: torch.dtype, *, is_causal: bool) -> Node:
    """Causal: with one number for the mask, and no initial state."""
    mask = ((1, 1) if is_causal else (BATCH, KEYS)), torch.bool
    initial = ((1, 1, 1) if is_causal else (BATCH, HEADS, DIM * (DIM + 1))), FP32
    inputs = attention_inputs(dtype, LENGTH if is_causal else KEYS) | {"key_mask": mask, "initial": initial}
    return Node("LinearAttention", inputs, {"feature_map": 0, "is_causal": int(is_causal), "eps": 0.0625})


def linear_attention(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    room, is_causal = linear_kernels, bool(run.node.attributes["is_causal"])
    given = tensors_of(run, memory, "result", "den", "final")
    keys, state = given["k"].shape[2], tuple(given["final"].shape)
    chunk = room.chunk_length(keys, is_causal, config)
    chunks = -(-keys // chunk), state[2]
    made: dict[str, Any] = {}
    if is_causal:
        made = {"key_mask": ((BATCH, keys), torch.bool), "initial": (state, FP32)}
    made |= {"states": ((BATCH, KV_HEADS, *chunks), FP32)}
    if is_causal:
        made |= {"before": ((BATCH, HEADS, *chunks), FP32)}
    tensors = given | scratch_of(run, memory, **made)
    if is_causal:
        yield repeat(given["key_mask"], tensors["key_mask"])
    tensors |= {"own_x": given["q"], "other_x": given["k"], "other_y": given["v"], "delta": given["final"]}
    tensors.setdefault("before", given["final"])
    pattern = room.Pattern("elu", is_causal, has_mask=True, has_initial=True)
    names = ("linear_attention_states", "linear_attention_scan", "linear_attention_outputs")
    yield from zip(names, room.launches_of(names, tensors, pattern, 0.0625, config, chunk), strict=True)


def step_node(dtype: torch.dtype) -> Node:
    inputs = {name: ((*shape[:2], 1, DIM), dtype) for name, (shape, _) in attention_inputs(dtype).items()}
    inputs |= {"s": ((BATCH, HEADS, DIM, DIM), FP32), "z": ((BATCH, HEADS, DIM), FP32)}
    return Node("LinearAttentionStep", inputs, {"feature_map": 1, "eps": 0.0625})


def linear_attention_step(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    kernel = "linear_attention_step"
    tensors = tensors_of(run, memory, "out", "new_s", "new_z")
    for launch in step_kernels.launches_of(kernel, tensors, "relu", 0.0625, config[kernel]):
        yield kernel, launch


def hash_argmax_node(dtype: torch.dtype) -> Node:
    """Two factors: 8 and 4 buckets have 4 and 2 directions."""
    inputs = {"x": ((BATCH, HEADS, LENGTH, DIM), dtype), "rotations": ((HEADS, DIM, ROUNDS, 6), FP32)}
    return Node("HashArgmax", inputs, {"factors": [8, 4]})


def hash_argmax(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    given = tensors_of(run, memory, "buckets")
    turned = scratch_of(run, memory, rotations=((HEADS, ROUNDS, 6, DIM), FP32))
    directions = memory.at(run.node.addresses()["rotations"], (HEADS, DIM, ROUNDS * 6), FP32)
    yield turn(directions, turned["rotations"])
    kernel = "hash_argmax_digit"
    chosen = dict.fromkeys((4, 2), config[kernel])
    for launch in hash_kernels.launches_of(given | turned, (8, 4), chosen):
        yield kernel, replace(launch, args=launch.args | {"PRECISION": "tf32x3"})  # as on a GPU


def hash_bits_node(dtype: torch.dtype) -> Node:
    return Node("HashBits", {"x": ((BATCH, HEADS, LENGTH, DIM), dtype), "planes": ((31, DIM + 1), FP32)}, {})


def hash_bits(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    given, kernel = tensors_of(run, memory, "codes"), "hamming_hash"
    turned = scratch_of(run, memory, planes=((DIM + 1, 31), FP32))
    yield turn(given["planes"], turned["planes"])
    yield kernel, hamming_kernels.hash_launch(given | turned, "cuda:80", config[kernel])


def smyrf_hash_node(dtype: torch.dtype) -> Node:
    sides = [(name, x) for name, x in attention_inputs(dtype).items() if name != "v"]
    masks = {"query_mask": ((BATCH, LENGTH), torch.bool), "key_mask": ((BATCH, KEYS), torch.bool)}
    return Node("SmyrfHash", {**dict(sides), "projections": ((DIM + 2, ROUNDS), FP32), **masks}, {})


def smyrf_hash(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    room, given, kernel = smyrf_kernels, tensors_of(run, memory, "q_hash", "k_hash"), "smyrf_hash_project"
    made: dict[str, Any] = {"turned": ((1, 1, ROUNDS, DIM + 2), FP32)}
    lengths = {"q": LENGTH, "k": KEYS}
    for side, length in lengths.items():
        made |= {f"{side} squares": ((BATCH, HEADS, length), FP32)}
        made |= {f"{side} most": ((BATCH, HEADS, cdiv(length, 16)), FP32)}
    tensors = scratch_of(run, memory, **made)
    yield turn(given["projections"], tensors["turned"])
    directions = tensors["turned"].expand(BATCH, HEADS, -1, -1)
    memory.addresses[id(directions)] = memory.of(tensors["turned"])
    sides = {
        side: {"x": given[side], "directions": directions, "mask": given[mask], "products": given[f"{side}_hash"],
               "squares": tensors[f"{side} squares"], "most": tensors[f"{side} most"]}
        for side, mask in (("q", "query_mask"), ("k", "key_mask"))
    }  # fmt: skip
    for side in "qk":
        yield kernel, room.project_launch(sides[side], "cuda:80", config[kernel])
    tile, kernel = config[kernel].blocks["BLOCK_M"], "smyrf_hash_lift"
    for side, other in ("qk", "kq"):
        own = sides[side] | {"other_most": sides[other]["most"], "hashes": sides[side]["products"]}
        is_q = side == "q"
        yield kernel, room.lift_launch(own, tile, lengths[other], "cuda:80", of_queries=is_q, config=config[kernel])


def cluster_sums_node(dtype: torch.dtype) -> Node:
    inputs = {"x": ((BATCH, HEADS, ROWS, DIM), dtype), "clusters": ((BATCH, HEADS, ROWS), INT32)}
    return Node("ClusterSums", inputs, {"n_clusters": N_CLUSTERS})


def cluster_sums(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    given, kernel, size = tensors_of(run, memory, "sums", "counts"), "cluster_attention_sums", N_CLUSTERS + 1
    parts = BATCH, HEADS, cluster_kernels.chunks(ROWS, "cuda:80")[0], size
    made = scratch_of(run, memory, sums=((*parts, DIM), FP32), counts=(parts, INT32))
    yield assert_range(given["clusters"], -1, N_CLUSTERS - 1)
    yield kernel, cluster_kernels.sums_launch(given | made, "cuda:80", config[kernel])
    for name, each in (("sums", DIM), ("counts", 1)):
        sizes = {"n_parts": parts[2], "size": N_CLUSTERS * each, "part_size": size * each}
        yield step_over("sum_parts", given[name].numel(), parts_ptr=made[name], total_ptr=given[name], **sizes)


def centroid_node(dtype: torch.dtype, *, one: bool, top_k: int) -> Node:
    """one: a number is the mask of all keys."""
    key = (BATCH, KV_HEADS, ALL_KEYS, DIM), dtype
    mask = ((1, 1) if one else (BATCH, ALL_KEYS)), torch.bool
    inputs = {"q": ((BATCH, HEADS, N_CLUSTERS, DIM), dtype), "k": key, "v": key, "key_mask": mask}
    return Node("CentroidAttention", inputs, {"top_k": top_k, "scale": 0.125})


def topk_keys_node(dtype: torch.dtype) -> Node:
    node = centroid_node(dtype, one=False, top_k=TOP_K)
    return replace(node, op="TopkKeys", inputs={name: x for name, x in node.inputs.items() if name != "v"})


def centroid_attention(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    room, top_k, has_values = centroid_kernels, run.node.attributes["top_k"], "v" in run.node.inputs
    given = tensors_of(run, memory, *["out", "lse"] * has_values, "topk_index")
    lead, value_dim, n_parts = (BATCH, HEADS), DIM * has_values, cdiv(ALL_KEYS, room.PART)
    n_groups = cdiv(ALL_KEYS, room.GROUP.value) if top_k else 0
    one = given["key_mask"].numel() == 1
    made: dict[str, Any] = {"key_mask": ((BATCH, ALL_KEYS), torch.bool)} if one else {}
    made |= {"out": ((*lead, n_parts, N_CLUSTERS, value_dim), FP32), "lse": ((*lead, n_parts, N_CLUSTERS), FP32)}
    made |= {"peaks": ((*lead, N_CLUSTERS, n_groups), FP32), "seed": ((1,), INT64)}
    if top_k:
        of_queries = *lead, N_CLUSTERS
        made |= {"groups": ((*of_queries, top_k), INT32), "places": ((*of_queries, top_k), INT32)}
        made |= {"logits": ((*of_queries, top_k * room.GROUP.value), FP32)}
    tensors = {"v": given["k"], **given, **scratch_of(run, memory, **made)}
    if one:
        yield repeat(given["key_mask"], tensors["key_mask"])
    flags = {"HAS_MASK": True, "HAS_VALUES": has_values, "HAS_PEAKS": top_k > 0}

    def launch(kernel: str) -> tuple[str, Launch]:
        return kernel, room.launch_of(kernel, tensors, flags, 0.125, 0.0, config[kernel])

    yield launch("centroid_attention_forward")
    if has_values:
        folded = {"outs_ptr": tensors["out"], "lses_ptr": tensors["lse"], "out_ptr": given["out"]}
        sizes = {"n_parts": n_parts, "n_queries": N_CLUSTERS, "dim": DIM}
        yield step_over("fold", given["out"].numel(), **folded, lse_ptr=given["lse"], **sizes)
    if top_k:
        rows, places, size = BATCH * HEADS * N_CLUSTERS, tensors["places"], room.GROUP.value
        yield step("largest", rows, numbers_ptr=tensors["peaks"], places_ptr=tensors["groups"], n=n_groups, k=top_k)
        yield launch("centroid_attention_candidates")
        yield step("largest", rows, numbers_ptr=tensors["logits"], places_ptr=places, n=top_k * size, k=top_k)
        found = {f"{name}_ptr": tensors[name] for name in ("places", "groups", "logits")}
        sizes = {"k": top_k, "n_groups": top_k, "group_size": size}
        yield step_over("listed_keys", rows * top_k, **found, keys_ptr=given["topk_index"], **sizes)


def hamming_kmeans_node() -> Node:
    inputs = {"codes": ((BATCH, HEADS, ROWS), INT64), "initial": ((BATCH, HEADS, N_CLUSTERS), INT32)}
    inputs |= {"mask": ((BATCH, ROWS), torch.bool), "seed": ((), INT64)}
    return Node("HammingKmeans", inputs, {"n_bits": 31, "n_iterations": 3})


def hamming_kmeans(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    room, given, lead = hamming_kernels, tensors_of(run, memory, "clusters"), (BATCH, HEADS)
    made = {"centroids": ((*lead, 2, N_CLUSTERS), INT32), "ranks": ((*lead, N_CLUSTERS), INT32)}
    made |= {"counts": (room.counts_size(*lead, ROWS, N_CLUSTERS, "cuda:80"), INT32)}
    tensors = given | scratch_of(run, memory, **made)
    first = {f"{name}_ptr": tensors[name] for name in ("codes", "initial", "centroids", "ranks")}
    sizes = {"n_clusters": N_CLUSTERS, "length": ROWS}
    yield step_over("first_centroids", given["initial"].numel(), **first, **sizes)
    names = {kernel: name for name, kernel in room.KERNELS.items()}
    for launch in room.kmeans_launches(tensors, 31, 3, "cuda:80", config):
        yield names[launch.kernel], launch


def topk_attention_node(dtype: torch.dtype, *, is_causal: bool) -> Node:
    lists = BATCH, HEADS, N_CLUSTERS
    inputs = attention_inputs(dtype) | {"clusters": ((BATCH, HEADS, LENGTH), INT32)}
    inputs |= {"topk_index": ((*lists, TOP_K), INT32), "mass": (lists, FP32), "rest": ((*lists, DIM), FP32)}
    return Node("TopkAttention", inputs, {"is_causal": int(is_causal), "scale": 0.125})


def topk_attention(run: Run, memory: Memory, config: Mapping[str, Config]) -> Launches:
    given, kernel = tensors_of(run, memory, "out", "lse"), "topk_attention_forward"
    made = {"order": ((BATCH, HEADS, LENGTH), INT32), "offsets": ((BATCH, HEADS, N_CLUSTERS + 1), INT32)}
    tensors = given | scratch_of(run, memory, **made, seed=((1,), INT64))
    yield assert_range(given["clusters"], -1, N_CLUSTERS - 1)
    yield assert_range(given["topk_index"], -1, KEYS - 1)
    sorting = {f"{name}_ptr": tensors[name] for name in ("clusters", "order", "offsets")}
    programs = BATCH * HEADS * (N_CLUSTERS + 1)
    yield step("sort_by_cluster", programs, **sorting, length=LENGTH, n_clusters=N_CLUSTERS)
    is_causal = bool(run.node.attributes["is_causal"])
    yield kernel, topk_kernels.launch_of(kernel, tensors, is_causal, 0.125, 0.0, config[kernel])


SMYRF = {"is_causal": 1, "self_mode": 3, "across_buckets": 1, "look_back": 0, "look_ahead": 0, "correct_duplicates": 0}
REFORMER = {**SMYRF, "self_mode": 2, "across_buckets": 0, "look_back": 1, "correct_duplicates": 1}
LARGE = Config({"BLOCK_M": 16, "BLOCK_N": 256}, num_warps=4, num_stages=5)
CLUSTERED = Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=4, num_stages=2, num_ctas=2)  # thread blocks to a program
CASES = [
    Case("block attention", block_attention_node(FP32), block_attention),
    Case("block attention, large tiles", block_attention_node(FP16), block_attention, LARGE),
    Case("block attention, clusters", block_attention_node(FP16, capability=90), block_attention, CLUSTERED),
    Case("Reformer", with_options_node(FP32, one=False, **REFORMER), reformer),
    Case("causal SMYRF, local, fp16", with_options_node(FP16, one=True, **SMYRF), causal_smyrf),
    Case("linear attention", linear_node(FP32, is_causal=False), linear_attention),
    Case("linear attention, causal, fp16", linear_node(FP16, is_causal=True), linear_attention),
    Case("step of linear attention, fp16", step_node(FP16), linear_attention_step),
    Case("LSH", hash_argmax_node(FP32), hash_argmax),
    Case("random hyperplanes, fp16", hash_bits_node(FP16), hash_bits),
    Case("SMYRF's hash", smyrf_hash_node(FP32), smyrf_hash),
    Case("SMYRF's hash, fp16", smyrf_hash_node(FP16), smyrf_hash),
    Case("k-means", hamming_kmeans_node(), hamming_kmeans),
    Case("sums of clusters", cluster_sums_node(FP32), cluster_sums),
    Case("sums of clusters, fp16", cluster_sums_node(FP16), cluster_sums),
    Case("centroid attention with lists", centroid_node(FP32, one=False, top_k=TOP_K), centroid_attention),
    Case("centroid attention, fp16", centroid_node(FP16, one=True, top_k=0), centroid_attention),
    Case("keys of lists, fp16", topk_keys_node(FP16), centroid_attention),
    Case("top-k attention", topk_attention_node(FP32, is_causal=False), topk_attention),
    Case("top-k attention, causal, fp16", topk_attention_node(FP16, is_causal=True), topk_attention),
]
