"""``fastattn inspect``: what is in an .onnx file of ours, and what of it would run fused here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.export import FileReport
    from fastattn.export.inspect_file import NodeReport

FORMS = {
    "function": "a node with a body of standard ops",
    "inlined": "its body, written out in standard ops",
    "bare": "a node without a body: the library must be there",
}

console = Console(highlight=False)


def command(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The .onnx file.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts.")] = False,
) -> None:
    """Show the nodes of ours in an ONNX file, their settings, and which of them kernels would run on this machine."""
    from fastattn import export

    try:
        report = export.inspect(path)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in (*_of_file(report), *_of_nodes(report)):
        table.add_row(name, escape(value))
    console.print(table)


def _of_file(report: FileReport) -> Iterator[tuple[str, str]]:
    yield "written by", "unknown" if report.version is None else f"fastattn {report.version}"
    if report.method is not None:
        yield "method", f"{report.method}, {_settings(report.knobs or {})}"
    yield "standard ops", f"opset {report.opset}"
    yield "functions", ", ".join(report.functions) or "none"
    yield "size", _mebibytes(report.bytes)
    for name, size in report.weights.items():
        yield "weights", f"{name}, missing" if size is None else f"{_mebibytes(size)} of it in {name}"


def _of_nodes(report: FileReport) -> Iterator[tuple[str, str]]:
    """Nodes that are alike are told of once."""
    alike: dict[str, list[NodeReport]] = {}
    for node in report.nodes:
        alike.setdefault(repr(replace(node, name="", module=None)), []).append(node)
    for nodes in alike.values():
        node = nodes[0]
        yield f"{len(nodes)} x", node.op
        yield "  where", " ... ".join(dict.fromkeys(_where(end) for end in (nodes[0], nodes[-1])))
        yield "  heads", _sizes(node.heads, node.kv_heads)
        yield "  head dim", f"{_sizes(node.head_dim, node.value_dim)}, {node.dtype or 'dtype not known'}"
        yield "  settings", _settings(node.settings)
        yield "  form", FORMS[node.form]
        yield "  fused here", _fused(node, report.no_library)


def _fused(node: NodeReport, no_library: str | None) -> str:
    if node.form == "inlined":
        return "nothing: only nodes can be"
    if no_library is not None:
        return f"nothing: {no_library}"
    return ", ".join(node.fused) or "nothing: the library has no such op"


def _where(node: NodeReport) -> str:
    return node.module or node.name


def _sizes(of_queries: int | None, of_values: int | None) -> str:
    """One number where both are the same."""
    said = dict.fromkeys("not known" if size is None else str(size) for size in (of_queries, of_values))
    return ", of values ".join(said)


def _settings(settings: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
