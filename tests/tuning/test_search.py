"""The search over settings, with costs from a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.planning import profiles
from smpo_fast.tuning.bench import Rejected
from smpo_fast.tuning.candidates import coordinates, without_given
from smpo_fast.tuning.search import Coordinate, Values, search


def sizes(*of: int) -> Callable[[Config], list[Values]]:
    return lambda best: [{"batch.micro_pairs": n} for n in of]


class Costs:
    """A cost function that records what it was asked."""

    def __init__(self, of: Callable[[Config], float | str]) -> None:
        self.of, self.asked = of, list[Any]()

    def __call__(self, settings: Config, values: Values) -> float:
        self.asked.append(dict(values))
        found = self.of(settings)
        if isinstance(found, str):
            raise Rejected(found)
        return found


def never(coordinate: Coordinate, values: Values) -> bool:
    return False


def test_each_coordinate_starts_from_the_best_of_those_before() -> None:
    def cost(c: Config) -> float:
        seconds = {1: 8.0, 2: 6.0, 4: 5.0}[c.batch.micro_pairs]
        return seconds - 2 * c.model.channels_last * (c.batch.micro_pairs == 4)

    memory_format = Coordinate("memory format", lambda best: [{"model.channels_last": True}])
    best = search(Config(), [Coordinate("micro", sizes(1, 2, 4)), memory_format], Costs(cost), never)
    assert best.batch.micro_pairs == 4
    assert best.model.channels_last


def test_a_rising_coordinate_ends_where_nothing_is_gained_or_nothing_fits() -> None:
    flat = Costs(lambda c: {1: 8.0, 2: 5.0, 4: 5.0, 8: 1.0}[c.batch.micro_pairs])
    best = search(Config(), [Coordinate("micro", sizes(1, 2, 4, 8), rising=True)], flat, never)
    assert best.batch.micro_pairs == 2
    assert flat.asked == [{}, {"batch.micro_pairs": 2}, {"batch.micro_pairs": 4}]
    full = Costs(lambda c: "out of memory" if c.batch.micro_pairs > 2 else 8.0 / c.batch.micro_pairs)
    best = search(Config(), [Coordinate("micro", sizes(1, 2, 4, 8), rising=True)], full, never)
    assert best.batch.micro_pairs == 2
    assert {"batch.micro_pairs": 8} not in full.asked


def test_a_rejected_candidate_is_never_chosen_and_does_not_end_the_search() -> None:
    costs = Costs(lambda c: "wrong" if c.batch.micro_pairs == 2 else 8.0 / c.batch.micro_pairs)
    best = search(Config(), [Coordinate("micro", sizes(2, 4))], costs, never)
    assert best.batch.micro_pairs == 4


def test_a_gain_within_the_noise_does_not_count() -> None:
    costs = Costs(lambda c: 1.0 if c.batch.micro_pairs == 1 else 0.96)
    assert search(Config(), [Coordinate("micro", sizes(2))], costs, never, 0.05) == Config()
    assert search(Config(), [Coordinate("micro", sizes(2))], costs, never, 0.03) != Config()


def test_what_is_skipped_is_not_tried() -> None:
    costs = Costs(lambda c: 1.0 / c.batch.micro_pairs)
    both = [Coordinate("slow", sizes(2, 4), setup=60.0), Coordinate("quick", sizes(8))]
    best = search(Config(), both, costs, lambda coordinate, values: coordinate.setup > 0)
    assert best.batch.micro_pairs == 8
    assert costs.asked == [{}, {"batch.micro_pairs": 8}]


def test_a_start_that_cannot_run_ends_the_search() -> None:
    with pytest.raises(Rejected, match="too large"):
        search(Config(), [], Costs(lambda c: "too large"), never)


def every_option(device: str, fixed: set[str] = frozenset()) -> list[Values]:  # type: ignore[assignment]
    settings = loading.replaced(Config(), {"kernels.enabled": []})
    return [v for c in without_given(coordinates(device, 16, 16), fixed) for v in c.options(settings)]


def test_all_settings_of_speed_are_tried_on_cuda() -> None:
    tried = {name for values in every_option("cuda") for name in values}
    assert tried == set(profiles.KEYS)


def test_a_cpu_is_spared_what_it_cannot_run() -> None:
    tried = {name for values in every_option("cpu") for name in values}
    assert tried == {
        "batch.inversion_pairs", "batch.micro_pairs", "model.gradient_checkpointing", "model.channels_last",
    }  # fmt: skip


def test_every_candidate_is_a_valid_setting() -> None:
    for values in every_option("cuda"):
        loading.replaced(Config(), values)


def test_a_kernel_that_is_enabled_is_not_tried_again() -> None:
    enabled = loading.replaced(Config(), {"kernels.enabled": ["layer_norm"]})
    (kernel,) = (c for c in coordinates("cuda", 16, 16) if c.name == "kernel layer_norm")
    assert list(kernel.options(enabled)) == []


@pytest.mark.parametrize("name", profiles.KEYS)
def test_given_settings_stay_as_they_are(name: str) -> None:
    default = profiles.get(loading.replaced(Config(), {"kernels.enabled": []}), name)
    options = every_option("cuda", {name})
    assert options
    assert all(values.get(name, default) == default for values in options)
