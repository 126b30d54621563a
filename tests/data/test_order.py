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
