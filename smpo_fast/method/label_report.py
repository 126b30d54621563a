"""What the labels of a data set are made of, and how well the rewards agree with its human labels.

The predicted preference is alpha/gamma of SmPO (arXiv 2506.02698); see ``labels``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIE = 0.5  # the human label of a pair without a preference
BINS = 10
_LOWEST_TEMPERATURE = 1e-4  # if an even lower one fitted best, rewards would decide with certainty


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs decided by a human, with about the same predicted preference for image 0."""

    predicted: float  # mean of alpha/gamma
    human: float  # share of pairs in which image 0 was preferred
    error: float  # binomial, one standard deviation
    pairs: int


@dataclass(frozen=True)
class LabelReport:
    """Where the labels of a table come from, in pairs, and the weights of those in use."""

    pairs: int  # in the table
    used: int
    by_reward: int
    by_human: int
    ties_dropped: int  # left out: the human label is a tie, and labels.drop_ties is set
    without_preference: int  # left out: neither rewards nor label
    equal_rewards: int  # used with weight 0: they cost time and give no gradient
    low: float  # reward mapped to 0; NaN where no rewards are used
    high: float
    labelled: int  # with a human label, used or not
    ties: int  # among those
    first_preferred: float  # share of image 0 among the others; NaN if there are no others
    compared: int  # by reward, where a human preferred one of the two
    agreement: float  # share of those in which the human agrees; NaN when compared is 0
    agreement_error: float  # binomial, one standard deviation
    fitting_temperature: float  # see the function; NaN also when compared is 0
    weight_mean: float
    weight_quantiles: tuple[float, float, float]  # 5 %, 50 %, 95 %

    def __str__(self) -> str:
        lines = [
            f"labels: {self.used} of {self.pairs} pairs, {self.by_reward} by reward, {self.by_human} by human label; "
            f"left out: {self.ties_dropped} with a tie, {self.without_preference} without a preference"
        ]
        if self.by_reward:
            equal = f", {self.equal_rewards} pairs with equal rewards (weight 0)" if self.equal_rewards else ""
            lines.append(f"  rewards {self.low:.6g} .. {self.high:.6g} mapped to 0 .. 1{equal}")
        if self.labelled:
            others = f", image 0 preferred in {self.first_preferred:.1%} of the others"
            balance = others if self.labelled > self.ties else ""
            lines.append(f"  human labels: {self.labelled} pairs, {self.ties} ties{balance}")
        if self.compared:
            lines.append(
                f"  rewards agree with the human label in {self.agreement:.1%} of {self.compared} pairs "
                f"(+- {self.agreement_error:.1%})"
            )
        if np.isfinite(self.fitting_temperature):
            lines.append(f"  labels.temperature = {self.fitting_temperature:.3g} would fit the human labels best")
        low, middle, high = self.weight_quantiles
        lines.append(f"  weight: mean {self.weight_mean:.3g}, 5 % {low:.3g}, median {middle:.3g}, 95 % {high:.3g}")
        return "\n".join(lines)


def calibration(preference: np.ndarray, label: np.ndarray) -> list[CalibrationBin]:
    """Predicted preferences [N] against human labels [N], in up to BINS bins of equally many pairs; ties are left out.

    Pairs without either (NaN) are left out too.
    """
    decided = np.flatnonzero(np.isfinite(preference) & np.isfinite(label) & (label != TIE))
    order = decided[np.argsort(preference[decided], kind="stable")]
    bins = []
    for group in np.array_split(order, min(BINS, len(order)) or 1):
        if len(group):
            human, predicted = float((label[group] > TIE).mean()), float(preference[group].mean())
            bins.append(CalibrationBin(predicted, human, binomial_error(human, len(group)), len(group)))
    return bins


def fitting_temperature(difference: np.ndarray, label: np.ndarray) -> float:
    """The maximum-likelihood T of labels [n] under sigmoid(difference / T); NaN where no T has the maximum.

    difference: [n], normalised reward of image 0 minus that of image 1. There is no such T where rewards and humans
    disagree more often than not, and where they never disagree: the likelihood then keeps growing towards T = 0.
    """
    first = (label > TIE).astype(np.float64)

    def slope(sharpness: float) -> float:  # of the log-likelihood, as a function of 1/T; monotonically decreasing
        return float((difference * (first - (1 + np.tanh(difference * sharpness / 2)) / 2)).sum())

    low, high = 0.0, 1 / _LOWEST_TEMPERATURE
    if not (slope(low) > 0 > slope(high)):
        return float("nan")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def binomial_error(share: float, count: int) -> float:
    """One standard deviation of a share of ``count`` cases; NaN for none.

    One case of either kind is added (Laplace's rule), so that a share of 0 or 1 is not taken for certain.
    """
    share = (share * count + 1) / (count + 2)
    return float(np.sqrt(share * (1 - share) / count)) if count else float("nan")
