"""Sessions of ONNX Runtime with our kernels in the place of the bodies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastattn.export.ort import cubins, needs
from fastattn.export.ort.library import build_library
from fastattn.kernels.cpu import machine

if TYPE_CHECKING:
    import onnxruntime

LIBRARY = "libfastattn_ort.so"


def custom_ops_library(
    model: str | Path | None = None,
    *,
    head_dims: Sequence[int] = (64,),
    dtypes: Sequence[str] = ("fp32",),
    levels: Sequence[str] | None = None,
    cuda: Sequence[str] = (),
    output: str | Path | None = None,
    on_built: Callable[[str], object] | None = None,
) -> Path:
    """The path of ``libfastattn_ort``, for ``SessionOptions.register_custom_ops_library``.

    It is built on first use, kernel by kernel, about a second each, and kept in the user's cache.

    model: a file of :func:`fastattn.export.to_onnx`; the library then has exactly what this model's nodes run. None:
        every op as its method's defaults have it, for each of ``head_dims``, which are also the dims of values, and of
        ``dtypes``, "fp32" or "fp16".
    levels: instruction sets of the machines that load it, among those of ``fastattn doctor``; each runs the best that
        it has. None is the best of this machine.
    cuda: architectures of NVIDIA GPUs, such as "sm_90", which need not be here: kernels take 1 to 15 s each. With any,
        the library is for sessions on these GPUs, and has only what they run, for the CPU too; ONNX Runtime runs the
        bodies of the other nodes there, where it would take them to the CPU if the library had them for that alone.
    output: a folder that gets a copy, ``libfastattn_ort.so``, which needs neither Python nor a compiler.
    on_built: is told of each object that had to be compiled.

    Raises ValueError for a model without a node of ours and for dims, dtypes, levels or GPUs that there are not;
    :class:`~fastattn.kernels.errors.Unsupported` where nothing can be built.
    """
    chosen = machine.supported_levels()[:1] if levels is None else _levels(levels)
    if model is not None:
        from fastattn.export.ort.model import calls

        wanted = calls(model)
    else:
        wanted = needs.every_call(head_dims, dtypes)
    targets = [cubins.target_of(name) for name in cuda]
    wanted = [call for call in wanted if not targets or call.op in needs.GPU_OPS]
    of_gpus = {target: needs.variants(wanted, target) for target in dict.fromkeys(targets)}
    path = build_library(needs.variants(wanted), chosen, of_gpus, on_built)
    if output is None:
        return path
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    # put there at once: a process that has the old one loaded keeps it
    staged = folder / f"{LIBRARY}.{os.getpid()}"
    shutil.copy(path, staged)
    return staged.replace(folder / LIBRARY)


def _levels(names: Sequence[str]) -> list[machine.Level]:
    known = {level.name: level for level in machine.LEVELS}
    if not names or (unknown := [name for name in names if name not in known]):
        raise ValueError(f"level must be some of {', '.join(known)}, got {', '.join(unknown) if names else 'none'}")
    return [level for level in machine.LEVELS if level.name in names]  # best first


def session(
    path: str | Path,
    *,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    options: onnxruntime.SessionOptions | None = None,
    cuda: Sequence[str] | None = None,
) -> onnxruntime.InferenceSession:
    """An ``onnxruntime.InferenceSession`` of a file of :func:`fastattn.export.to_onnx`, on fused kernels.

    Results are those of the plain session but for rounding, and for rows whose hashes are nearly equal (see
    :func:`fastattn.export.check`). What the model's nodes need is compiled first, a handful of kernels, unless the
    cache has it.

    path: of the file. providers: ONNX Runtime's execution providers. options: more of the session's options; the
        library must not be registered in them yet. cuda: architectures of the GPUs, as in :func:`custom_ops_library`;
        None is this machine's, as torch sees them, if CUDAExecutionProvider is among the providers.

    Raises ImportError without the onnx extra, ValueError where torch sees no GPU to build for, and what
    :func:`custom_ops_library` does.
    """
    from fastattn.export.convert import need_onnx

    need_onnx()
    import onnxruntime

    chosen: Any = onnxruntime.SessionOptions() if options is None else options
    cuda = _architectures(providers) if cuda is None else cuda
    chosen.register_custom_ops_library(str(custom_ops_library(path, cuda=cuda)))
    return onnxruntime.InferenceSession(str(path), chosen, providers=list(providers))


def _architectures(providers: Sequence[Any]) -> list[str]:
    """Of this machine's GPUs, if a session is to run there."""
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    if "CUDAExecutionProvider" not in names:
        return []
    capabilities = {torch.cuda.get_device_capability(at) for at in range(torch.cuda.device_count())}
    if not capabilities:
        raise ValueError("cuda must say for which GPUs, such as ('sm_90',): torch sees none on this machine")
    return sorted(f"sm_{major}{minor}" for major, minor in capabilities)
