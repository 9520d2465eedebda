"""On a GPU, ops launch what Triton's own launcher would: a driver that runs nothing writes down what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.export.ort import needs
from fastattn.export.ort.library import build_library
from fastattn.export.ort.variants import Variant
from fastattn.kernels import block_attention as block_kernels
from fastattn.kernels import hamming as hamming_kernels
from fastattn.kernels import hash_argmax as hash_kernels
from fastattn.kernels import linear_attention as linear_kernels
from fastattn.kernels import linear_attention_step as step_kernels
from fastattn.kernels.config import Config
from fastattn.kernels.launch import Launch
from tests.export.ort.on_cuda import (
    STREAM,
    Memory,
    Node,
    Ran,
    Run,
    TritonLaunch,
    assert_range,
    block_numbers,
    build_driver,
    launch_by_triton,
    narrow,
    repeat,
    run_nodes,
    scratch_of,
    tensors_of,
    turn,
)

DIM = 16  # of heads: small kernels compile fast
TARGETS = ("cuda:80", "cuda:90")
FP32, FP16, INT32 = torch.float32, torch.float16, torch.int32
# lengths and counts that divide by nothing
BATCH, HEADS, KV_HEADS, LENGTH, KEYS, ROUNDS, BLOCKS, C_Q, C_K = 3, 6, 2, 77, 91, 3, 5, 17, 19

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
        attributes = {"q_cluster_size": DIM, "local_window": int("local" in self.name), **node.attributes}
        found = needs.variants([needs.Call(node.op, q_type, DIM, v_shape[3], v_type, attributes)], self.target)
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
]
NAMES = [case.name for case in CASES]
PLAIN, CLUSTERS = NAMES.index("block attention"), NAMES.index("block attention, clusters")


@pytest.fixture(scope="module")
def library() -> Path:
    cuda = {target: [x for case in CASES if case.target == target for x in case.variants()] for target in TARGETS}
    return build_library([], cuda=cuda)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def ran(library: Path, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """All cases, one after the other in one process."""
    return run_nodes(library, [case.node for case in CASES], driver, tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def by_triton(ran: Ran, driver: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What the driver is asked for, case by case, where Triton's own launcher makes the launches."""
    wanted = []
    for case, run in zip(CASES, ran.runs, strict=True):
        memory, variants = Memory(), case.variants()
        config = {variant.kernel: variant.launch.config for variant in variants}
        launches = [*case.launches(run, memory, config)] if run.error is None else []
        wanted.append([TritonLaunch(kernel, launch, memory, variants, case.target) for kernel, launch in launches])
    return launch_by_triton(wanted, driver, tmp_path_factory.mktemp("triton"))


def one(library: Path, node: Node, driver: Path | None, folder: Path) -> Run:
    return run_nodes(library, [node], driver, folder).runs[0]


