"""Which pairs to make of several images of a prompt, by ``--pairs``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import TypeVar

T = TypeVar("T")
PAIRINGS = {
    "all": "every two images of which one is better",
    "ends": "the best against the worst",
    "once": "each image at most once: best against worst, second best against second worst, ..",
}


def select_pairs(ranked: Sequence[T], pairing: str) -> Iterable[tuple[T, T]]:
    """The pairs of some items that are ordered by rank, as ``pairing`` (a key of PAIRINGS) wants them."""
    if pairing == "all":
        return combinations(ranked, 2)  # not a list: thousands of images of one prompt give millions of pairs
    if pairing == "ends":
        return [(ranked[0], ranked[-1])] if ranked else []
    return [(ranked[i], ranked[-1 - i]) for i in range(len(ranked) // 2)]


def better_and_worse(values: Sequence[float], pairing: str) -> Iterator[tuple[int, int]]:
    """Positions (better, worse) of the pairs that ``values`` give, higher is better; equal values make no pair."""
    ranked = sorted(range(len(values)), key=lambda i: -values[i])
    pairs = select_pairs(ranked, pairing)
    return ((better, worse) for better, worse in pairs if values[better] > values[worse])
