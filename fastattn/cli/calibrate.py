"""``fastattn calibrate``: which knobs of a method suit a model on this device, and how much error they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fastattn.cli import _knobs

if TYPE_CHECKING:
    from torch import Tensor

MINILM = "minilm"  # the demo's model, from its package


def command(
    model: Annotated[
        str, typer.Argument(help=f"Folder of a Hugging Face encoder; {MINILM}: the demo's all-MiniLM-L6-v2.")
    ] = MINILM,
    method: Annotated[str, typer.Option(help="smyrf, clustered or improved_clustered.")] = "smyrf",
    max_error: Annotated[
        float, typer.Option(help="Budget: relative error of the attention's output, mean over draws and layers.")
    ] = 0.3,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text to calibrate on. Default: Python's own help topics."),
    ] = None,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a sequence, at most the model's positions.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 2,
    knob: Annotated[
        list[str] | None,
        typer.Option(help="Values of a knob to try, e.g. n_hashes=2,4; repeated, all combinations."),
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Each layer gets its own knobs.")] = False,
    device: Annotated[str, typer.Option(help="As torch names it.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    draws: Annotated[int, typer.Option(min=1, help="Random draws that an error is a mean over.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    seconds: Annotated[float, typer.Option(help="For timing all settings together.")] = 10.0,
    longest: Annotated[
        int, typer.Option(min=0, help="Tokens up to which a length is sought from which it pays off; 0: none is.")
    ] = 16384,
    plot: Annotated[Path | None, typer.Option(help="Draw error over time to this file (.svg, .png).")] = None,
    store: Annotated[bool, typer.Option(help="Keep the choice for patch(model, method, knobs='calibrated').")] = True,
) -> None:
    """Measure a method's error and time on a model's own attention, and keep the fastest knobs within a budget."""
    import torch

    from fastattn import calibrate
    from fastattn.cli._minilm import MissingPart
    from fastattn.cli.tune import DTYPES

    console = Console(highlight=False, soft_wrap=True)
    try:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        grid = {name: values for name, values in map(_values, knob or [])} or None
        with console.status("loading the model") as status:
            loaded, tokenizer = _load(model)
            loaded = loaded.to(torch.device(device), getattr(torch, DTYPES[dtype]))
            sample = {"input_ids": tokens(loaded, tokenizer, text, batch, length).to(loaded.device)}
            found = calibrate(
                loaded, method, max_error=max_error, batch=sample, per_layer=per_layer, grid=grid, draws=draws,
                seed=seed, seconds=seconds, longest=longest, store=store,
                on_progress=lambda said: status.update(escape(said)),
            )  # fmt: skip
            if plot is not None:
                found.plot(plot)
    except (ImportError, IndexError, MissingPart, OSError, RuntimeError, TypeError, ValueError) as error:
        console.print(f"[red]not calibrated:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
    console.print(escape(found.table()))
    if plot is not None:
        console.print(f"drawn in {plot}")
    if not found.has_choice:
        raise typer.Exit(1)
    console.print(*_said(found), sep="\n")


def _said(found: Any) -> list[str]:
    lines = []
    if len(found.fronts) == 1 and found.longest:
        start = found.min_length
        lines.append(
            f"slower than dense attention at all lengths up to {found.longest}"
            if start is None
            else f"faster than dense attention from {start} tokens on"
        )
    if found.cosine is not None:
        lines.append(f"cosine of the model's last hidden states to those with dense attention: {found.cosine:.3f}")
    if found.file is not None:
        lines.append(f'stored in {found.file}; fastattn.patch(model, "{found.method}", knobs="calibrated") uses it')
    return lines


def tokens(model: Any, tokenizer: Any, text: Path | None, batch: int, length: int) -> Tensor:
    """Token ids (batch, length), without padding: consecutive pieces of the text, between the tokenizer's own marks.

    Without a text: of Python's own help topics, each topic giving one piece. Raises ValueError where the model has
    fewer positions, or the text fewer tokens.
    """
    import torch

    positions = getattr(model.config, "max_position_embeddings", length)
    if length > positions:
        raise ValueError(f"length must be at most the model's {positions} positions, got {length}")
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer has no fast form, which cuts texts; use fastattn.calibrate in Python")
    if text is None:
        from pydoc_data.topics import topics

        texts, most = list(topics.values()), 1
    else:
        texts, most = [text.read_text(encoding="utf-8")], batch
    pieces: list[list[int]] = []
    for part in texts:
        cut = tokenizer(part, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        pieces += [ids for ids in cut if len(ids) == length][:most]
        if len(pieces) >= batch:
            return torch.tensor(pieces[:batch])
    where = "Python's help topics have" if text is None else f"{text} has"
    raise ValueError(f"{where} {len(pieces)} pieces of {length} tokens, and batch is {batch}")


def _load(model: str) -> tuple[Any, Any]:
    from fastattn.cli import _minilm

    if model == MINILM:
        return _minilm.load()
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"model must be a folder or {MINILM!r}, got {model!r}")
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("loading a model needs transformers: pip install fastattn[transformers]") from error
    logging.set_verbosity_error()  # a pooling layer without weights changes no attention
    logging.disable_progress_bar()
    try:
        loaded = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa").eval()
        return loaded, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't load a model with its tokenizer from {folder}: {error}") from error


def _values(text: str) -> tuple[str, list[Any]]:
    """A knob and its values, from ``name=a,b``."""
    name, values = _knobs.pair(text, "name=value,value, e.g. n_hashes=2,4")
    return name, [_knobs.value(part.strip()) for part in values.split(",")]
