"""In which order candidates are measured: the likeliest, then those near the best so far, until none is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from fastattn.autotune.schema import MEASURED, WRONG, Row, best
from fastattn.kernels.config import Config


class Climb:
    """What to measure next of ``candidates``, which come the likeliest first.

    known: rows of earlier runs. predict: the time that a model gives a candidate; None where there is none, then the
    order of the candidates stands for it. is_full: every candidate is wanted, not only a local optimum.
    """

    def __init__(
        self,
        candidates: list[Config],
        known: Iterable[Row] = (),
        predict: Callable[[Config], float] | None = None,
        is_full: bool = False,
    ) -> None:
        known = [row for row in known if row.label == MEASURED and not row.config.model_extra]
        wrong = {row.launch_config() for row in known if row.verdict == WRONG}
        leader = best(known, MEASURED)
        self._tried = {row.launch_config() for row in known}
        self._candidates = [config for config in candidates if config not in wrong]
        in_order = self._candidates
        # the default in any case, the best of earlier runs, and the best that is modelled
        first = candidates[:1]
        first += [config for config in self._candidates if leader and config == leader.launch_config()]
        if predict is not None:
            in_order = sorted(self._candidates, key=predict)  # of equals, the likelier stays first
            first += in_order[:1]
        self._rank = {config: i for i, config in enumerate(in_order)}
        self._first = list(dict.fromkeys(first))
        self._is_full = is_full

    def left(self, times: Mapping[Config, float]) -> list[Config]:
        """Those that come next where those in ``times`` were measured (infinity: it failed), as far as can be told: the
        likeliest first, what no run has tried before what one has. None at the end."""
        first = [config for config in self._first if config not in times]
        near = [config for config in self._candidates if times.get(config, 0.0) < float("inf")]
        sound = [config for config in near if config in times]
        if sound and not self._is_full:
            near = neighbours(min(sound, key=times.__getitem__), near)
        rest = [config for config in near if config not in times and config not in first]
        return first + sorted(rest, key=lambda config: (config in self._tried, self._rank[config]))


def neighbours(config: Config, candidates: Iterable[Config]) -> list[Config]:
    """Those of ``candidates`` that differ from ``config`` in one number, as little as any of them does in that
    direction: one doubling in a whole space."""
    own = _numbers(config)
    nearest: dict[tuple[str, bool], tuple[int, Config]] = {}
    for other in candidates:
        theirs = _numbers(other)
        apart = [name for name in own if own[name] != theirs[name]]
        if len(apart) == 1:
            distance = theirs[apart[0]] - own[apart[0]]
            side = (apart[0], distance > 0)
            if side not in nearest or abs(distance) < nearest[side][0]:
                nearest[side] = (abs(distance), other)
    return [other for _, other in nearest.values()]


def _numbers(config: Config) -> dict[str, int]:
    return config.blocks | {"warps": config.num_warps, "stages": config.num_stages, "ctas": config.num_ctas}
