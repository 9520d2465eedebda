"""Does the file compute what the model does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastattn.export import outputs
from fastattn.export.convert import need_onnx

# Sorting by a projection puts nearly equal hashes in an order that the last bit of a sum decides, and torch and ONNX
# Runtime sum in different orders: now and then a token lands in the neighbouring cluster, and the rows of both clusters
# change. Of one layer's rows (8 heads of 64, 4 rounds, clusters of 64, Gaussian inputs) none did so at 4096 tokens, and
# up to 0.3 % at 16384. That is as good an approximation, but another one: the bound is on the error of a whole output.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class OutputError:
    """name: of the output. largest: of |onnx - torch|. relative: |onnx - torch| / |torch|, 2-norms of the whole output.
    rows_off: share of rows (last dimension) that differ by more than 1e-3 of the output's largest value."""

    name: str
    largest: float
    relative: float
    rows_off: float


@dataclass(frozen=True)
class CheckReport:
    """errors: one for each output. ok: every relative error is at most ``tolerance``."""

    errors: tuple[OutputError, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        return all(error.relative <= self.tolerance for error in self.errors)

    def __str__(self) -> str:
        return "; ".join(
            f"{e.name}: largest error {e.largest:.2e}, relative {e.relative:.2e}, {e.rows_off:.1%} of rows off"
            for e in self.errors
        )


def check(
    model: nn.Module,
    path: str | Path,
    sample: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> CheckReport:
    """Run ``model`` in torch and ``path`` in ONNX Runtime on ``sample`` and compare every output.

    tolerance: largest relative error of an output that is ``ok``. It is no rounding error: where two hashes are nearly
        equal, torch and ONNX Runtime may sort them differently, and a token is then in another, equally good, cluster.
    providers: ONNX Runtime's execution providers.

    Raises ImportError without the onnx extra, ValueError for a model in training mode and for inputs that are not the
    file's.
    """
    need_onnx()
    import onnxruntime

    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    session = onnxruntime.InferenceSession(str(path), providers=list(providers))
    known = {value.name for value in session.get_inputs()}
    if known != set(sample):
        raise ValueError(f"the file takes {', '.join(sorted(known))}; sample has {', '.join(sorted(sample))}")
    wanted = outputs.run(model, sample)
    got = session.run(list(wanted), {name: value.cpu().numpy() for name, value in sample.items()})
    return CheckReport(
        tuple(
            _error(name, torch.from_numpy(value), wanted[name].cpu()) for name, value in zip(wanted, got, strict=True)
        ),
        tolerance,
    )


def _error(name: str, got: Tensor, wanted: Tensor) -> OutputError:
    got, wanted = got.double(), wanted.double()
    difference = (got - wanted).abs()
    rows = difference.flatten(0, -2) if difference.ndim > 1 else difference.unsqueeze(0)
    norm = wanted.norm().item()
    return OutputError(
        name,
        largest=difference.max().item(),
        relative=difference.norm().item() / norm if norm else difference.norm().item(),
        rows_off=(rows.amax(-1) > 1e-3 * wanted.abs().max()).double().mean().item(),
    )
