"""Labels against hand-worked numbers and the identities of the method."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smpo_fast.common.errors import ConfigError, UserError
from smpo_fast.config import loading
from smpo_fast.config.schema import Labels
from smpo_fast.method.label_report import calibration, fitting_temperature
from smpo_fast.method.labels import PICKSCORE_RANGE, smoothed_weight, weigh

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
def test_swapping_the_images_swaps_the_winner_and_keeps_the_weight(pairs: list[tuple[float, float]]) -> None:
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
    ],
)
def test_what_cannot_be_learned_from_is_refused(labels: Labels, values: np.ndarray, human: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weigh(labels, values, np.array(human, dtype=np.float64))


def test_an_end_of_the_range_that_is_not_a_number_is_refused_with_the_settings() -> None:
    with pytest.raises(ConfigError, match="labels.low"):
        loading.from_dict({"labels": {"low": NAN}})


def test_source_reward_accepts_ties_without_rewards_that_are_dropped() -> None:
    assert weigh(Labels(source="reward"), rewards((1, 0), (NAN, NAN)), np.array([1, 0.5])).report.used == 1


@given(st.floats(-5, 5), st.floats(0.05, 20))
def test_temperature_divides_the_difference(difference: float, temperature: float) -> None:
    alpha = 10 / (1 + np.exp(-difference / temperature))
    weight = smoothed_weight(np.array(difference), 10, temperature)
    assert weight == pytest.approx(2 * alpha - 10, abs=1e-8)
    assert weight == smoothed_weight(np.array(difference / temperature), 10) or weight == pytest.approx(
        float(smoothed_weight(np.array(difference / temperature), 10)), rel=1e-12
    )


def test_temperature_of_the_settings_reaches_weights_and_preferences() -> None:
    found = weigh(Labels(temperature=0.5), rewards((2, 0), (0, 1), (NAN, NAN)), np.array([NAN, NAN, 1.0]))
    np.testing.assert_allclose(found.weight, [10 * np.tanh(1), 10 * np.tanh(0.5), 1], rtol=1e-6)
    np.testing.assert_allclose(found.preference, [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(1)), NAN], rtol=1e-12)


def test_quantiles_of_the_data_are_not_moved_by_an_outlier() -> None:
    values = np.linspace(0, 1, 202).reshape(-1, 2)
    values[0, 0] = -1000
    found = weigh(Labels(low="quantile", high="quantile", quantile=0.1), values, unlabelled(101))
    assert (found.report.low, found.report.high) == pytest.approx((0.1, 0.9), abs=1e-3)
    # neighbours 1/201 apart on a range of 0.8
    assert found.weight[50] == pytest.approx(10 * np.tanh(1 / 201 / 0.8 / 2), rel=1e-3)
    mixed = weigh(Labels(low=-1.0, high="quantile", quantile=0.0), rewards((0, 3)), unlabelled(1))
    assert (mixed.report.low, mixed.report.high) == (-1, 3)


def simulated(temperature: float, pairs: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Rewards on 0 .. 1 and what humans say whose preference is a sigmoid of their difference over a temperature."""
    seeded = np.random.default_rng(0)
    values = seeded.random((pairs, 2))
    first = seeded.random(pairs) < 1 / (1 + np.exp(-(values[:, 0] - values[:, 1]) / temperature))
    return values, first.astype(np.float64)


def test_the_temperature_that_humans_have_is_found() -> None:
    values, human = simulated(0.25)
    report = weigh(Labels(), values, human).report
    assert report.fitting_temperature == pytest.approx(0.25, rel=0.05)
    assert "labels.temperature = 0.2" in str(report)
    assert np.isnan(fitting_temperature(np.array([1.0, 2.0]), np.array([1.0, 1.0]))), "they never disagree"
    assert np.isnan(fitting_temperature(np.array([1.0, 2.0]), np.array([0.0, 0.0]))), "they always do"
    assert np.isnan(fitting_temperature(np.zeros(0), np.zeros(0)))


def test_calibration_is_a_straight_line_at_the_right_temperature_only() -> None:
    values, human = simulated(0.25)
    human[::50] = 0.5  # ties do not count
    right, wrong = (calibration(weigh(Labels(temperature=t), values, human).preference, human) for t in (0.25, 1.0))
    assert len(right) == 10
    assert sum(b.pairs for b in right) == 19600
    assert all(abs(b.predicted - b.human) < 4 * b.error for b in right)
    assert sum(abs(b.predicted - b.human) > 4 * b.error for b in wrong) >= 8
    assert [b.predicted for b in right] == sorted(b.predicted for b in right)
    assert right[0].error == pytest.approx(np.sqrt(right[0].human * (1 - right[0].human) / 1960), rel=0.02)


def test_calibration_needs_both() -> None:
    found = weigh(Labels(), rewards((1, 0), (0, 1), (NAN, NAN)), np.array([NAN, 0.0, 1.0]))
    (only,) = calibration(found.preference, np.array([NAN, 0.0, 1.0]))
    assert (only.pairs, only.human) == (1, 0)
    assert calibration(weigh(Labels(), rewards((1, 0)), unlabelled(1)).preference, unlabelled(1)) == []


def test_balance_ties_and_the_error_of_agreement_are_reported() -> None:
    values = rewards(*[(1, 0)] * 90, *[(0, 1)] * 10)
    human = np.array([1.0] * 80 + [0.0] * 10 + [0.5] * 10)
    report = weigh(Labels(drop_ties=False), values, human).report
    assert (report.labelled, report.ties, report.compared) == (100, 10, 90)
    assert report.first_preferred == pytest.approx(80 / 90)
    assert report.agreement == pytest.approx(80 / 90)
    assert report.agreement_error == pytest.approx(np.sqrt(80 / 90 * 10 / 90 / 90), rel=0.1)
    assert "human labels: 100 pairs, 10 ties, image 0 preferred in 88.9% of the others" in str(report)
