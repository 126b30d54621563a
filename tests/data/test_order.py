"""The order in which a run visits pairs of several shapes."""

from __future__ import annotations

import numpy as np

from smpo_fast.data.pairs.order import Order


def test_runs_of_one_shape_are_shuffled_among_each_other() -> None:
    """Without it a run would see all pairs of one aspect ratio, then all of the next."""
    shapes = np.repeat([0, 1, 2], [160, 160, 160])
    order = Order(3, shapes, pairs_per_step=8)
    visits = order.at(np.arange(2 * len(order))).reshape(2, -1, order.run)
    for epoch in visits:
        runs = shapes[epoch]
        assert (runs == runs[:, :1]).all()  # one shape in a run
        changes = np.count_nonzero(np.diff(runs[:, 0]))
        assert changes > 20  # of 59; two thirds on average, and 2 if the runs were in the order of the buckets
    assert (shapes[visits[0][:, 0]] != shapes[visits[1][:, 0]]).any()


def test_buckets_of_one_size_are_shuffled_differently() -> None:
    order = Order(3, np.repeat([0, 1], 64), pairs_per_step=8)
    runs = np.sort(order.at(np.arange(len(order))).reshape(-1, order.run), axis=1)
    first, second = ({tuple(run % 64) for run in runs if run[0] // 64 == bucket} for bucket in (0, 1))
    assert len(first) == len(second) == 8 and not first & second
