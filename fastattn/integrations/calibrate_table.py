"""A calibration as text."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.integrations.calibrate_result import Calibration, Front, Row, describe


def table(calibration: Calibration) -> str:
    lines = [_head(calibration)]
    if len(calibration.fronts) == 1:
        lines += _rows(calibration, calibration.fronts[0])
    else:
        lines += _layers(calibration)
    return "\n".join(lines)


def _head(calibration: Calibration) -> str:
    batch, heads, length, head_dim = calibration.shape
    threads = "" if calibration.threads is None else f", threads: {calibration.threads}"
    return (
        f"{calibration.method} on {calibration.device}{threads}: batch {batch}, {heads} heads of {head_dim}, "
        f"{length} tokens, {calibration.dtype}; dense attention takes {_ms(calibration.dense.median_us)} ms a layer"
    )


def _rows(calibration: Calibration, front: Front) -> list[str]:
    best = front.best
    with_cosine = any(row.cosine is not None for row in front.rows)
    names = list(dict.fromkeys(name for row in front.rows for name in row.knobs))
    head = ["", *names, "error", "ms", "x dense", "keys"] + ["cosine"] * with_cosine
    cells = [head]
    for row in front.rows:
        mark = "chosen" if row == front.choice else "front" if row in best else ""
        knobs = [_knob(row.knobs.get(name)) for name in names]
        cells.append([mark, *knobs, *_figures(calibration, row), *[_cosine(row)] * with_cosine])
    said = [] if front.choice is not None else [calibration.why_not()]
    return [*_aligned(cells), *said]


def _layers(calibration: Calibration) -> list[str]:
    cells = [["layer", "knobs", "error", "ms", "x dense", "keys", "from tokens"]]
    for front in calibration.fronts:
        layer = ", ".join(map(str, front.layers))
        if front.choice is None:
            least = min(row.error for row in front.rows)
            cells.append([layer, "dense", f"(least {least:.3f})", _ms(calibration.dense.median_us), "1.00", "1.00", ""])
            continue
        start = "-" if front.min_length is None else str(front.min_length)
        cells.append([layer, describe(front.choice.knobs), *_figures(calibration, front.choice), start])
    return _aligned(cells)


def _figures(calibration: Calibration, row: Row) -> list[str]:
    spread = f" ± {row.spread:.3f}" if row.spread else ""
    against = row.time_us / calibration.dense.median_us
    return [f"{row.error:.3f}{spread}", _ms(row.time_us), f"{against:.2f}", f"{row.share:.2f}"]


def _knob(value: object) -> str:
    return "" if value is None else "yes" if value is True else "no" if value is False else str(value)


def _cosine(row: Row) -> str:
    return "" if row.cosine is None else f"{row.cosine:.3f}"


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}"


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
