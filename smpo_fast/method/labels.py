"""From two rewards, or a human label, to the winner of a pair and its smoothed weight.

SmPO (arXiv 2506.02698) replaces the binary preference by a mixture of strength alpha with sensitivity gamma. Of that, a
factor 2 alpha - gamma per pair is all that remains in the loss::

    r'           = (r - low) / (high - low)                     normalised reward
    alpha/gamma  = sigmoid((r'_w - r'_l) / T)
    weight       = 2 alpha - gamma = gamma tanh((r'_w - r'_l) / (2 T))  >= 0

The paper has no temperature T (that is, T = 1) and takes low and high from the data. The winner w is the image with the
higher reward. A pair with a human label only has a binary preference and the constant weight ``labels.human_weight``;
1 is plain Diffusion-DPO (arXiv 2311.12908).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smpo_fast.common.errors import ConfigError, DataError
from smpo_fast.config.schema import Labels
from smpo_fast.method.label_report import TIE, LabelReport, binomial_error, fitting_temperature

# Lowest and highest PickScore (cosine) in the authors' data, from the released script.
PICKSCORE_RANGE = (0.11543526500463486, 0.28201571106910706)


@dataclass(frozen=True)
class Weighted:
    """A label for each of N pairs."""

    winner: np.ndarray  # int8 [N], 0 or 1: the preferred image
    weight: np.ndarray  # float32 [N], 2 alpha - gamma >= 0; 0 where not used
    used: np.ndarray  # bool [N]
    preference: np.ndarray  # float64 [N], alpha/gamma of image 0; NaN where no rewards are used
    report: LabelReport


def smoothed_weight(difference: np.ndarray, gamma: float, temperature: float = 1.0) -> np.ndarray:
    """2 alpha - gamma for normalised reward differences r'_w - r'_l of any shape; odd in the difference."""
    return gamma * np.tanh(difference / (2 * temperature))


def weigh(labels: Labels, rewards: np.ndarray, label: np.ndarray) -> Weighted:
    """Winner and weight of every pair.

    rewards: float64 [N, 2], NaN where an image has none. label: float64 [N], 1 where a human preferred image 0, 0 for
    image 1, 0.5 for a tie, NaN for no label; other values count for the image they are nearer to.
    Raises DataError when pairs lack what labels.source requires or when no pair has a preference to learn, and
    ConfigError when low >= high.
    """
    has_reward, has_label = np.isfinite(rewards).all(axis=1), np.isfinite(label)
    ties = has_label & (label == TIE)
    dropped = ties & labels.drop_ties
    _check_source(labels, has_reward | dropped, has_label, len(label))

    by_reward = has_reward & ~dropped & (labels.source != "human")
    by_human = has_label & ~dropped & ~by_reward
    low, high = _reward_range(labels, rewards[by_reward])
    known = np.where(by_reward[:, None], rewards, 0.0)
    difference = known[:, 0] - known[:, 1]

    # A label decides where rewards do not, which also names the winner of equal rewards (of weight 0).
    lead = np.where(difference != 0, difference, np.where(has_label, label - TIE, 0.0))
    normalised = difference / (high - low) if high > low else np.zeros(len(label))
    weight = np.where(by_reward, smoothed_weight(np.abs(normalised), labels.gamma, labels.temperature), 0.0)
    weight = np.where(by_human & ~ties, labels.human_weight, weight)

    used = by_reward | by_human
    _check_something_left(weight, used)
    compared = by_reward & has_label & ~ties & (difference != 0)
    agreement = float(((difference > 0) == (label > TIE))[compared].mean()) if compared.any() else float("nan")
    decided = label[has_label & ~ties]
    report = LabelReport(
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
        first_preferred=float((decided > TIE).mean()) if len(decided) else float("nan"),
        compared=int(compared.sum()),
        agreement=agreement,
        agreement_error=binomial_error(agreement, int(compared.sum())),
        fitting_temperature=fitting_temperature(normalised[compared], label[compared]),
        weight_mean=float(weight[used].mean()),
        weight_quantiles=tuple(np.quantile(weight[used], [0.05, 0.5, 0.95]).tolist()),
    )
    preference = np.where(by_reward, (1 + np.tanh(normalised / (2 * labels.temperature))) / 2, np.nan)
    return Weighted((lead < 0).astype(np.int8), weight.astype(np.float32), used, preference, report)


def _check_source(labels: Labels, has_reward: np.ndarray, has_label: np.ndarray, pairs: int) -> None:
    if labels.source == "reward" and not has_reward.all():
        raise DataError(
            f"labels.source = 'reward', but {int((~has_reward).sum())} of {pairs} pairs have no rewards: prepare the "
            "data with data.scorer, or set labels.source = 'auto' to use their human labels"
        )
    if labels.source == "human" and not has_label.all():
        raise DataError(
            f"labels.source = 'human', but {int((~has_label).sum())} of {pairs} pairs have no human label: "
            "set labels.source = 'auto' to use their rewards"
        )


def _reward_range(labels: Labels, rewards: np.ndarray) -> tuple[float, float]:
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
        raise ConfigError(
            f"labels.low = {labels.low!r} and labels.high = {labels.high!r} give {low:g} and {high:g}: "
            "low must be below high"
        )
    return low, high


def _check_something_left(weight: np.ndarray, used: np.ndarray) -> None:
    if not used.any():
        raise DataError(
            f"none of {len(used)} pairs has a preference to learn: each is a tie (labels.drop_ties) or has neither "
            "rewards nor a human label (see labels.source and data.scorer)"
        )
    if not weight.any():
        raise DataError(
            f"all {int(used.sum())} pairs have weight 0 (equal rewards or ties): there is no preference to learn"
        )
