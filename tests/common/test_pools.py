"""Threads that work ahead, but not too far."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from smpo_fast.common.pools import map_ahead


def test_results_are_in_order_and_a_bounded_number_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(40):
            taken.append(i)
            yield i

    def slow_at_first(item: int) -> int:
        time.sleep(0.01 * (item < 3))
        return item * item

    results = map_ahead(slow_at_first, items(), 4, ahead=5)
    for i in range(40):
        assert next(results) == i * i
        assert len(taken) <= i + 6, "at most five results wait"
    assert list(results) == []


def test_an_error_comes_when_its_result_is_due_and_cancels_the_rest() -> None:
    begun = []

    def fail(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    results = map_ahead(fail, range(100), 1, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 10
