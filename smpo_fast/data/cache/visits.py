"""Which pairs a run visits: those that ``data.only_visited`` encodes."""

from __future__ import annotations

import numpy as np

from smpo_fast.config.schema import Config
from smpo_fast.data.pairs.order import Order
from smpo_fast.method.labels import weigh


def visited(config: Config, rewards: np.ndarray, labels: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Which of N pairs a run visits: ascending indices.

    rewards: float64 [N, 2], NaN without rewards.  labels: float64 [N], NaN without a human label.  shapes: int [N],
    the aspect-ratio bucket of each pair.
    """
    used = np.flatnonzero(weigh(config.labels, rewards, labels).used)
    order = Order(config.run.seed, shapes[used], config.drawn_per_step)
    return used[order.visited(config.run.steps * config.drawn_per_step)]
