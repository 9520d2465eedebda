"""A calibration as a drawing: error over time, a line for the settings that differ in the first knob alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastattn.integrations.calibrate_result import Calibration, Front, Row, describe


def pyplot() -> Any:
    """matplotlib's, set up for files that are small and the same each time."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install fastattn[plot]") from error
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastattn"})
    from matplotlib import pyplot as plt

    return plt


def draw(calibration: Calibration, path: Path, *, title: str = "", with_budget: bool = True) -> Path:
    """Writes the drawing of all settings, or of each layer's front, to ``path``, whose suffix says the format.

    with_budget: a line for the budget, and a ring round each choice."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(8, 5))
    if len(calibration.fronts) == 1:
        _draw_settings(panel, calibration.fronts[0])
    else:
        for front in calibration.fronts:
            _draw_front(panel, front)
    dense = calibration.dense.median_us / 1e3
    panel.axvline(dense, color="0.4", linestyle="--", linewidth=1)
    panel.annotate(" dense", (dense, 0.98), xycoords=("data", "axes fraction"), va="top", color="0.4", fontsize=8)
    if with_budget:
        panel.axhline(calibration.max_error, color="0.4", linestyle=":", linewidth=1)
        for row in (front.choice for front in calibration.fronts if front.choice is not None):
            panel.plot([row.time_us / 1e3], [row.error], "o", markersize=12, fillstyle="none", color="black")
    batch, heads, length, head_dim = calibration.shape
    panel.set(xscale="log", yscale="log", ylabel="relative error of attention's output", title=title)
    panel.set_xlabel(f"ms ({batch} x {heads} heads of {head_dim}, {length} tokens)")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
        axis.set_tick_params(which="minor", labelsize=7)
    panel.grid(alpha=0.3, which="both")
    legend = {"fontsize": 8, "frameon": False, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    panel.legend(**legend, title=_first(calibration.fronts), title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def _draw_settings(panel: Any, front: Front) -> None:
    first = next(iter(front.rows[0].knobs))
    for index, (name, rows) in enumerate(_lines(front.rows, first).items()):
        times, errors = [row.time_us / 1e3 for row in rows], [row.error for row in rows]
        style = {"color": f"C{index % 10}", "marker": "os^vDx"[index // 10 % 6], "markersize": 4, "linewidth": 1}
        panel.plot(times, errors, label=name or first, **style)
        for row, time, error in zip(rows, times, errors, strict=True):
            panel.annotate(row.knobs[first], (time, error), xytext=(3, 3), textcoords="offset points", fontsize=7)
    panel.plot(
        [row.time_us / 1e3 for row in front.best], [row.error for row in front.best],
        color="0.8", linewidth=5, zorder=0, label="front",
    )  # fmt: skip


def _first(fronts: Sequence[Front]) -> str:
    return f"at the points: {next(iter(fronts[0].rows[0].knobs))}" if len(fronts) == 1 else ""


def _draw_front(panel: Any, front: Front) -> None:
    times, errors = [row.time_us / 1e3 for row in front.best], [row.error for row in front.best]
    panel.plot(times, errors, marker="o", markersize=3, label=f"layer {', '.join(map(str, front.layers))}")


def _lines(rows: Sequence[Row], first: str) -> dict[str, list[Row]]:
    """Rows by what they say of all knobs but ``first``, in words; each by the value of ``first``."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (len(row.knobs), *map(_order, list(row.knobs.values())[1:]))):
        lines.setdefault(describe({name: value for name, value in row.knobs.items() if name != first}), []).append(row)
    return {name: sorted(own, key=lambda row: _order(row.knobs[first])) for name, own in lines.items()}


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by size, then words."""
    return (True, str(value)) if value is None or isinstance(value, str) else (False, value)
