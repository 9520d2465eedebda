"""SMYRF in ONNX Runtime, on fused kernels and as standard operators, against its dense MultiHeadAttention.

``python -m perf ort``. All sessions of a length take turns in one run, whatever their number of threads; idle threads
of theirs sleep, for they would take the others' cores. Each side has the layout that it wants: (1, 8, N, 64) here,
(1, N, 512) there.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn.autotune.measure import take_turns
from perf.report import Row, missing_row, ratio_row, refuse_if_off

HEADS, HEAD_DIM = 8, 64
ROUNDS, CLUSTER = 4, 64
THREADS = (1, 2)
# times faster than MultiHeadAttention, on two threads
GOALS = {1024: 1.2, 4096: 6.0, 16384: 20.0}
SECONDS = {1024: 8.0, 4096: 16.0, 16384: 90.0}
CHECKED_LENGTH = 320
DENSE, BODIES, KERNELS = "MultiHeadAttention", "standard operators", "fused kernels"
NAME = f"SMYRF, {ROUNDS} rounds of {CLUSTER}"


class _Smyrf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.projections = nn.Buffer(torch.randn(HEAD_DIM + 2, ROUNDS, generator=generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"q_cluster_size": CLUSTER, "projections": self.projections}
        return fastattn.smyrf_attention(q, k, v, n_hashes=ROUNDS, **options)


def rows(seconds: Mapping[int, float] = SECONDS, threads: Sequence[int] = THREADS) -> Iterator[Row]:
    """seconds: of timing, by length."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as problem:
        for length in seconds:
            yield missing_row(f"{NAME}, {KERNELS}, against {DENSE}", length, GOALS.get(length), str(problem))
        return
    with tempfile.TemporaryDirectory() as folder:
        makers = _makers(Path(folder))
        sessions = {(name, count): make(count) for count in threads for name, make in makers.items()}
        _check(sessions)
        for length in seconds:
            inputs = _inputs(length)
            calls = {key: _call(key[0], made, inputs) for key, made in sessions.items()}
            for call in calls.values():
                call()
            times = take_turns(calls, time.monotonic() + seconds[length], give_up=math.inf)
            for count in threads:
                ours = times[KERNELS, count]
                goal = GOALS.get(length) if count == 2 else None
                on = f"{count} thread{'s' if count > 1 else ''}"
                what = f"{NAME}, {KERNELS}, {on}, against"
                yield ratio_row(f"{what} {DENSE}", length, times[DENSE, count], ours, goal)
                yield ratio_row(f"{what} {BODIES}", length, times[BODIES, count], ours, None)


def _makers(folder: Path) -> dict[str, Callable[[int], Any]]:
    """By name: number of threads -> session."""
    import onnxruntime

    from fastattn.export import session, to_onnx

    free = {2: torch.export.Dim("length", min=2)}  # one for all three, so that they are known to be the same tokens
    sample = dict(zip("qkv", _inputs(CHECKED_LENGTH), strict=True))
    smyrf = to_onnx(_Smyrf().eval(), sample, folder / "smyrf.onnx", dynamic_shapes=dict.fromkeys("qkv", free))
    dense = folder / "dense.onnx"
    dense.write_bytes(_dense_model())

    def plain(path: Path, options: Any) -> Any:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return {
        DENSE: lambda threads: plain(dense, _options(threads)),
        BODIES: lambda threads: plain(smyrf, _options(threads)),
        KERNELS: lambda threads: session(smyrf, options=_options(threads)),
    }


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _dense_model() -> bytes:
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, HEADS * HEAD_DIM]) for n in "qkvo"]
    node = helper.make_node(DENSE, ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=HEADS)
    graph = helper.make_graph([node], "dense", values[:3], values[3:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, length, HEAD_DIM, generator=generator) for _ in "qkv")
    return q, k, v


def _call(name: str, session: Any, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    if name == DENSE:
        inputs = [x.transpose(1, 2).flatten(2) for x in inputs]
    given = {name: x.contiguous().numpy() for name, x in zip("qkv", inputs, strict=True)}
    return lambda: session.run(None, given)[0]


def _check(sessions: Mapping[tuple[str, int], Any]) -> None:
    """No speed is reported of what is wrong."""
    inputs = _inputs(CHECKED_LENGTH)
    smyrf = _Smyrf()(*inputs)
    dense = scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
    for (name, threads), session in sessions.items():
        got = torch.from_numpy(_call(name, session, inputs)())
        refuse_if_off(f"{name} on {threads} threads", (got,), (dense if name == DENSE else smyrf,))
