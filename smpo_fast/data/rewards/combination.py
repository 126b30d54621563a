"""Combining the scores of several scorers into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smpo_fast.common.errors import DataError
from smpo_fast.data.rewards.scorers import scorer_identity, terms


def combine(scorer: str, raw: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The sum of weight * (score - mean) / std over the scorers of a combination: float64 [n]; of one scorer its score.

    scorer: a combination such as ``0.7*pickscore + 0.3*aesthetic``, or a name.  raw: float32 [n, scorers], one row for
    each distinct image; mean and (population) standard deviation are those of the rows that are finite.  Also returns
    each scorer's name, identity, weight, mean and std.  Raises DataError if a scorer gives all images the same score.
    """
    wanted, values = terms(scorer), raw.astype(np.float64)
    finite = values[np.isfinite(values).all(axis=1)]
    mean, std = (finite.mean(axis=0), finite.std(axis=0)) if len(finite) else (np.zeros(len(wanted)),) * 2
    constants: list[dict[str, Any]] = [
        {"name": name, "identity": scorer_identity(name), "weight": weight, "mean": float(m), "std": float(s)}
        for (weight, name), m, s in zip(wanted, mean, std, strict=True)
    ]
    for fact in constants if len(wanted) > 1 else ():
        if not fact["std"]:
            raise DataError(f"--scorer: '{fact['name']}' gives all images the same score: leave it out")
    return combined(values, constants), constants


def combined(raw: np.ndarray, constants: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The score of images whose scorers' constants are known. raw: float64 [n, scorers]; returns float64 [n]."""
    if len(constants) == 1:
        return raw[:, 0]
    mean, std, weight = (np.array([fact[name] for fact in constants]) for name in ("mean", "std", "weight"))
    return ((raw - mean) / std) @ weight
