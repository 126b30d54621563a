"""A preference pair: its columns, and the rules of a usable one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PICTURES_KEY = b"smpo_fast.pictures"  # in a table's metadata: the folder that its paths start from


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
