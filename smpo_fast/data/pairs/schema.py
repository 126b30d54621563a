"""A preference pair: its columns, and the rules of a usable one."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

PICTURES_KEY = b"smpo_fast.pictures"  # in a table's metadata: the folder that its paths start from
REWARD_COLUMNS = (("reward_0", "reward_1"), ("ps_score_0", "ps_score_1"))
LABEL_COLUMNS = ("label_0", "label_1")


@dataclass(frozen=True)
class RawPair:
    """One usable row of the table, not yet decoded."""

    row: int  # counted from 0 over the whole table
    uid: str
    prompt: str
    images: tuple[bytes, bytes]
    label: float | None  # 1: picture 0 is preferred, 0: picture 1, 0.5: a tie; None: no human label
    rewards: tuple[float, float] | None  # None: not scored


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. ``reason`` is 'what: detail', and counts are kept by what."""

    row: int
    uid: str
    reason: str


class Unusable(Exception):
    """Why a row cannot be used: 'what: detail'."""


def label_of(cell: Callable[[str], Any]) -> float | None:
    """The share of picture 0 in the preference; null and NaN both mean that nobody was asked.

    cell: the number in a column of LABEL_COLUMNS, or None.  Raises Unusable.
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
    if one is not None and abs(zero + one - 1) > 1e-3:
        raise Unusable(f"labels contradict each other: label_0 = {zero:g}, label_1 = {one:g}")
    return zero


def rewards_of(cell: Callable[[str], Any], there: Container[str]) -> tuple[float, float] | None:
    """The pair's scores from the first of REWARD_COLUMNS that is ``there``; None: not scored. Raises Unusable."""
    names = next((names for names in REWARD_COLUMNS if names[0] in there), None)
    if names is None:
        return None
    values = [_number(_only(cell(name), name)) for name in names]
    for name, value in zip(names, values, strict=True):
        if value is not None and math.isinf(value):
            raise Unusable(f"reward is not finite: {name} = {value}")
    zero, one = values
    if zero is None and one is None:
        return None
    if zero is None or one is None:
        missing = names[0] if zero is None else names[1]
        raise Unusable(f"one reward of two: {missing} is null or NaN, so the other has nothing to be compared with")
    return zero, one


def _only(value: Any, name: str) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) > 1:
        raise Unusable(f"more than one reward: {name} is a list of {len(value)}")
    return value[0] if value else None


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


TIE = 0.5


@dataclass(frozen=True)
class FoundImage:
    """A picture of a record; ``read`` gives its encoded bytes or raises BadPicture."""

    read: Callable[[], bytes]
    path: str | None = None
    uid: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A pair, of which the pictures have not been looked at."""

    row: int  # number of the record; where there are two, that of the better picture's
    uid: str
    prompt: str
    pictures: tuple[FoundImage, FoundImage]
    label: float | None
    rewards: tuple[float, float] | None
