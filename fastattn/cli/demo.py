"""``fastattn demo``: the whole of fastattn on a real model and real texts, in about a minute."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.cli._minilm import Halves
    from fastattn.cli._quality import Score

SETTINGS = ((1, 64), (2, 64), (4, 64), (4, 128))  # (rounds, cluster size)

TUNED = "block_attention_forward"
TUNING_SECONDS = 4.0

console = Console()


def command(
    seeds: Annotated[int, typer.Option(min=1, help="Random draws that every SMYRF setting is averaged over.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Keep the ONNX file here.")] = None,
) -> None:
    """Make a real model's attention cheap: quality, speed, memory, tuning, and one ONNX file."""
    from fastattn.cli._minilm import MissingPart

    start = time.perf_counter()
    try:
        _where_kernels_run()
        model = _quality(seeds)
        _sequences()
        _tuning()
        _export(model, output)
    except MissingPart as missing:
        console.print(f"[red]{missing}[/red]")
        raise typer.Exit(1) from missing
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")


def _where_kernels_run() -> None:
    import torch

    from fastattn.cli.doctor import engine_problem
    from fastattn.kernels.cpu.machine import model_name

    with _progress("building a first kernel", 1) as step:
        problem = engine_problem()
        step()
    where = f"{model_name()}, {torch.get_num_threads()} threads, fp32"
    if problem is None:
        console.print(f"{where}; Triton kernels, compiled for this CPU")
    else:
        console.print(f"{where}; [yellow]no kernels here, references in plain PyTorch run instead[/yellow]: {problem}")
        warnings.filterwarnings("ignore", message="fastattn runs")  # that has just been said


def _quality(seeds: int) -> Any:
    """Prints the table of embeddings and returns the model, dense."""
    import fastattn
    from fastattn.cli._minilm import load, long_texts
    from fastattn.cli._quality import Score, embed_batch, judge, steps, uniform_attention

    with _progress("loading all-MiniLM-L6-v2", 1) as step:
        model, tokenizer = load()
        texts = long_texts(tokenizer)
        step()

    smyrf = {(rounds, size): Score() for rounds, size in SETTINGS}
    dense_score, uniform_score = Score(), Score()
    total = 2 * steps(texts, 1) + len(SETTINGS) * steps(texts, seeds)
    with _progress(f"embedding {len(texts.names)} texts, many ways", total) as step:
        embed_batch(model, texts.first[:1])  # the first run is slower than others
        dense = judge(model, texts, dense_score, None, step)
        with uniform_attention(model):
            judge(model, texts, uniform_score, dense, step)
        for seed in range(seeds):
            for (rounds, size), score in smyrf.items():
                knobs = {"n_hashes": rounds, "q_cluster_size": size}
                with fastattn.patched(model, "smyrf", min_length=0, seed=seed, **knobs):
                    judge(model, texts, score, dense, step)
    rows = [
        ("dense", dense_score),
        *((f"SMYRF {rounds} x {size}", score) for (rounds, size), score in smyrf.items()),
        ("uniform: the floor", uniform_score),
    ]
    _print_quality(texts, rows, seeds)
    return model


def _print_quality(texts: Halves, rows: Sequence[tuple[str, Score]], seeds: int) -> None:
    from fastattn.cli._quality import COSINE_TEXTS

    count, length = texts.first.shape
    table = Table(title=f"all-MiniLM-L6-v2, not retrained: {count} texts of Python's help, halves of {length} tokens")
    table.add_column("attention")
    table.add_column("cosine to dense", justify="right")
    table.add_column("recall@1", justify="right")
    table.add_column("ms a text", justify="right")
    for name, score in rows:
        table.add_row(name, _mean_sd(score.cosine), f"{score.recall:.3f}", f"{1e3 * score.seconds:.0f}")
    console.print(table)
    recall = rows[0][1].recall
    error = (recall * (1 - recall) / count) ** 0.5
    _note(
        f"SMYRF: rounds x cluster size. Cosine: {min(count, COSINE_TEXTS)} first halves, mean ± sd over {seeds} seeds. "
        "recall@1: how often a first half finds "
        f"its own second half (chance {1 / count:.2f}; standard error of the dense figure {error:.2f}). Time: the "
        "whole model; by default fastattn.patch leaves inputs this short dense."
    )