class TestAnOp:
    @pytest.mark.parametrize("at", range(len(CASES)), ids=NAMES)
    def test_asks_the_driver_for_what_tritons_launcher_does(
        self, at: int, ran: Ran, by_triton: list[list[dict[str, Any]]]
    ) -> None:
        assert ran.runs[at].error is None
        assert len(ran.runs[at].launches) == len(by_triton[at]) > 0
        assert ran.runs[at].launches == by_triton[at]

    @pytest.mark.parametrize("at", range(len(CASES)), ids=NAMES)
    def test_does_all_on_the_sessions_stream_and_leaves_nothing_behind(self, at: int, ran: Ran) -> None:
        run = ran.runs[at]
        assert {call["stream"] for call in run.calls if "stream" in call} == {STREAM}
        taken, given_back = ([x["address"] for x in run.named(f"cuMem{what}Async")] for what in ("Alloc", "Free"))
        assert taken == given_back
        assert len(run.named("cuCtxPushCurrent")) == len(run.named("cuCtxPopCurrent")) == 1
        assert run.calls[0]["call"] == "cuCtxPushCurrent" and run.calls[-1]["call"] == "cuCtxPopCurrent"

    def test_begins_with_what_rows_in_no_block_have(self, ran: Ran) -> None:
        out, lse = ran.runs[PLAIN].outputs[0]
        rows, minus_infinity = BATCH * HEADS * LENGTH, 0xFF800000
        assert fills_of(ran.runs[PLAIN]) == [(out["address"], 0, rows * DIM), (lse["address"], minus_infinity, rows)]

    def test_begins_with_no_block_for_a_row(self, ran: Ran) -> None:
        """Which stands so far off that it is in no window: 2^29, and -2^29 for keys."""
        run, rows = ran.runs[NAMES.index("Reformer")], BATCH * HEADS * ROUNDS * LENGTH
        q_block, k_block = (call["address"] for call in run.named("cuMemAllocAsync"))
        assert fills_of(run)[2:] == [(q_block, 2**29, rows), (k_block, 2**32 - 2**29, rows)]

    def test_begins_with_no_state(self, ran: Ran) -> None:
        run = ran.runs[NAMES.index("linear attention, causal, fp16")]
        initial = run.named("cuMemAllocAsync")[1]["address"]
        assert fills_of(run) == [(initial, 0, BATCH * HEADS * DIM * (DIM + 1))]

    def test_with_large_tiles_asks_for_more_shared_memory_than_any_kernel_has(self, ran: Ran) -> None:
        run = ran.runs[NAMES.index("block attention, large tiles")]
        asked = [(call["attribute"], call["value"], call["device"]) for call in run.named("cuKernelSetAttribute")]
        taken = {launch["shared"] for launch in run.launches if launch["kernel"] == "forward_kernel"}
        # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, for the first round's kernel and the others'
        assert len(taken) == 1 and min(taken) > 48 * 1024 and asked == [(8, *taken, 0)] * 2
        assert [other for other in ran.runs if other.named("cuKernelSetAttribute")] == [run]

    def test_with_clusters_asks_for_them(self, ran: Ran) -> None:
        attention = [launch for launch in ran.runs[CLUSTERS].launches if launch["kernel"] == "forward_kernel"]
        assert [launch["attributes"] for launch in attention] == [[[4, 2, 1, 1], [5, 1]]] * ROUNDS
        # each program is two thread blocks; 17 rows are two tiles of 16
        assert [launch["grid"] for launch in attention] == [[2 * BATCH * HEADS * BLOCKS * 2, 1, 1]] * ROUNDS

    def test_waits_for_the_gpu_only_to_see_whether_there_is_a_local_round(self, ran: Ran) -> None:
        """One place of an index may be -1: there is none. Shapes do not tell."""
        at = NAMES.index("Reformer")
        place = CASES[at].node.addresses()["local_q_index"]
        looked = {"call": "cuMemcpyDtoHAsync", "address": place, "bytes": 4 * BATCH * HEADS, "stream": STREAM}
        calls = ran.runs[at].calls
        assert calls[calls.index(looked) + 1] == {"call": "cuStreamSynchronize", "stream": STREAM}
        assert [run.node for run in ran.runs if run.named("cuStreamSynchronize")] == [CASES[at].node]

    def test_of_empty_tensors_launches_nothing(self, library: Path, driver: Path, tmp_path: Path) -> None:
        node = block_attention_node(FP32)
        empty = {name: ((0, *shape[1:]), dtype) for name, (shape, dtype) in node.inputs.items()}
        run = one(library, replace(node, inputs=empty), driver, tmp_path)
        assert run.error is None and not run.launches


class TestTheRegistry:
    def test_has_the_cpu_wherever_it_has_cuda(self, ran: Ran) -> None:
        """There is no fallback from a node to its body: what one provider can't run is an error."""
        names = ("name", "inputs", "outputs", "optional")
        signatures = {
            provider: [[op[name] for name in names] for op in ran.ops if op["provider"] == provider]
            for provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
        }
        assert signatures["CUDAExecutionProvider"] == signatures["CPUExecutionProvider"] != []

    def test_has_no_op_that_no_case_is_of(self, ran: Ran) -> None:
        assert {op["name"] for op in ran.ops} == {case.node.op for case in CASES} == needs.GPU_OPS

    def test_of_a_library_without_cubins_has_no_cuda(self, ran: Ran, tmp_path: Path) -> None:
        ops = run_nodes(build_library([]), [], None, tmp_path).ops
        assert {op["provider"] for op in ops} == {"CPUExecutionProvider"}
        assert {op["name"] for op in ran.ops} < {op["name"] for op in ops}


def fills_of(run: Run) -> list[tuple[int, int, int]]:
    """(address, word, count) of each."""
    return [(call["address"], call["word"], call["count"]) for call in run.named("cuMemsetD32Async")]


