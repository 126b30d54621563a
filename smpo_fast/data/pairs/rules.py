"""The rules of a usable pair: what its label and rewards may be, and the reasons for which it is rejected.

A reason is a text 'kind: detail'. Rejected rows are counted by kind, so kinds stay the same from release to release.
The functions that check one rule return the reason, or None where the rule is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import numpy as np

LABEL_COLUMNS = ("label_0", "label_1")
REWARD_COLUMNS = (("reward_0", "reward_1"), ("ps_score_0", "ps_score_1"))  # the first pair of columns present counts
NO_PREFERENCE = "no preference"
NO_FINITE_SCORE = "the scorer gave no finite score"
_LABELS_ADD_UP = 1e-3  # tolerance of label_0 + label_1 = 1


class Unusable(Exception):
    """Why a row cannot be used: 'kind: detail'."""


def reason_kind(reason: str) -> str:
    """The kind of a reason, by which rejected rows are counted."""
    return reason.partition(":")[0]


def no_preference(label: float | None, rewards: tuple[float, float] | None) -> str | None:
    """A pair needs a human label or rewards, unless a scorer is going to give it rewards."""
    if label is None and rewards is None:
        return f"{NO_PREFERENCE}: neither rewards nor a human label (null or NaN)"
    return None


def same_image(zero: Any, one: Any) -> str | None:
    """The two images must differ. They are given as encoded bytes, content hashes, or arrays of pixels."""
    same = np.array_equal(zero, one) if isinstance(zero, np.ndarray) else zero == one
    return "the same picture twice: there is nothing to prefer" if same else None


def no_finite_score(*scores: float) -> str | None:
    """What a scorer says of an image, or of the two of a pair, must be finite."""
    if all(map(math.isfinite, scores)):
        return None
    return f"{NO_FINITE_SCORE}: {', '.join(f'{score:g}' for score in scores)}"


def equal_scores(zero: float | None, one: float | None) -> str | None:
    """A pair whose only preference are its scores needs different ones."""
    return "equal scores: there is nothing to prefer" if zero is not None and zero == one else None


def label_of(cell: Callable[[str], Any]) -> float | None:
    """The human preference for image 0, from 0 to 1; None where both label columns are null or NaN.

    cell: the number in a column of LABEL_COLUMNS, or None. Raises Unusable for a label outside 0 to 1 and for two
    labels that contradict each other.
    """
    values = []
    for name in LABEL_COLUMNS:
        value = _number(cell(name))
        if value is not None and not 0 <= value <= 1:
            raise Unusable(f"label outside 0 to 1: {name} = {value:g}")
        values.append(value)
    zero, one = values
    if zero is None:
        return None if one is None else 1 - one
    if one is not None and abs(zero + one - 1) > _LABELS_ADD_UP:
        raise Unusable(f"labels contradict each other: label_0 = {zero:g}, label_1 = {one:g}")
    return zero


def rewards_of(cell: Callable[[str], Any], columns: Container[str]) -> tuple[float, float] | None:
    """The pair's rewards, from the first of REWARD_COLUMNS that is among ``columns``; None where it has none.

    cell: the value in a column: a number, a list of one, or None. Raises Unusable for an infinite reward, one reward
    without the other, and a list of several.
    """
    names = next((names for names in REWARD_COLUMNS if names[0] in columns), None)
    if names is None:
        return None
    values = [_number(_only_element(cell(name), name)) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and math.isinf(value):
            raise Unusable(f"reward is not finite: {name} = {value}")
    zero, one = values
    if zero is None and one is None:
        return None
    if zero is None or one is None:
        missing = names[0] if zero is None else names[1]
        raise Unusable(f"one reward of two: {missing} is null or NaN, so there is nothing to compare the other with")
    return zero, one


def _only_element(value: Any, name: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise Unusable(f"more than one reward: {name} is a list of {len(value)}")
    return value[0] if value else None


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
