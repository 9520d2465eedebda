"""What a calibration found: settings with their error and time, the front of the best, and the choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastattn.autotune.measure import Timing
from fastattn.integrations.calibrate_spaces import Knobs
from fastattn.integrations.calibrate_store import LayerChoice


@dataclass(frozen=True)
class Row:
    """One setting of a method's knobs.

    error: relative error of the attention's output (norm of the difference to exact attention over the norm of that),
        mean over draws and layers. spread: its standard deviation over the draws.
    timing: of one layer's attention of the whole batch, forward. share: products of queries with keys, as a share of
        dense attention's. cosine: mean over the tokens of the model's last hidden state with this setting in every
        layer to what it is with dense attention; None where that was not measured.
    """

    knobs: Knobs
    error: float
    spread: float
    timing: Timing
    share: float
    cosine: float | None = None

    @property
    def time_us(self) -> float:
        return self.timing.median_us


@dataclass(frozen=True)
class Front:
    """All settings that were tried on some layers together.

    layers: indices of the attention layers, none for given q, k, v. rows: by time. choice: the fastest row within the
    error budget; None where no setting is. min_length: tokens from which the choice is faster than dense attention on
    this device; None where that is at no length up to the longest that was tried, or was not asked for.
    """

    layers: tuple[int, ...]
    rows: tuple[Row, ...]
    choice: Row | None
    min_length: int | None = None

    @property
    def best(self) -> list[Row]:
        """The rows that no other row beats in both error and time, by time."""
        return pareto(self.rows)


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`fastattn.calibrate`.

    method, max_error: as asked for. device: its name; threads: of a CPU. dtype: torch's name. shape: (batch, heads,
    length, head_dim). dense: time of dense attention on one layer's inputs, forward, measured in turn with the rows.
    fronts: one, or one a layer. longest: the longest input on which the choice was held against dense attention for
    ``min_length``; 0 where that was not asked for. cosine: as of a row, with the whole choice, layers without one being
    dense; None without a model or a choice. file: where the choice is stored, if it is.
    """

    method: str
    max_error: float
    device: str
    threads: int | None
    dtype: str
    shape: tuple[int, int, int, int]
    dense: Timing
    fronts: tuple[Front, ...]
    longest: int
    cosine: float | None = None
    file: Path | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """Of the one front. Raises ValueError where each layer has its own; see ``fronts``."""
        return self._one().rows

    @property
    def front(self) -> list[Row]:
        """The Pareto front of the rows, by time; where each layer has its own, see ``fronts``."""
        return self._one().best

    @property
    def choice(self) -> Row | None:
        """The fastest row within the budget, or None; where each layer has its own, see ``fronts``."""
        return self._one().choice

    @property
    def knobs(self) -> Knobs:
        """Those of the choice. Raises ValueError where no setting is within the budget, saying what the least error is;
        and where each layer has its own choice."""
        choice = self.choice
        if choice is None:
            raise ValueError(self.why_not())
        return dict(choice.knobs)

    @property
    def min_length(self) -> int | None:
        """Of the one front; where each layer has its own, see ``fronts``."""
        return self._one().min_length

    @property
    def has_choice(self) -> bool:
        """Whether a setting is within the budget; of some layer, where each has its own."""
        return any(front.choice for front in self.fronts)

    def layer_choices(self, layers: Sequence[int]) -> dict[int, LayerChoice]:
        """What each of a model's attention layers gets: ``layers`` all the same of a calibration on q, k and v."""
        return {
            layer: LayerChoice(
                knobs=None if front.choice is None else front.choice.knobs,
                min_length=front.min_length,
                error=None if front.choice is None else front.choice.error,
                time_us=None if front.choice is None else front.choice.time_us,
            )
            for front in self.fronts
            for layer in front.layers or layers
        }

    def why_not(self) -> str:
        """Why there is no choice, in words, with the least error that was reached; empty where there is one."""
        if self.has_choice:
            return ""
        least = min((row for front in self.fronts for row in front.rows), key=lambda row: row.error)
        return (
            f"no setting of {self.method!r} has an error of at most {self.max_error:g}: the least is "
            f"{least.error:.3f}, with {describe(least.knobs)}. Allow more, or try other knobs with grid="
        )

    def table(self) -> str:
        """Text: the settings by time, those on the front marked; or a line for each layer, where each has its own."""
        from fastattn.integrations.calibrate_table import table

        return table(self)

    def plot(self, path: str | Path) -> Path:
        """Draws error over time to ``path`` (.svg, .png, ...). Needs matplotlib: ``pip install fastattn[plot]``."""
        from fastattn.integrations.calibrate_plot import draw

        return draw(self, Path(path))

    def _one(self) -> Front:
        if len(self.fronts) != 1:
            raise ValueError("each layer has its own settings: see fronts")
        return self.fronts[0]


def pareto(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other beats in both error and time, by time."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.time_us, row.error)):
        if not best or row.error < best[-1].error:
            best.append(row)
    return best


def choose(rows: Sequence[Row], max_error: float) -> Row | None:
    """The fastest row whose error is at most ``max_error``; of equals, the one of least error."""
    within = [row for row in rows if row.error <= max_error]
    return min(within, key=lambda row: (row.time_us, row.error), default=None)


def describe(knobs: Knobs) -> str:
    return ", ".join(name if value is True else f"{name} {value}" for name, value in knobs.items())
