"""On a GPU, ops launch what Triton's own launcher would: a driver that runs nothing writes down what is asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastattn.export.ort import needs
from fastattn.export.ort.library import build_library
from tests.export.ort.cuda_cases import (
    BATCH,
    BLOCKS,
    CASES,
    DIM,
    FP16,
    FP32,
    HEADS,
    KV_HEADS,
    LENGTH,
    N_CLUSTERS,
    OF_CLUSTERS,
    ROUNDS,
    TARGETS,
    TOP_K,
    block_attention_node,
    centroid_node,
    smyrf_hash_node,
)
from tests.export.ort.on_cuda import (
    STREAM,
    Memory,
    Node,
    Ran,
    Run,
    TritonLaunch,
    build_driver,
    launch_by_triton,
    run_nodes,
)

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

    def test_of_an_empty_batch_launches_nothing(self, library: Path, driver: Path, tmp_path: Path) -> None:
        """Of what is empty there is no address."""
        nodes = [
            replace(case.node, inputs={
                name: ((0, *shape[1:]) if shape[:1] == (BATCH,) else shape, dtype)
                for name, (shape, dtype) in case.node.inputs.items()
            })
            for case in CASES
        ]  # fmt: skip
        for run in run_nodes(library, nodes, driver, tmp_path).runs:
            assert run.error is None and not run.launches

    def test_without_keys_has_nothing(self, library: Path, driver: Path, tmp_path: Path) -> None:
        node = centroid_node(FP32, one=False, top_k=TOP_K)
        shapes = {"k": (BATCH, KV_HEADS, 0, DIM), "v": (BATCH, KV_HEADS, 0, DIM), "key_mask": (BATCH, 0)}
        inputs = {name: (shapes.get(name, shape), dtype) for name, (shape, dtype) in node.inputs.items()}
        run = one(library, replace(node, inputs=inputs), driver, tmp_path)
        assert run.error is None and not run.launches
        out, lse, index = run.outputs[0]
        rows, minus_infinity = BATCH * HEADS * N_CLUSTERS, 0xFF800000
        assert fills_of(run) == [(out["address"], 0, rows * DIM), (lse["address"], minus_infinity, rows)]
        assert index["shape"] == [BATCH, HEADS, N_CLUSTERS, 0]

    def test_hashes_queries_without_keys(self, library: Path, driver: Path, tmp_path: Path) -> None:
        node = smyrf_hash_node(FP32)
        shapes = {"k": (BATCH, KV_HEADS, 0, DIM), "key_mask": (BATCH, 0)}
        inputs = {name: (shapes.get(name, shape), dtype) for name, (shape, dtype) in node.inputs.items()}
        run = one(library, replace(node, inputs=inputs), driver, tmp_path)
        assert run.error is None and run.outputs[0][1]["shape"] == [BATCH, HEADS, ROUNDS, 0]
        assert [launch["kernel"] for launch in run.launches] == ["turn_kernel", "project_kernel", "lift_kernel"]

    @pytest.mark.parametrize("change", ["a dimension more", "a dimension less", "another batch"])
    def test_of_clusters_that_gets_another_shape_says_which_input_is_wrong(
        self, change: str, library: Path, driver: Path, tmp_path: Path
    ) -> None:
        wrong = [
            (name, replace(case.node, inputs={**case.node.inputs, name: (other, dtype)}))
            for case in CASES
            if case.node.op in OF_CLUSTERS
            for name, (shape, dtype) in case.node.inputs.items()
            if (other := changed(shape, change)) is not None
        ]
        assert {node.op for _, node in wrong} == OF_CLUSTERS
        runs = run_nodes(library, [node for _, node in wrong], driver, tmp_path).runs
        for (name, _), run in zip(wrong, runs, strict=True):
            assert run.error is not None and run.error.startswith(f"fastattn {run.node.op}: ")
            # of another batch, it is the others that are wrong
            assert " must have shape " in run.error and (change == "another batch" or f": {name} " in run.error)
            assert {launch["kernel"] for launch in run.launches} <= {"repeat_kernel", "assert_range_kernel"}
            assert len(run.named("cuMemAllocAsync")) == len(run.named("cuMemFreeAsync"))


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


def changed(shape: tuple[int, ...], change: str) -> tuple[int, ...] | None:
    """None where there is nothing to change."""
    if change == "a dimension more":
        return (1, *shape)
    if change == "a dimension less":
        return shape[1:] if shape else None
    return (BATCH + 1, *shape[1:]) if shape[:1] == (BATCH,) else None


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
