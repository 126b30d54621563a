"""From two rewards or a human label to the winner of a pair and its smoothed weight.

The method replaces the binary preference by a mixture of strength alpha under a sensitivity gamma, and the only
trace of it in the loss is a factor 2 alpha - gamma per pair::

    r'           = (r - low) / (high - low)                     normalised reward
    alpha/gamma  = sigmoid((r'_w - r'_l) / T)
    weight       = 2 alpha - gamma = gamma tanh((r'_w - r'_l) / (2 T))  >= 0

The paper has no temperature T (it is 1) and takes low and high from the data.  The winner w is the picture with the
higher reward.  A pair with a human label alone has a binary preference and the constant weight
``labels.human_weight``; 1 is plain Diffusion-DPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smpo_fast.common.errors import UserError
from smpo_fast.config.schema import Labels

# Least and greatest PickScore (cosine) of the authors' data, from their training script.
PICKSCORE_RANGE = (0.11543526500463486, 0.28201571106910706)
TIE = 0.5
BINS = 10
_COLDEST = 1e-4  # temperature; where a lower one would fit, rewards decide without a doubt


@dataclass(frozen=True)
class Bin:
    """Pairs that a human decided, of about the same predicted preference for picture 0."""

    predicted: float  # mean of alpha/gamma
    human: float  # share in which picture 0 was preferred
    error: float  # binomial, one standard deviation
    pairs: int


@dataclass(frozen=True)
class Report:
    """What the labels came from, in pairs, and the weights of those in use."""

    pairs: int  # in the table
    used: int
    by_reward: int
    by_human: int
    ties_dropped: int  # left out: human label is a tie and labels.drop_ties
    without_preference: int  # left out: neither rewards nor label
    equal_rewards: int  # in use, weight 0: they cost time and give no gradient
    low: float  # reward mapped to 0; NaN where no rewards are used
    high: float
    labelled: int  # with a human label, used or not
    ties: int  # among those
    first_preferred: float  # share of picture 0 among the others; NaN where there are none
    compared: int  # by reward, where a human preferred one of the two
    agreement: float  # share of those in which the human agrees; NaN when compared is 0
    agreement_error: float  # binomial, one standard deviation
    fitting_temperature: float  # labels.temperature of the greatest likelihood; NaN where none is or nothing compared
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
            others = f", picture 0 preferred in {self.first_preferred:.1%} of the others"
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


@dataclass(frozen=True)
class Weighted:
    """A label for each of N pairs."""

    winner: np.ndarray  # int8 [N], 0 or 1: the preferred picture
    weight: np.ndarray  # float32 [N], 2 alpha - gamma >= 0; 0 where not used
    used: np.ndarray  # bool [N]
    preference: np.ndarray  # float64 [N], alpha/gamma of picture 0; NaN where rewards do not decide
    report: Report


def smoothed_weight(difference: np.ndarray, gamma: float, temperature: float = 1.0) -> np.ndarray:
    """2 alpha - gamma of a normalised reward difference r'_w - r'_l; odd in the difference."""
    return gamma * np.tanh(difference / (2 * temperature))


def weigh(labels: Labels, rewards: np.ndarray, label: np.ndarray) -> Weighted:
    """Winner and weight of every pair.

    rewards: float64 [N, 2], NaN where a picture has none.  label: float64 [N], 1 when a human preferred picture 0,
    0 for picture 1, 0.5 for a tie, NaN for no label; any other share counts for the side it leans to.
    Raises SettingsError when labels.source asks for what a pair does not have, when low >= high, and when
    nothing is left to learn from.
    """
    has_reward, has_label = np.isfinite(rewards).all(axis=1), np.isfinite(label)
    ties = has_label & (label == TIE)
    dropped = ties & labels.drop_ties
    _check_source(labels, has_reward | dropped, has_label, len(label))

    by_reward = has_reward & ~dropped & (labels.source != "human")
    by_human = has_label & ~dropped & ~by_reward
    low, high = _range(labels, rewards[by_reward])
    compared = np.where(by_reward[:, None], rewards, 0.0)
    difference = compared[:, 0] - compared[:, 1]

    # A label decides where rewards do not, which also names the winner of equal rewards (of weight 0).
    lead = np.where(difference != 0, difference, np.where(has_label, label - TIE, 0.0))
    normalised = difference / (high - low) if high > low else np.zeros(len(label))
    weight = np.where(by_reward, smoothed_weight(np.abs(normalised), labels.gamma, labels.temperature), 0.0)
    weight = np.where(by_human & ~ties, labels.human_weight, weight)

    used = by_reward | by_human
    _check_something_left(weight, used)
    decided = by_reward & has_label & ~ties & (difference != 0)
    agreement = float(((difference > 0) == (label > TIE))[decided].mean()) if decided.any() else float("nan")
    chosen = label[has_label & ~ties]
    report = Report(
        pairs=len(label),
        used=int(used.sum()),
        by_reward=int(by_reward.sum()),
        by_human=int(by_human.sum()),
        ties_dropped=int(dropped.sum()),
        without_preference=int((~used & ~dropped).sum()),
        equal_rewards=int((by_reward & (difference == 0)).sum()),
        low=low,
        high=high,
        labelled=int(has_label.sum()),
        ties=int(ties.sum()),
        first_preferred=float((chosen > TIE).mean()) if len(chosen) else float("nan"),
        compared=int(decided.sum()),
        agreement=agreement,
        agreement_error=_binomial_error(agreement, int(decided.sum())),
        fitting_temperature=fitting_temperature(normalised[decided], label[decided]),
        weight_mean=float(weight[used].mean()),
        weight_quantiles=tuple(np.quantile(weight[used], [0.05, 0.5, 0.95]).tolist()),
    )
    preference = np.where(by_reward, (1 + np.tanh(normalised / (2 * labels.temperature))) / 2, np.nan)
    return Weighted((lead < 0).astype(np.int8), weight.astype(np.float32), used, preference, report)


def calibration(weighted: Weighted, label: np.ndarray) -> list[Bin]:
    """Predicted preference against human labels [N], in up to BINS bins of equally many pairs; ties are left out."""
    decided = np.flatnonzero(np.isfinite(weighted.preference) & np.isfinite(label) & (label != TIE))
    order = decided[np.argsort(weighted.preference[decided], kind="stable")]
    bins = []
    for group in np.array_split(order, min(BINS, len(order)) or 1):
        if len(group):
            human = float((label[group] > TIE).mean())
            predicted = float(weighted.preference[group].mean())
            bins.append(Bin(predicted, human, _binomial_error(human, len(group)), len(group)))
    return bins


def fitting_temperature(difference: np.ndarray, label: np.ndarray) -> float:
    """The T of the greatest likelihood of labels [n] under sigmoid(difference / T); NaN where there is none.

    difference: normalised reward of picture 0 less that of picture 1.  There is none where rewards and humans rather
    disagree, and none where they never disagree: the likelihood then grows to the end.
    """
    first = (label > TIE).astype(np.float64)

    def slope(sharpness: float) -> float:  # of the log-likelihood in 1/T: it falls
        return float((difference * (first - (1 + np.tanh(difference * sharpness / 2)) / 2)).sum())

    low, high = 0.0, 1 / _COLDEST
    if not (slope(low) > 0 > slope(high)):
        return float("nan")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return 2 / (low + high)


def _binomial_error(share: float, count: int) -> float:
    """Of a share, after one more case of either kind: what happened in all cases is not certain."""
    share = (share * count + 1) / (count + 2)
    return float(np.sqrt(share * (1 - share) / count)) if count else float("nan")


def _check_source(labels: Labels, has_reward: np.ndarray, has_label: np.ndarray, pairs: int) -> None:
    if labels.source == "reward" and not has_reward.all():
        raise UserError(
            f"labels.source = 'reward', but {int((~has_reward).sum())} of {pairs} pairs have no rewards: prepare the "
            "data with data.scorer, or give labels.source='auto' to use their human labels"
        )
    if labels.source == "human" and not has_label.all():
        raise UserError(
            f"labels.source = 'human', but {int((~has_label).sum())} of {pairs} pairs have no human label: "
            "give labels.source='auto' to use their rewards"
        )


def _range(labels: Labels, rewards: np.ndarray) -> tuple[float, float]:
    """The rewards that are mapped to 0 and 1; NaN, NaN when no rewards are used. rewards: [n, 2], finite."""
    if not len(rewards):
        return float("nan"), float("nan")
    ends = (
        {"data": rewards.min(), "quantile": np.quantile(rewards, labels.quantile), "pickscore": PICKSCORE_RANGE[0]},
        {"data": rewards.max(), "quantile": np.quantile(rewards, 1 - labels.quantile), "pickscore": PICKSCORE_RANGE[1]},
    )
    low, high = (float(end.get(str(key), key)) for end, key in zip(ends, (labels.low, labels.high), strict=True))
    all_from_data = (labels.low, labels.high) == ("data", "data")
    if not (np.isfinite([low, high]).all() and (low < high or all_from_data)):
        raise UserError(
            f"labels.low = {labels.low!r} and labels.high = {labels.high!r} give {low:g} and {high:g}: "
            "low must be below high"
        )
    return low, high


def _check_something_left(weight: np.ndarray, used: np.ndarray) -> None:
    if not used.any():
        raise UserError(
            f"none of {len(used)} pairs has a preference to learn: each is a tie (labels.drop_ties) or has neither "
            "rewards nor a human label (see labels.source and data.scorer)"
        )
    if not weight.any():
        raise UserError(
            f"all {int(used.sum())} pairs have weight 0 (equal rewards or ties): there is no preference to learn"
        )
