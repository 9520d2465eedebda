"""Does the file compute what the model does?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastattn.export import outputs
from fastattn.export.convert import need_onnx

if TYPE_CHECKING:
    import onnxruntime

# Relative error that rounding alone may come to over a model's layers; all-MiniLM-L6-v2 in fp32 has 1e-6.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2}
# What is above it may come of a tie. Where two hashes are nearly equal, the last bit of a sum decides which token is in
# which of two clusters, and torch and ONNX Runtime sum in different orders. Both are as good an approximation, but of a
# text of 512 tokens in all-MiniLM-L6-v2 (4 rounds, clusters of 64) one such token was seen to move all rows, by 20 %.
# Torch itself is as torn: of 12 times that each weight's last bit moved, it gave the other result 8 times. So that is
# what an error is held against, the largest of so many times.
MOVES = 5


@dataclass(frozen=True)
class OutputError:
    """name: of the output. largest: of |onnx - torch|. relative: |onnx - torch| / |torch|, 2-norms of the whole output.
    rows_off: share of rows (last dimension) that differ by more than 1e-3 (fp16: 1e-1) of the output's largest value.
    tolerance: of the relative error. own: where that is above it, torch's relative error against itself, as the last
    bit of every weight moves."""

    name: str
    largest: float
    relative: float
    rows_off: float
    tolerance: float
    own: float | None = None

    @property
    def ok(self) -> bool:
        """Within the tolerance, or no more than twice what torch's own last bits do."""
        return self.relative <= self.tolerance or (self.own is not None and self.relative <= 2 * self.own)

    def __str__(self) -> str:
        said = (
            f"{self.name}: largest error {self.largest:.2e}, relative {self.relative:.2e}, "
            f"{self.rows_off:.1%} of rows off"
        )
        return said if self.own is None else f"{said} (torch's own, as its weights' last bit moves: {self.own:.2e})"


@dataclass(frozen=True)
class CheckReport:
    """errors: one for each output. ok: every one is."""

    errors: tuple[OutputError, ...]

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.errors)

    def __str__(self) -> str:
        return "; ".join(map(str, self.errors))


def check(
    model: nn.Module,
    path: str | Path,
    sample: Mapping[str, Tensor],
    *,
    tolerance: float | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    fused: bool = False,
) -> CheckReport:
    """Run ``model`` in torch and ``path`` in ONNX Runtime on ``sample`` and compare every output.

    The draws are weights of the file, so that both compute the same, up to rounding. But where two hashes or codes are
    nearly equal, the last bit decides in which of two equally good clusters a token is, and from there on both may
    differ by much more. An error above the tolerance is therefore held against torch's own when the last bit of every
    weight moves (five more runs), and is ``ok`` if that is of the same order. Shorter inputs have fewer such ties.

    tolerance: relative error up to which an output is ``ok`` as it is; None: 1e-4 in fp32, 1e-2 in fp16.
    providers: ONNX Runtime's execution providers.
    fused: on our kernels, by :func:`fastattn.export.session`, and not on the bodies of our nodes.

    Raises ImportError without the onnx extra, ValueError for a model in training mode and for inputs that are not the
    file's; with ``fused`` also what :func:`fastattn.export.session` does.
    """
    need_onnx()
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    session = _session(path, providers, fused)
    known = {value.name for value in session.get_inputs()}
    if known != set(sample):
        raise ValueError(f"the file takes {', '.join(sorted(known))}; sample has {', '.join(sorted(sample))}")
    wanted = outputs.run(model, sample)
    got = session.run(list(wanted), {name: value.cpu().numpy() for name, value in sample.items()})
    errors = [
        _error(name, torch.from_numpy(value), wanted[name], tolerance) for name, value in zip(wanted, got, strict=True)
    ]
    if not all(error.ok for error in errors):
        own = _own_errors(model, sample, wanted)
        errors = [replace(error, own=own[error.name]) for error in errors]
    return CheckReport(tuple(errors))


def _session(path: str | Path, providers: Sequence[str], fused: bool) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: not which of the bodies' constants it can't fold
    if fused:
        from fastattn.export.ort.session import session

        return session(path, providers=providers, options=options)
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def _own_errors(model: nn.Module, sample: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest relative error of each of torch's outputs as the last bit of every weight moves, up or down."""
    draw = torch.Generator().manual_seed(0)
    own = dict.fromkeys(wanted, 0.0)
    for _ in range(MOVES):
        moved = {
            name: value * (1 + torch.finfo(value.dtype).eps * _signs(value, draw))
            for name, value in model.named_parameters()
            if value.is_floating_point()
        }
        for name, value in outputs.run(model, sample, moved).items():
            own[name] = max(own[name], _error(name, value, wanted[name], None).relative)
    return own


def _signs(like: Tensor, draw: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, like.shape, generator=draw) - 1).to(like)


def _error(name: str, got: Tensor, wanted: Tensor, tolerance: float | None) -> OutputError:
    rounding = ROUNDING.get(wanted.dtype, 0.0)
    got, wanted = got.cpu().double(), wanted.cpu().double()
    difference = (got - wanted).abs()
    rows = difference.flatten(0, -2) if difference.ndim > 1 else difference.unsqueeze(0)
    norm = wanted.norm().item()
    return OutputError(
        name,
        largest=difference.max().item(),
        relative=difference.norm().item() / norm if norm else difference.norm().item(),
        rows_off=(rows.amax(-1) > 10 * rounding * wanted.abs().max()).double().mean().item(),
        tolerance=rounding if tolerance is None else tolerance,
    )
