"""The comparison of two models by the scores of images from the same prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

RESAMPLES = 10_000
_CHUNK = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Comparison:
    """One score of the base's and a model's images of the same prompts and noise; intervals of 95 %, over prompts."""

    model: str
    name: str  # of the score
    base: float
    aligned: float
    gain: float  # mean difference
    gain_low: float
    gain_high: float
    median_gain: float
    win_rate: float  # share of prompts whose aligned image scores higher; ties count half
    win_low: float
    win_high: float
    ties: float  # share of prompts
    p_value: float  # of a mean gain at least this far from 0 if base and aligned were alike
    p_corrected: float  # by Holm, for all scores that were compared together
    prompts: int

    def __str__(self) -> str:
        ties = f", {self.ties:.1%} ties" if self.ties else ""
        return (
            f"{self.model:<8} {self.name:<12} base {self.base:.3f}  {self.model} {self.aligned:.3f}  gain "
            f"{self.gain:+.3f} (95 % {self.gain_low:+.3f} to {self.gain_high:+.3f}, median {self.median_gain:+.3f})  "
            f"same-noise win-rate {self.win_rate:.1%} ({self.win_low:.1%} to {self.win_high:.1%}{ties})  "
            f"p {self.p_corrected:.2g}  n = {self.prompts}"
        )

    def drift_line(self) -> str:
        """One line for a measure, of which more is not better."""
        return (
            f"{self.model:<8} {self.name:<12} base {self.base:.3f}  {self.model} {self.aligned:.3f}  change "
            f"{self.gain:+.3f} (95 % {self.gain_low:+.3f} to {self.gain_high:+.3f})"
        )


def compare_all(scores: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], seed: int = 0) -> list[Comparison]:
    """Compare scores [n] of the base and of a model, by the model's name and the score's.

    The p-values are corrected for the number of all these comparisons.
    """
    found = [compare(*names, base, aligned, seed) for names, (base, aligned) in scores.items()]
    corrected = holm([c.p_value for c in found])
    return [replace(c, p_corrected=p) for c, p in zip(found, corrected, strict=True)]


def compare(model: str, name: str, base: np.ndarray, aligned: np.ndarray, seed: int = 0) -> Comparison:
    """Compare scores [n] of paired images: bootstrap intervals (percentiles) and a permutation test over prompts."""
    gain = aligned.astype(np.float64) - base
    win = (gain > 0) + 0.5 * (gain == 0)
    rng = np.random.default_rng(seed)
    means = _bootstrap(np.stack([gain, win]), rng)
    (gain_low, win_low), (gain_high, win_high) = np.percentile(means, [2.5, 97.5], axis=1)
    p = sign_flip_p(gain, rng)
    return Comparison(
        model,
        name,
        base=float(base.mean()),
        aligned=float(aligned.mean()),
        gain=float(gain.mean()),
        gain_low=float(gain_low),
        gain_high=float(gain_high),
        median_gain=float(np.median(gain)),
        win_rate=float(win.mean()),
        win_low=float(win_low),
        win_high=float(win_high),
        ties=float((gain == 0).mean()),
        p_value=p,
        p_corrected=p,
        prompts=len(gain),
    )


def sign_flip_p(gain: np.ndarray, rng: np.random.Generator) -> float:
    """The p-value of the mean of paired differences [n] by flipping their signs at random, two-sided.

    If base and aligned were alike, each difference would be as likely with either sign. All 2**n ways are counted where
    they are no more than RESAMPLES; of random ones the observed is one, so that p is never 0.
    """
    n, observed = len(gain), abs(gain.mean()) * (1 - 1e-12)  # ways that differ in rounding alone are as extreme
    if 2**n <= RESAMPLES:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ gain) / n >= observed).mean())
    extreme = 0
    for count in _chunks(n):
        flips = rng.integers(0, 2, (count, n), np.int8)
        extreme += int((np.abs(gain.sum() - 2 * (flips @ gain)) / n >= observed).sum())
    return (1 + extreme) / (1 + RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's method: the chance of any false finding stays that of a single one."""
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def _bootstrap(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means [k, RESAMPLES] of values [k, n] over prompts drawn with replacement, the same for all k."""
    n = values.shape[1]
    picks = (rng.integers(0, n, (count, n)) for count in _chunks(n))
    return np.concatenate([values[:, some].mean(axis=2) for some in picks], axis=1)


def _chunks(n: int) -> list[int]:
    """RESAMPLES in parts that need little memory."""
    each = max(1, _CHUNK // n)
    return [min(each, RESAMPLES - first) for first in range(0, RESAMPLES, each)]
