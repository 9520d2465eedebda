"""``fastattn export``: a patched model, to one .onnx file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastattn.cli import _export_model, _knobs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastattn.export import CheckReport, FileReport

# of the sample that is traced, and of those that are compared: other batches and lengths, an odd one among them
TRACED, COMPARED = (2, 96), ((3, 301), (1, 64))
METHOD = "smyrf"

console = Console()


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a Hugging Face model (config and weights); minilm: the demo's all-MiniLM-L6-v2; or "
            "module:function, which returns a model, a model and a sample, or these and the sample's free sizes."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")] = Path("model.onnx"),
    method: Annotated[
        str | None,
        typer.Option(
            help=f"smyrf, clustered or improved_clustered. Default: {METHOD}, or what a function has patched."
        ),
    ] = None,
    knob: Annotated[
        list[str] | None, typer.Option(help="A knob of the method as name=value, e.g. n_hashes=4; may be repeated.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to patch, e.g. 0,1,5; all if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32 or fp16; the model's own if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the method's random draws.")] = 0,
    opset: Annotated[int, typer.Option(help="Version of the standard ONNX ops.")] = 18,
    portable: Annotated[
        bool, typer.Option("--portable", help="Standard ops alone: no functions, and no kernels of ours.")
    ] = False,
    external_data: Annotated[
        bool | None, typer.Option(help="Weights in a file of their own; if not given, those above 2 GB.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with torch in ONNX Runtime.")] = False,
) -> None:
    """Write a model with its attention made cheap as an ONNX file that runs in any ONNX Runtime."""
    from fastattn import export
    from fastattn.cli._minilm import MissingPart
    from fastattn.export.convert import need_onnx

    try:
        need_onnx()
        knobs = dict(_knob(text) for text in knob or [])
        chosen = None if layers is None else [int(layer) for layer in layers.split(",")]
        with console.status(f"loading {escape(model)}"):
            loaded = _export_model.load(model, dtype)
            own = loaded.sample
            settings = _patched(loaded.model, own is not None, method, knobs, chosen, seed)
            traced = _export_model.sample(loaded.model, *TRACED, seed) if own is None else own
        with console.status(f"exporting to {output}"):
            export.to_onnx(
                loaded.model, traced, output, opset=opset, portable=portable, external_data=external_data,
                dynamic_shapes=_export_model.free_sizes(traced) if own is None else loaded.shapes, metadata=settings,
            )  # fmt: skip
        written = export.inspect(output)
        _print_written(written)
        if check:
            others = [traced] if own else [_export_model.sample(loaded.model, *size, seed) for size in COMPARED]
            _check(loaded.model, written, others)
    except (ImportError, MissingPart, TypeError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False)
        raise typer.Exit(1) from error


def _knob(text: str) -> tuple[str, Any]:
    name, value = _knobs.pair(text, "name=value, e.g. n_hashes=4")
    return name, _knobs.value(value)


def _patched(
    model: nn.Module,
    has_sample: bool,
    method: str | None,
    knobs: dict[str, Any],
    layers: list[int] | None,
    seed: int,
) -> dict[str, Any]:
    """Patches ``model``, unless it came patched, or with a sample and no word of a method: then it calls our methods by
    itself. Returns method and knobs, where all layers have the same."""
    import fastattn
    from fastattn.integrations.transformers import layer_states

    came_patched = bool(layer_states(model))
    asked = {"--method": method is not None, "--knob": bool(knobs), "--layers": layers is not None}
    if named := ", ".join(name for name, is_given in asked.items() if is_given and came_patched):
        raise ValueError(f"the model is patched already, and {named} came as well")
    if not came_patched and (method is not None or knobs or layers is not None or not has_sample):
        # a graph serves every length with one method
        fastattn.patch(model, method or METHOD, layers=layers, seed=seed, min_length=0, **knobs)
    settings = [
        # impl is how torch computes, and nothing of the file's
        {"method": state.method, "knobs": {name: value for name, value in state.knobs.items() if name != "impl"}}
        for state in layer_states(model).values()
    ]
    return settings[0] if settings and all(each == settings[0] for each in settings) else {}


def _print_written(report: FileReport) -> None:
    ops = ", ".join(f"{count} {op}" for op, count in Counter(node.op for node in report.nodes).items())
    beside = "".join(f", weights in {name}" for name in report.weights)
    form = "" if report.functions else ", written out in standard ops"
    size = f"{report.bytes / 2**20:.1f} MiB{beside}"
    console.print(f"wrote {report.path} ({size}): {ops}{form}", highlight=False, soft_wrap=True)


def _check(model: nn.Module, written: FileReport, samples: list[dict[str, Tensor]]) -> None:
    """In plain ONNX Runtime and, where the file has something for them and they can be built, on our kernels."""
    from fastattn import export
    from fastattn.kernels.errors import Unsupported

    no_library = written.no_library
    with console.status("running it in ONNX Runtime") as status:
        reports = [("bodies", sample, export.check(model, written.path, sample)) for sample in samples]
        if any(node.fused for node in written.nodes):
            status.update("building kernels, and running it on them")
            try:
                fused = [export.check(model, written.path, sample, fused=True) for sample in samples]
                reports += [("kernels", sample, report) for sample, report in zip(samples, fused, strict=True)]
            except Unsupported as error:
                no_library = str(error)
    _print_reports(reports)
    if no_library is not None and written.functions:
        console.print(f"not run on kernels: {escape(no_library)}", highlight=False)
    if not all(report.ok for _, _, report in reports):
        raise typer.Exit(1)


def _print_reports(reports: list[tuple[str, dict[str, Tensor], CheckReport]]) -> None:
    errors = [error for _, _, report in reports for error in report.errors]
    is_torn = any(error.own is not None for error in errors)
    table = Table(title="ONNX Runtime against torch")
    for name in ("on", "inputs", "output"):
        table.add_column(name, no_wrap=name == "output")
    for name in ("largest", "relative", *(["own"] if is_torn else []), "rows\noff"):
        table.add_column(name, justify="right")
    for on, sample, report in reports:
        shape = " x ".join(map(str, next(iter(sample.values())).shape))
        for error in report.errors:
            own = [] if not is_torn else ["" if error.own is None else f"{error.own:.1e}"]
            numbers = (f"{error.largest:.1e}", f"{error.relative:.1e}", *own, f"{error.rows_off:.1%}")
            table.add_row(on, shape, error.name, *numbers)
    console.print(table)
    if is_torn:
        console.print(
            "[dim]own: torch's error against itself, as the last bit of each weight moves. An error of that order "
            "comes of tokens between two clusters, which either may have.[/dim]"
        )
    if not all(error.ok for error in errors):
        console.print("[red]the file does not compute what the model does[/red]", highlight=False)
