"""Greedy coordinate search: one group of settings after the other, keeping what is faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.tuning.bench import Rejected

Values = Mapping[str, object]
LEAST_GAIN = 0.01  # by which share a candidate must be faster


@dataclass(frozen=True)
class Coordinate:
    """Values of one or several settings that are tried from the current best settings on.

    options: given these settings, the values to try. rising: they need more and more memory, so that the first that
    cannot be used, or is no faster than the one before it, ends the coordinate. setup: seconds that trying one may take
    in addition to those of an eager candidate.
    """

    name: str
    options: Callable[[Config], Iterable[Values]]
    rising: bool = False
    setup: float = 0.0


def search(
    start: Config,
    coordinates: Sequence[Coordinate],
    cost: Callable[[Config, Values], float],
    skip: Callable[[Coordinate, Values], bool],
    gain: float = LEAST_GAIN,
) -> Config:
    """The settings with the lowest cost found, beginning at ``start``.

    cost: of settings that differ from the current best in these values; raises Rejected where they cannot be used.
    skip: whether to leave out an option, and all that follow in its coordinate. gain: by which share a candidate must
    be faster to be kept. Raises Rejected if ``start`` itself
    cannot be used.
    """
    best, lowest = start, cost(start, {})
    for coordinate in coordinates:
        before = math.inf
        for values in coordinate.options(best):
            candidate = loading.replaced(best, values)
            if skip(coordinate, values):
                break
            try:
                found = lowest if candidate == best else cost(candidate, values)
            except Rejected:
                found = math.inf
            if found < lowest * (1 - gain):
                best, lowest = candidate, found
            if coordinate.rising and found >= before * (1 - gain):
                break
            before = found
    return best
