"""The comparison of two models by the scores of images from the same prompts and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """One score of base and aligned images over the same prompts and noise."""

    name: str
    base: float
    aligned: float
    gain: float
    gain_low: float  # 95 % interval of the mean gain, over prompts
    gain_high: float
    win_rate: float  # share of prompts whose aligned image scores higher; ties count half
    prompts: int

    def line(self) -> str:
        """One line of text."""
        return (
            f"{self.name:<12} base {self.base:.3f}  aligned {self.aligned:.3f}  "
            f"gain {self.gain:+.3f} (95 % {self.gain_low:+.3f} to {self.gain_high:+.3f})  "
            f"same-noise win-rate {self.win_rate:.1%}  n = {self.prompts}"
        )


def compare(name: str, base: np.ndarray, aligned: np.ndarray, seed: int = 0) -> Comparison:
    """Compare scores [n] of paired images; the interval is a percentile bootstrap over prompts."""
    gain = aligned.astype(np.float64) - base
    picks = np.random.default_rng(seed).integers(0, len(gain), (BOOTSTRAP_SAMPLES, len(gain)))
    low, high = np.percentile(gain[picks].mean(axis=1), [2.5, 97.5])
    wins = (gain > 0).mean() + 0.5 * (gain == 0).mean()
    return Comparison(
        name,
        base=float(base.mean()),
        aligned=float(aligned.mean()),
        gain=float(gain.mean()),
        gain_low=float(low),
        gain_high=float(high),
        win_rate=float(wins),
        prompts=len(gain),
    )
