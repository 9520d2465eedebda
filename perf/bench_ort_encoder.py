"""A patched encoder of six layers in ONNX Runtime, end to end, against the same encoder as it is: ``python -m perf
ort_encoder``.

The sizes are all-MiniLM-L6-v2's, with more positions and random weights. The dense side is what torch's exporter makes
of the model.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.autotune.measure import take_turns
from perf.report import Row, missing_row, ratio_row

LAYERS, HEADS, HIDDEN, VOCABULARY = 6, 12, 384, 1000
SECONDS = {1024: 10.0, 4096: 40.0}
THREADS = 2
CHECKED_LENGTH = 64  # one cluster, so that no token stands between two
WHAT = f"encoder of {LAYERS} layers, SMYRF 4 rounds of 64"
DENSE, BODIES, KERNELS = "dense export", "standard operators", "fused kernels"


def rows(seconds: Mapping[int, float] = SECONDS) -> Iterator[Row]:
    """seconds: of timing, by length."""
    try:
        import onnxruntime  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as problem:
        for length in seconds:
            yield missing_row(f"{WHAT}, {KERNELS}, against {DENSE}", length, None, str(problem))
        return
    with tempfile.TemporaryDirectory() as folder:
        sessions = _sessions(Path(folder), max(seconds))
        for length in seconds:
            given = {"input_ids": _ids(length).numpy()}
            calls = {name: (lambda made=made, given=given: made.run(None, given)) for name, made in sessions.items()}
            for call in calls.values():
                call()
            times = take_turns(calls, time.monotonic() + seconds[length], give_up=math.inf)
            for form in (BODIES, KERNELS):
                yield ratio_row(f"{WHAT}, {form}, against {DENSE}", length, times[DENSE], times[form], None)


def _sessions(folder: Path, most: int) -> dict[str, Any]:
    """By name, all checked against torch."""
    import onnxruntime
    from transformers import BertConfig, BertModel

    from fastattn import export

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, max_position_embeddings=max(most, CHECKED_LENGTH),
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    sample = {"input_ids": _ids(2 * CHECKED_LENGTH).reshape(2, -1)}
    free = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    plain = {"providers": ["CPUExecutionProvider"], "sess_options": options}

    dense = folder / "dense.onnx"
    torch.onnx.export(model, (), str(dense), kwargs=sample, dynamic_shapes=free, dynamo=True, verbose=False)
    found = {DENSE: onnxruntime.InferenceSession(str(dense), **plain)}
    _check(DENSE, found[DENSE], model)
    fastattn.patch(model, "smyrf", n_hashes=4, q_cluster_size=64, min_length=0)
    patched = export.to_onnx(model, sample, folder / "patched.onnx")
    found[BODIES] = onnxruntime.InferenceSession(str(patched), **plain)
    found[KERNELS] = export.session(patched, options=options)
    for name in (BODIES, KERNELS):
        _check(name, found[name], model)
    return found


def _ids(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))


def _check(name: str, session: Any, model: torch.nn.Module) -> None:
    """No speed is reported of what is wrong."""
    ids = _ids(CHECKED_LENGTH)
    with torch.no_grad():
        expected = model(input_ids=ids).last_hidden_state
    (got,) = session.run(None, {"input_ids": ids.numpy()})
    off = (torch.from_numpy(got) - expected).abs().max().item()
    if not off <= 1e-4 * expected.abs().max().item():
        raise RuntimeError(f"{name} is wrong on this machine, by {off:.1e}: nothing was measured")
