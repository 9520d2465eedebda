"""``fastattn export``: a Hugging Face model on disk, patched, to one .onnx file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from fastattn.export import CheckReport

# of the sample that is traced, and of the one that is compared: another batch and an odd length
TRACED, COMPARED = (2, 96), (3, 301)

console = Console()


def command(
    model_dir: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="Folder of a Hugging Face encoder (config and weights)."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")] = Path("model.onnx"),
    method: Annotated[str, typer.Option(help="Attention method.")] = "smyrf",
    knob: Annotated[
        list[str] | None, typer.Option(help="A knob of the method as name=value, e.g. n_hashes=4; may be repeated.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to patch, e.g. 0,1,5; all if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the method's random draws.")] = 0,
    opset: Annotated[int, typer.Option(help="Version of the standard ONNX ops.")] = 18,
    check: Annotated[bool, typer.Option("--check", help="Compare with torch in ONNX Runtime.")] = False,
) -> None:
    """Write a model with its attention made cheap as an ONNX file that runs in any ONNX Runtime."""
    from fastattn.export.convert import need_onnx

    try:
        need_onnx()
        knobs = _knobs(knob or [])
        chosen = None if layers is None else [int(layer) for layer in layers.split(",")]
        _export(model_dir, output, method, knobs, chosen, seed, opset, check)
    except (ImportError, TypeError, ValueError) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        raise typer.Exit(1) from error


def _export(
    model_dir: Path,
    output: Path,
    method: str,
    knobs: dict[str, Any],
    layers: list[int] | None,
    seed: int,
    opset: int,
    check: bool,
) -> None:
    import fastattn
    from fastattn import export

    with console.status(f"loading {model_dir}"):
        model = _load(model_dir)
    # a graph serves every length with one method
    fastattn.patch(model, method, layers=layers, seed=seed, min_length=0, **knobs)
    with console.status(f"exporting to {output}"):
        export.to_onnx(model, _sample(model, *TRACED, seed), output, opset=opset)
    console.print(f"wrote {output} ({output.stat().st_size / 2**20:.0f} MiB)", highlight=False)
    if not check:
        return
    with console.status("running it in ONNX Runtime"):
        report = export.check(model, output, _sample(model, *COMPARED, seed))
    _print_report(report)
    if not report.ok:
        raise typer.Exit(1)


def _load(model_dir: Path) -> Any:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install fastattn[transformers]") from error
    try:
        return AutoModel.from_pretrained(model_dir, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"can't load a model from {model_dir}: {error}") from error


def _sample(model: Any, batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """Random token sequences of ``length``, or as the model has positions, all but the first padded; or images."""
    import torch

    config = model.config
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"this command makes samples of text and images, and {type(model).__name__} takes {model.main_input_name}; "
            "use fastattn.export.to_onnx in Python"
        )
    # some models keep a few positions for themselves
    length = min(length, getattr(config, "max_position_embeddings", length) - 8)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length * row // batch :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _knobs(given: list[str]) -> dict[str, Any]:
    knobs: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise ValueError(f"a knob is name=value, e.g. n_hashes=4; got {text!r}")
        try:
            knobs[name] = int(value)
        except ValueError:
            knobs[name] = value
    return knobs


def _print_report(report: CheckReport) -> None:
    table = Table(title="ONNX Runtime against torch")
    for name in ("output", "largest error", "relative error", "rows off"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for error in report.errors:
        table.add_row(error.name, f"{error.largest:.1e}", f"{error.relative:.1e}", f"{error.rows_off:.1%}")
    console.print(table)
    if not report.ok:
        console.print(f"[red]a relative error is above {report.tolerance:.0e}[/red]", highlight=False)
