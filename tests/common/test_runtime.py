"""Random numbers that are functions of what they are for."""

from __future__ import annotations

from smpo_fast.common.runtime import rng, uniform


def test_random_numbers_depend_on_every_key_and_on_nothing_else() -> None:
    keys = [(0, "a", 1, 23), (0, "a", 12, 3), (0, "a", 123), (0, "a", 3, 12), (1, "a", 1, 23), (0, "b", 1, 23)]
    draws = [rng(seed, purpose, *more).random() for seed, purpose, *more in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [uniform(seed, purpose, *more) for seed, purpose, *more in keys]
