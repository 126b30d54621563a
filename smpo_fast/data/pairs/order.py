"""The order in which a run visits the pairs: a pure function of the seed and the position in the run.

A run visits positions 0, 1, 2, ... If all pairs have one shape, position ``v`` is pair
``permutation(seed, v // N)[v % N]``. If they are in aspect-ratio buckets of several shapes, an epoch consists of
runs of G = gcd(pairs_per_step, 64) pairs of one shape: each bucket is shuffled and cut into runs, its last run is
filled up from the bucket's beginning, and the runs are shuffled. A step batch thus contains few shapes, in groups that
any number of ranks that divides G can share evenly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import rng

LONGEST_RUN = 64


class Order:
    """The order in which a run visits N pairs. shapes: int [N], a number for the shape of each pair.

    Raises ConfigError if there are fewer pairs than a step draws.
    """

    def __init__(self, seed: int, shapes: np.ndarray, pairs_per_step: int) -> None:
        if len(shapes) < pairs_per_step:
            raise ConfigError(
                f"a step draws {pairs_per_step} pairs (batch.pairs_per_step), but only {len(shapes)} can be used: "
                "lower it, or add pairs"
            )
        self.seed, self.pairs = seed, len(shapes)
        kinds = np.unique(shapes)
        self.run = math.gcd(pairs_per_step, LONGEST_RUN) if len(kinds) > 1 else 1
        self._buckets = [np.flatnonzero(shapes == kind) for kind in kinds]
        self._length = sum(-(-len(bucket) // self.run) * self.run for bucket in self._buckets)
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def __len__(self) -> int:
        """Positions in an epoch."""
        return self._length

    @property
    def repeats(self) -> int:
        """Positions of an epoch that fill up runs: second visits of a pair within the epoch."""
        return self._length - self.pairs

    def at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """The pairs at some positions. positions: int [n].  Returns int64 [n], each 0 .. N-1."""
        where = np.asarray(positions, dtype=np.int64)
        found = np.empty(len(where), np.int64)
        for epoch in np.unique(where // self._length):
            here = where // self._length == epoch
            found[here] = self._epoch(int(epoch))[where[here] % self._length]
        return found

    def visited(self, positions: int) -> np.ndarray:
        """The distinct pairs at positions 0 .. ``positions``-1, ascending."""
        return np.arange(self.pairs) if positions >= self._length else np.unique(self.at(np.arange(positions)))

    def _draw(self, epoch: int) -> np.ndarray:
        if len(self._buckets) == 1:
            return rng(self.seed, "order", epoch).permutation(self.pairs)
        runs = []
        for number, bucket in enumerate(self._buckets):
            shuffled = bucket[rng(self.seed, "order", epoch, number).permutation(len(bucket))]
            runs.append(np.resize(shuffled, (-(-len(bucket) // self.run), self.run)))
        table = np.concatenate(runs)
        return table[rng(self.seed, "runs", epoch).permutation(len(table))].ravel()
