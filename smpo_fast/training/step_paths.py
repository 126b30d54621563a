"""The noise paths of an optimizer step, and how they are divided among ranks and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from smpo_fast.common.runtime import World
from smpo_fast.method import inversion
from smpo_fast.method.schedule import NoisePath


class StepPaths:
    """The noise paths of all pairs of a step, on all ranks, deepest first.

    places: the places of pairs among this rank's pairs of the step (``Pairs.places``).
    """

    def __init__(self, paths: Sequence[NoisePath], world: World) -> None:
        self._paths, self._world = paths, world

    def of(self, places: Sequence[int]) -> list[NoisePath]:
        """The paths of this rank's pairs at some places."""
        return self._of_rank(self._world.rank, places)

    def pairs_per_round(self, places: Sequence[int]) -> list[int]:
        """How many pairs each round of the inversion must pass through the network: as many as on any rank.

        Sharded weights are gathered in every network call, so all ranks must make equally many of them.
        """
        by_rank = (inversion.active_counts(self._of_rank(rank, places)) for rank in range(self._world.size))
        return [max(counts) for counts in zip_longest(*by_rank, fillvalue=0)]

    def _of_rank(self, rank: int, places: Sequence[int]) -> list[NoisePath]:
        return [self._paths[rank + self._world.size * place] for place in places]