class TestADevice:
    """Each in a process of its own, for what is loaded stays so."""

    def test_loads_a_kernel_once_for_all_threads(self, library: Path, driver: Path, tmp_path: Path) -> None:
        streams = tuple(STREAM + at for at in range(8))
        run = one(library, block_attention_node(FP32, streams=streams), driver, tmp_path)
        assert run.error is None
        images = [launch["image"] for launch in run.launches]
        assert len(images) == 8 * 5  # two checks, three rounds
        assert len(run.named("cuLibraryLoadData")) == len({*images}) == 3
        assert {launch["stream"] for launch in run.launches} == {*streams}

    def test_is_that_of_the_stream(self, library: Path, driver: Path, tmp_path: Path) -> None:
        second = 0x2340  # of device 1; for each there is one dtype's kernel alone
        both = {"FAKE_CUDA_CAPABILITIES": "80,90"}
        nodes = [
            block_attention_node(FP32, environment=both),
            block_attention_node(FP16, environment=both, streams=(second,)),
        ]
        runs = run_nodes(library, nodes, driver, tmp_path).runs
        assert [run.error for run in runs] == [None, None]
        assert [{(x["device"], x["stream"]) for x in run.launches} for run in runs] == [{(0, STREAM)}, {(1, second)}]
        assert not {x["image"] for x in runs[0].launches} & {x["image"] for x in runs[1].launches}

    def test_of_a_later_minor_version_takes_the_cubins_of_an_earlier(
        self, library: Path, driver: Path, tmp_path: Path
    ) -> None:
        nodes = [block_attention_node(FP32, capability=capability) for capability in (80, 86, 89)]
        first, *others = run_nodes(library, nodes, driver, tmp_path).runs
        for run in others:
            assert [x["image"] for x in run.launches] == [x["image"] for x in first.launches] != []

    @pytest.mark.parametrize("capability", [75, 91, 103, 120])
    def test_without_cubins_is_an_error_that_says_which_there_are(
        self, capability: int, library: Path, driver: Path, tmp_path: Path
    ) -> None:
        """Those for sm_90 use what only sm_90 has."""
        run = one(library, block_attention_node(FP32, capability=capability), driver, tmp_path)
        assert run.error is not None and not run.launches
        assert f"this GPU is sm_{capability}, and fastattn's library was built for sm_80, sm_90: " in run.error

    def test_wants_a_kernel_that_was_not_compiled(self, library: Path, driver: Path, tmp_path: Path) -> None:
        run = one(library, block_attention_node(FP32, capability=90), driver, tmp_path)
        assert run.error is not None
        assert "no block_attention_forward(" in run.error and "q_ptr *fp32" in run.error and "for sm_90: " in run.error
        assert len(run.named("cuCtxPushCurrent")) == len(run.named("cuCtxPopCurrent")) == 1

    def test_wants_addresses_that_kernels_were_compiled_for(self, library: Path, driver: Path, tmp_path: Path) -> None:
        run = one(library, block_attention_node(FP32, misaligned="k"), driver, tmp_path)
        assert run.error is not None
        assert "the address of k_ptr of block_attention_forward must be a multiple of 16" in run.error


class TestTheDriver:
    def test_is_missed_only_by_a_run(self, library: Path, tmp_path: Path) -> None:
        run = one(library, block_attention_node(FP32), None, tmp_path)
        assert run.error is not None and "NVIDIA's driver can't be opened: libcuda.so.1" in run.error

    def test_too_old_is_an_error_that_says_so(self, library: Path, tmp_path: Path) -> None:
        run = one(library, block_attention_node(FP32), build_driver(tmp_path, "-DOLD_DRIVER"), tmp_path)
        assert run.error is not None
        assert "older than CUDA 12.0: libcuda.so.1 has no cuLibraryLoadData" in run.error

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            ("cuStreamGetCtx", "cuStreamGetCtx failed"),
            ("cuMemAllocAsync", "cuMemAllocAsync of 88704 bytes failed"),
            ("cuLibraryLoadData", "cuLibraryLoadData of assert_range failed"),
            ("cuLaunchKernelEx", "cuLaunchKernelEx of assert_range failed"),
        ],
    )
    def test_is_quoted_where_it_fails(self, call: str, said: str, library: Path, driver: Path, tmp_path: Path) -> None:
        node = block_attention_node(FP16, environment={"FAKE_CUDA_FAIL": f"{call}=700"})
        run = one(library, node, driver, tmp_path)
        quoted = f"{said} with CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access was encountered"
        assert run.error == f"fastattn BlockAttention: {quoted}"
        assert len(run.named("cuCtxPushCurrent")) == len(run.named("cuCtxPopCurrent"))

    def test_is_quoted_where_it_has_no_words(self, library: Path, driver: Path, tmp_path: Path) -> None:
        node = block_attention_node(FP32, environment={"FAKE_CUDA_FAIL": "cuStreamGetCtx=999"})
        run = one(library, node, driver, tmp_path)
        assert run.error is not None and "an error without a name (999): no more is known" in run.error
