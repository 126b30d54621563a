"""Comparisons of paired scores: intervals that cover, p-values that are right where nothing differs, corrections."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_fast.evaluation import statistics
from smpo_fast.evaluation.statistics import compare, compare_all, holm, sign_flip_p


def drawn(seed: int, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Base and aligned scores that differ by noise and a shift."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(n)
    return base, base + 0.5 * rng.standard_normal(n) + shift


def test_comparison_by_hand() -> None:
    found = compare("model", "reward", np.array([0.1, 0.5, 0.3, 0.2]), np.array([0.2, 0.4, 0.3, 0.6]))
    assert (found.base, found.aligned, found.gain) == pytest.approx((0.275, 0.375, 0.1))
    assert found.win_rate == pytest.approx((2 + 0.5) / 4) and found.prompts == 4
    assert found.gain_low < 0.1 < found.gain_high


def test_equal_images_neither_win_nor_lose() -> None:
    same = np.linspace(0, 1, 9)
    assert compare("model", "reward", same, same).win_rate == 0.5


def test_few_differences_are_counted_exactly() -> None:
    """Of the eight signs of (1, 2, 4) two give a sum of 7 or -7; of (1, 2, -4) six are as far from 0 as it is."""
    rng = np.random.default_rng(0)
    assert sign_flip_p(np.array([1.0, 2.0, 4.0]), rng) == 2 / 8
    assert sign_flip_p(np.array([1.0, 2.0, -4.0]), rng) == 8 / 8
    assert sign_flip_p(np.zeros(4), rng) == 1.0


def test_random_signs_agree_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = np.random.default_rng(1).standard_normal(12) + 0.4
    exact = sign_flip_p(gain, np.random.default_rng(0))
    monkeypatch.setattr(statistics, "RESAMPLES", 4000)  # 4,096 ways are too many now
    assert sign_flip_p(gain, np.random.default_rng(0)) == pytest.approx(exact, abs=4 * (exact / 4000) ** 0.5)


def test_p_values_are_uniform_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    p = np.array([compare("model", "x", *drawn(seed, 30)).p_value for seed in range(400)])
    for level in (0.05, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / 400) ** 0.5)


def test_intervals_cover_the_true_gain_and_win_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    found = [compare("model", "x", *drawn(seed, 80, shift=0.25)) for seed in range(300)]
    wins = 0.6914624612740131  # P(N(0.25, 0.5) > 0)
    for covered in (
        [c.gain_low <= 0.25 <= c.gain_high for c in found],
        [c.win_low <= wins <= c.win_high for c in found],
    ):
        assert 0.90 <= np.mean(covered) <= 0.98


def test_ties_count_half_a_win() -> None:
    found = compare("model", "x", np.array([0.0, 0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 0.0]))
    assert (found.win_rate, found.ties, found.gain, found.median_gain) == (0.5, 0.5, 0.0, 0.0)
    assert "50.0% ties" in str(found)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_several_scores_are_corrected_together() -> None:
    better, same = drawn(0, 60, shift=0.5), drawn(1, 60)
    found = compare_all({("model", "better"): better, ("model", "same"): same})
    assert found[0].p_corrected == pytest.approx(2 * found[0].p_value) and found[0].p_corrected < 0.01
    assert found[1].p_corrected == found[1].p_value > 0.01


def test_thousands_of_prompts_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as HPDv2 has; parts do not change what is drawn twice."""
    base, aligned = drawn(3, 3200, shift=0.02)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    whole = compare("model", "x", base, aligned)
    monkeypatch.setattr(statistics, "_CHUNK", 3200 * 7)
    parts = compare("model", "x", base, aligned)
    assert whole == parts
