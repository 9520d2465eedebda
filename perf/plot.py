"""Time and extra memory over the length, drawn from a machine's JSON files: ``python -m perf plot``.

Both axes are logarithmic: what grows linearly with N rises by one decade a decade, as the grey line does, dense
attention's time by two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastattn.integrations.calibrate_plot import pyplot
from perf.versus import PASSES

Series = dict[int, float]  # by length


def draw_all(results: Path) -> Iterator[Path]:
    """Draws time.svg and memory.svg for every machine below ``results`` that has figures; yields their paths."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        measured = _read(folder)
        if measured:
            yield _draw(measured, "milliseconds", folder / "time.svg", lambda x: x["timing"]["median_us"] / 1e3)
            yield _draw(measured, "MB", folder / "memory.svg", lambda x: (x["memory"] or 0) / 1e6)


def _read(folder: Path) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    """The calls that the rows are about by name, pass and length. What several benches measured is taken once."""
    measured: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text())["rows"]:
            for call in row.get("behind", ()):
                measured.setdefault((call["call"], call["which"], call["length"]), call)
    return measured


def series(measured: Mapping[tuple[str, str, int], Any], which: str, value: Any) -> dict[str, Series]:
    """For one pass: name -> length -> value, without what is not known (0)."""
    found: dict[str, Series] = {}
    for (name, of_pass, length), call in sorted(measured.items()):
        if of_pass == which and value(call) > 0:
            found.setdefault(name, {})[length] = value(call)
    return found


def _draw(measured: Mapping[tuple[str, str, int], Any], unit: str, path: Path, value: Any) -> Path:
    plt = pyplot()
    figure, panels = plt.subplots(1, len(PASSES), figsize=(11, 5), sharey=True)
    styles = {name: index for index, name in enumerate(sorted({name for name, _, _ in measured}))}
    for panel, which in zip(panels, PASSES, strict=True):
        panel.set(xscale="log", yscale="log", title=which, xlabel="N")
        found = series(measured, which, value)
        for name, points in found.items():
            at = styles[name]
            panel.plot(
                list(points), list(points.values()), label=name, color=f"C{at % 10}", marker="osv^Dx"[at % 6],
                linestyle="-" if at < 10 else "--", markersize=4,
            )  # fmt: skip
        lengths = sorted({length for points in found.values() for length in points})
        if lengths:
            least = min(min(points.values()) for points in found.values())
            panel.plot(lengths, [least * n / lengths[0] for n in lengths], color="0.7", linewidth=4, zorder=0)
            panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(unit)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small", frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