def _sequences() -> None:
    from fastattn.cli._sequence import CLUSTER, HEAD_DIM, HEADS, LENGTHS, N_HASHES, STEPS, compare

    with _progress("one long sequence", STEPS) as step:
        rows = [compare(length, step) for length in LENGTHS]
    table = Table(
        title=f"One sequence, forward, B=1, H={HEADS}, D={HEAD_DIM}: SMYRF {N_HASHES} x {CLUSTER} and torch SDPA"
    )
    for name in ("tokens", "SDPA ms", "SMYRF ms", "faster", "SDPA extra memory", "SMYRF extra memory"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.length:,}",
            f"{1e3 * row.dense_seconds:.1f}",
            f"{1e3 * row.smyrf_seconds:.1f}",
            f"{row.dense_seconds / row.smyrf_seconds:.1f}x",
            _mebibytes(row.dense_memory),
            _mebibytes(row.smyrf_memory),
        )
    console.print(table)
    _note("Memory: rise of the process's resident set at its peak, the result included, the inputs not.")


def _tuning() -> None:
    """Measures a few block sizes on this CPU for the sequences above; what it finds stays for later runs."""
    from fastattn.cli._sequence import CLUSTER, HEAD_DIM
    from fastattn.cli.tune import print_outcomes, tune_kernels
    from fastattn.kernels.errors import Unsupported

    options = {"head_dims": [HEAD_DIM], "cluster_size": [CLUSTER], "device": "cpu", "plain": True}
    try:
        outcomes = tune_kernels(TUNED, TUNING_SECONDS, console=console, **options).outcomes
    except Unsupported as error:
        console.print(f"[yellow]nothing to tune[/yellow]: {error}")
        return
    print_outcomes(outcomes, console)
    _note("Kept in the cache, where calls look it up; fastattn tune goes on from there.")


def _export(model: Any, output: Path | None) -> None:
    """Takes the patched model to ONNX and compares it there, on a batch and a length that the export did not see."""
    import tempfile

    import torch

    import fastattn
    from fastattn import export

    rounds, size = SETTINGS[2]
    draw = torch.Generator().manual_seed(0)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, model.config.vocab_size, (batch, length), generator=draw)
        mask = torch.arange(length) < torch.linspace(length // 2, length, batch)[:, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    with (
        tempfile.TemporaryDirectory() as folder,
        fastattn.patched(model, "smyrf", min_length=0, seed=0, n_hashes=rounds, q_cluster_size=size),
    ):
        path = output or Path(folder) / "minilm.onnx"
        with _progress("exporting to ONNX, and checking it in ONNX Runtime", 2) as step:
            export.to_onnx(model, inputs(2, 256), path)
            step()
            report = export.check(model, path, inputs(3, 400))
            step()
        size_mb = sum(file.stat().st_size for file in path.parent.glob(path.name + "*")) / 1e6
        console.print(f"ONNX: {size_mb:.0f} MB, in plain ONNX Runtime on 3 padded texts of up to 400 tokens: {report}")
        if output is not None:
            console.print(f"Kept as {output}")
        if not report.ok:
            console.print("[red]The file does not compute what the model does.[/red]")
            raise typer.Exit(1)


def _note(text: str) -> None:
    console.print(f"[dim]{text}[/dim]\n")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar that goes away when its work is done; the block calls what it is given once a step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _mean_sd(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _mebibytes(size: int | None) -> str:
    return "not known here" if size is None else f"{size / 2**20:.0f} MiB"
