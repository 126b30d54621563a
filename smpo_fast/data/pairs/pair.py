"""A preference pair in its three states (candidate, usable, stored), and a row that was rejected instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageRef:
    """An image that has not been read yet; ``read`` gives its encoded bytes or raises BadImage."""

    read: Callable[[], bytes]
    path: str | None = None
    uid: str | None = None


@dataclass(frozen=True)
class CandidatePair:
    """A pair whose images have not been read yet."""

    row: int  # number of the record; where the images come from two records, that of the better image
    uid: str
    prompt: str
    images: tuple[ImageRef, ImageRef]
    label: float | None  # 1: image 0 is preferred, 0: image 1, 0.5: a tie; None: no human label
    rewards: tuple[float, float] | None  # None: not scored


@dataclass(frozen=True)
class UsableImage:
    """An encoded image that was read and found usable."""

    content: bytes
    path: str | None
    hash: int  # images.content_hash of the content
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class UsablePair:
    """A pair that keeps the rules, with its images."""

    candidate: CandidatePair
    images: tuple[UsableImage, UsableImage]


@dataclass(frozen=True)
class RawPair:
    """A usable row of a stored table, its images not decoded."""

    row: int  # counted from 0 over the whole table
    uid: str
    prompt: str
    images: tuple[bytes, bytes]
    label: float | None  # 1: image 0 is preferred, 0: image 1, 0.5: a tie; None: no human label
    rewards: tuple[float, float] | None  # None: not scored


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used. ``reason`` is 'kind: detail' (smpo_fast.data.pairs.rules)."""

    row: int
    uid: str
    reason: str
