"""Labels against hand-worked numbers and the identities of the method."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smpo_fast.config import Labels, SettingsError
from smpo_fast.labels import PICKSCORE_RANGE, smoothed_weight, weigh

NAN = float("nan")


def rewards(*pairs: tuple[float, float]) -> np.ndarray:
    return np.array(pairs, dtype=np.float64).reshape(-1, 2)


def unlabelled(count: int) -> np.ndarray:
    return np.full(count, NAN)


def test_hand_worked_weights() -> None:
    # Rewards 0 .. 2 are mapped to 0 .. 1, so d = 1, 0.5, 0 and gamma tanh(d / 2) = 10 x 0.4621172, 10 x 0.2449187, 0
    found = weigh(Labels(), rewards((2, 0), (0, 1), (1, 1)), unlabelled(3))
    assert found.winner.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.weight, [4.621172, 2.449187, 0], rtol=1e-6)
    assert found.weight.dtype == np.float32
    assert found.winner.dtype == np.int8
    assert found.used.all()
    assert (found.report.low, found.report.high, found.report.equal_rewards) == (0, 2, 1)


def test_one_pickscore_point_weighs_0_30() -> None:
    found = weigh(Labels(low="pickscore", high="pickscore"), rewards((0.21, 0.22)), unlabelled(1))
    assert found.winner.tolist() == [1]
    # 0.01 / 0.16658031 = 0.06003111 of the range; 10 tanh(0.030015555) = 0.30006543
    assert found.weight[0] == pytest.approx(0.3000654, rel=1e-6)


def test_pickscore_range_is_the_authors() -> None:
    assert PICKSCORE_RANGE == (0.11543526500463486, 0.28201571106910706)


@given(st.floats(-5, 5), st.floats(0.01, 100))
def test_weight_is_twice_alpha_minus_gamma_and_odd(difference: float, gamma: float) -> None:
    alpha = gamma / (1 + np.exp(-difference))
    assert smoothed_weight(np.array(difference), gamma) == pytest.approx(2 * alpha - gamma, abs=1e-9 * gamma)
    assert smoothed_weight(np.array(-difference), gamma) == -smoothed_weight(np.array(difference), gamma)


@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=8))
def test_swapping_the_pictures_swaps_the_winner_and_keeps_the_weight(pairs: list[tuple[float, float]]) -> None:
    values, labels = rewards(*pairs, (0, 1)), Labels(low=-3.0, high=3.0)
    here, there = (
        weigh(labels, values, unlabelled(len(values))),
        weigh(labels, values[:, ::-1], unlabelled(len(values))),
    )
    np.testing.assert_array_equal(here.weight, there.weight)
    differ = values[:, 0] != values[:, 1]
    np.testing.assert_array_equal(here.winner[differ], 1 - there.winner[differ])
    assert (here.weight >= 0).all()
    assert (here.weight[~differ] == 0).all()


def test_only_human_labels_have_the_constant_weight() -> None:
    found = weigh(Labels(human_weight=2.5), rewards(*[(NAN, NAN)] * 4), np.array([1, 0, 0.5, NAN]))
    assert found.winner[:2].tolist() == [0, 1]
    assert found.weight.tolist() == [2.5, 2.5, 0, 0]
    assert found.used.tolist() == [True, True, False, False]
    assert (found.report.by_human, found.report.ties_dropped, found.report.without_preference) == (2, 1, 1)
    assert np.isnan(found.report.low)


def test_rewards_win_over_labels_and_agreement_is_reported() -> None:
    values, human = rewards((1, 0), (1, 0), (0, 1), (NAN, NAN)), np.array([1.0, 0.0, NAN, 0.0])
    found = weigh(Labels(human_weight=7.0), values, human)
    assert found.winner.tolist() == [0, 0, 1, 1]
    assert found.weight[3] == 7
    report = found.report
    assert (report.by_reward, report.by_human, report.compared, report.agreement) == (3, 1, 2, 0.5)
    assert "3 by reward, 1 by human label" in str(report)
    assert "50.0% of 2 pairs" in str(report)


def test_source_human_ignores_rewards() -> None:
    found = weigh(Labels(source="human"), rewards((1, 0), (5, 0)), np.array([0.0, 1.0]))
    assert found.winner.tolist() == [1, 0]
    assert found.weight.tolist() == [1, 1]
    assert found.report.by_reward == 0


def test_ties() -> None:
    values, human = rewards((1, 0), (0, 3), (NAN, NAN)), np.array([0.5, 1.0, 0.5])
    dropped = weigh(Labels(), values, human)
    assert dropped.used.tolist() == [False, True, False]
    assert dropped.report.ties_dropped == 2
    assert dropped.report.high == 3
    kept = weigh(Labels(drop_ties=False), values, human)
    assert kept.used.all()
    assert kept.weight[0] > 0
    assert kept.weight[2] == 0  # a human tie without rewards: no preference, no gradient


def test_range_leaves_out_dropped_ties() -> None:
    found = weigh(Labels(), rewards((-100, 100), (0, 1)), np.array([0.5, NAN]))
    assert (found.report.low, found.report.high) == (0, 1)


def test_range_by_number_and_by_data_together() -> None:
    found = weigh(Labels(low=-1.0), rewards((0, 1)), unlabelled(1))
    assert found.weight[0] == pytest.approx(10 * np.tanh(0.25))


@pytest.mark.parametrize(
    ("labels", "values", "human", "message"),
    [
        (Labels(source="reward"), rewards((1, 0), (NAN, NAN)), [1, 1], "1 of 2 pairs have no rewards.*data.scorer"),
        (Labels(source="human"), rewards((1, 0), (0, 1)), [1, NAN], "1 of 2 pairs have no human label"),
        (Labels(), rewards((NAN, NAN)), [0.5], "none of 1 pairs has a preference"),
        (Labels(), rewards((1, 1), (1, 1)), [1, 1], "all 2 pairs have weight 0"),
        (Labels(low=3.0), rewards((0, 1)), [1], "low must be below high"),
        (Labels(low=1.0, high=1.0), rewards((0, 1)), [1], "low must be below high"),
        (Labels(low=NAN), rewards((0, 1)), [1], "low must be below high"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(labels: Labels, values: np.ndarray, human: list, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        weigh(labels, values, np.array(human, dtype=np.float64))


def test_source_reward_accepts_ties_without_rewards_that_are_dropped() -> None:
    assert weigh(Labels(source="reward"), rewards((1, 0), (NAN, NAN)), np.array([1, 0.5])).report.used == 1
