"""Methods in ONNX Runtime, on fused kernels and as standard operators, against its dense MultiHeadAttention.

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
SMYRF, CLUSTERED, LINEAR = f"SMYRF, {ROUNDS} rounds of {CLUSTER}", "clustered, 100 clusters", "linear"
DENSE, BODIES, KERNELS = "MultiHeadAttention", "standard operators", "fused kernels"
# Times faster than MultiHeadAttention, on two threads.
GOALS = {
    (SMYRF, KERNELS): {1024: 1.2, 4096: 6.0, 16384: 20.0},
    (SMYRF, BODIES): {16384: 4.0},
}
SECONDS = {1024: 12.0, 4096: 24.0, 16384: 90.0}
THREADS = (1, 2)
CHECKED_LENGTH = 320


class Method(nn.Module):
    """One of the methods, with its draws among its weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        generator = torch.Generator().manual_seed(4)
        self.draws = nn.Buffer(torch.randn(HEAD_DIM + 2, ROUNDS, generator=generator))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.name == SMYRF:
            options: dict[str, Any] = {"q_cluster_size": CLUSTER, "projections": self.draws}
            return fastattn.smyrf_attention(q, k, v, n_hashes=ROUNDS, **options)
        if self.name == CLUSTERED:
            return fastattn.clustered_attention(q, k, v, generator=torch.Generator().manual_seed(5))
        return fastattn.linear_attention(q, k, v)


def rows(seconds: Mapping[int, float] = SECONDS, threads: Sequence[int] = THREADS) -> Iterator[Row]:
    """seconds: of timing, by length."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as problem:
        for (name, form), goals in GOALS.items():
            for length, goal in goals.items():
                yield missing_row(f"{name}, {form}, against {DENSE}", length, goal, str(problem))
        return
    with tempfile.TemporaryDirectory() as folder:
        makers = _makers(Path(folder))
        sessions = {(*key, count): make(count) for count in threads for key, make in makers.items()}
        _check(sessions)
        for length in seconds:
            inputs = _inputs(length)
            calls = {key: _call(made, inputs, is_dense=key[1] == DENSE) for key, made in sessions.items()}
            for call in calls.values():
                call()
            times = take_turns(calls, time.monotonic() + seconds[length], give_up=math.inf)
            for count in threads:
                on = f"{count} thread{'s' if count > 1 else ''}"
                for name, form in makers:
                    if form != DENSE:
                        goal = GOALS.get((name, form), {}).get(length) if count == 2 else None
                        what = f"{name}, {form}, {on}, against {DENSE}"
                        yield ratio_row(what, length, times["", DENSE, count], times[name, form, count], goal)


def _makers(folder: Path) -> dict[tuple[str, str], Callable[[int], Any]]:
    """By method and form: number of threads -> session."""
    import onnxruntime

    from fastattn.export import session, to_onnx

    free = {2: torch.export.Dim("length", min=2)}  # one for all three, so that they are known to be the same tokens
    sample = dict(zip("qkv", _inputs(CHECKED_LENGTH), strict=True))
    dense = folder / "dense.onnx"
    dense.write_bytes(_dense_model())

    def plain(path: Path) -> Callable[[int], Any]:
        return lambda threads: onnxruntime.InferenceSession(
            str(path), _options(threads), providers=["CPUExecutionProvider"]
        )

    def fused(path: Path) -> Callable[[int], Any]:
        return lambda threads: session(path, options=_options(threads))

    found = {("", DENSE): plain(dense)}
    for number, name in enumerate((SMYRF, CLUSTERED, LINEAR)):
        path = folder / f"{number}.onnx"
        to_onnx(Method(name).eval(), sample, path, dynamic_shapes=dict.fromkeys("qkv", free))
        found |= {(name, BODIES): plain(path), (name, KERNELS): fused(path)}
    return found


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


def _call(session: Any, inputs: Sequence[Tensor], *, is_dense: bool) -> Callable[[], Any]:
    if is_dense:
        inputs = [x.transpose(1, 2).flatten(2) for x in inputs]
    given = {name: x.contiguous().numpy() for name, x in zip("qkv", inputs, strict=True)}
    return lambda: session.run(None, given)[0]


def _check(sessions: Mapping[tuple[str, str, int], Any]) -> None:
    """No speed is reported of what is wrong."""
    inputs = _inputs(CHECKED_LENGTH)
    for (name, form, threads), session in sessions.items():
        if form == DENSE:
            expected = scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
        else:
            expected = Method(name)(*inputs)
        got = torch.from_numpy(_call(session, inputs, is_dense=form == DENSE)())
        refuse_if_off(f"{name} {form} on {threads} threads", (got,), (expected,))
