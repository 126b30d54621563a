"""The noise schedule in host float64: noise levels, the path of a latent up to its timestep, and a step's timesteps.

A latent at a noise level is ``x = signal * x_0 + noise * eps`` with ``signal = sqrt(alphas_cumprod)``,
``noise = sqrt(1 - alphas_cumprod)``, ``sigma = noise / signal``. In ``y = x / signal`` a DDIM step (arXiv 2010.02502)
is the Euler step ``y += (sigma_to - sigma_from) * eps``, so the levels describe a path completely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from smpo_fast.common.errors import ModelError
from smpo_fast.common.runtime import rng, uniform
from smpo_fast.config.schema import Inversion

_MOST_TIMESTEPS = 100_000  # of a schedule; far more would exhaust the memory
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
TERMINAL_ALPHA = 2.0**-24  # at the last timestep of a schedule with zero terminal SNR: sigma = 4096


class Level(NamedTuple):
    """A noise level, and the timestep that the network is called with there."""

    timestep: int
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """Noise-to-signal ratio."""
        return self.noise / self.signal


_CLEAN = Level(0, 1.0, 0.0)


class LandingPoint(NamedTuple):
    """A point of a path that is trained on: the state after ``step`` solver steps, trained at ``level``."""

    step: int
    level: Level


class NoisePath(NamedTuple):
    """The noise levels that a clean latent passes on its way up, and its landing points, the last one at the end.

    ``levels[landing.step]`` differs from ``landing.level`` only where the released script's mismatch is reproduced
    (``inversion.landing = "mismatch"``): there the state of one level is trained at the timestep of another.
    """

    levels: tuple[Level, ...]
    landings: tuple[LandingPoint, ...]

    @property
    def depth(self) -> int:
        """Number of solver steps."""
        return len(self.levels) - 1

    @property
    def final_level(self) -> Level:
        """The level at which the end of the path is trained."""
        return self.landings[-1].level


class NoiseSchedule:
    """The schedule alphas_cumprod, [T], of a diffusers scheduler configuration, in float64 on the host."""

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str = "float64") -> NoiseSchedule:
        """The schedule of a ``scheduler_config.json``; ``dtype`` float16 rounds it as the released script does.

        With ``rescale_betas_zero_snr`` (arXiv 2305.08891) the last timestep has no signal. As in diffusers' samplers
        its alphas_cumprod is then ``TERMINAL_ALPHA``, so that sigma is finite: on Gaussians, where the exact flow is
        known, landings on that timestep are as accurate as those before it (``tests/method/test_zero_snr.py``).

        Raises ModelError for other beta schedules than ``BETAS``, for trained betas or values that make no schedule,
        and for a network that predicts noise at a timestep that has no signal.
        """
        steps = config.get("num_train_timesteps", 1000)
        if type(steps) is not int or not 1 <= steps <= _MOST_TIMESTEPS:
            raise ModelError(
                f"scheduler: num_train_timesteps = {steps!r:.40} is not a whole number from 1 to {_MOST_TIMESTEPS}"
            )
        alphas = np.cumprod(1.0 - _betas(config, steps))
        if config.get("rescale_betas_zero_snr"):
            if config.get("prediction_type", "epsilon") == "epsilon":
                raise ModelError(
                    "scheduler: rescale_betas_zero_snr leaves no signal at the last timestep, where predicted noise "
                    "says nothing about the image: the network should predict v (prediction_type = v_prediction)"
                )
            alphas = _rescaled(alphas)
        alphas = alphas.astype(dtype)
        if not alphas[-1] > 0:
            raise ModelError(f"scheduler: its betas leave no signal after {steps} timesteps")
        return cls(alphas)

    def level(self, timestep: int) -> Level:
        """The level of a timestep; negative timesteps have the level of 0, as with ``set_alpha_to_one=False``."""
        alpha = self.alphas_cumprod[max(timestep, 0)]
        return Level(timestep, math.sqrt(alpha), math.sqrt(1.0 - alpha))

    def path(self, timesteps: int | Sequence[int], settings: Inversion) -> NoisePath:
        """The path of a pair that is trained at one timestep, or at several (ascending).

        With ``inversion.grid`` other than 'release' the grid is anchored at the landing timestep and extends downwards,
        so that the path ends on it exactly; docs/method.md has all options.
        """
        times = (timesteps,) if isinstance(timesteps, int) else tuple(timesteps)
        if settings.source == "noise":
            return NoisePath((_CLEAN,), tuple(LandingPoint(0, self.level(t)) for t in times))
        if settings.grid == "release":
            return self._released_path(times[-1], settings)
        levels: list[Level] = [_CLEAN]
        landings: list[LandingPoint] = []
        for time in times:
            below = levels[-1].timestep if landings else 0
            count = math.ceil((time - below) * settings.steps / len(self) - 1e-9)
            if not landings:
                count = max(1, count)
            levels += [self.level(t) for t in self._between(below, time, count, settings)]
            landings.append(LandingPoint(len(levels) - 1, self.level(time)))
        return NoisePath(tuple(levels), tuple(landings))

    def _between(self, below: int, time: int, count: int, settings: Inversion) -> list[int]:
        """``count`` ascending timesteps above ``below``, the last one ``time``."""
        if settings.grid == "even":
            return [round(below + (time - below) * k / count) for k in range(1, count + 1)]
        if settings.spacing == "uniform":
            return [round(time - k * len(self) / settings.steps) for k in reversed(range(count))]
        low, high = (self.level(t).sigma if t else 0.0 for t in (below, time))
        root_low, root_high = low ** (1 / settings.rho), high ** (1 / settings.rho)
        inner = [(root_low + (root_high - root_low) * k / count) ** settings.rho for k in range(1, count)]
        times = np.searchsorted(self._sigmas, inner).tolist()
        # Two levels of a fine grid may fall on one timestep: shift them so that every step has its own.
        return [min(time, max(below + k, min(t, time - count + k))) for k, t in enumerate([*times, time], start=1)]

    @cached_property
    def _sigmas(self) -> np.ndarray:
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    def _released_path(self, time: int, settings: Inversion) -> NoisePath:
        spacing = len(self) // settings.steps
        first = 1 if settings.first_step == "skip" else 1 - spacing
        sources = [s for s in _released_grid(len(self), settings.steps) if first <= s < time] or [first]
        last = sources[-1] + spacing if settings.landing == "mismatch" else time
        start = self.level(first) if first < 0 else Level(first, 1.0, 0.0)
        levels = (start, *(self.level(t) for t in (*sources[1:], last)))
        return NoisePath(levels, (LandingPoint(len(levels) - 1, self.level(time)),))

    def timesteps(self, count: int, settings: Inversion, seed: int, step: int) -> tuple[int, ...]:
        """The ``count`` landing timesteps of an optimizer step (all ranks), descending; a function of (seed, step).

        'stratified' is systematic sampling with a single uniform number: every timestep is as likely as with
        independent draws, and ranks that each take every world-th entry get equal work.
        """
        support: Sequence[int] = range(len(self))
        if settings.landing == "on-grid":
            support = [s for s in _released_grid(len(self), settings.steps) if s > 0]
        if settings.timesteps == "stratified":
            u = uniform(seed, "timestep", step)
            places = [int((i + u) / count * len(support)) for i in range(count)]
        else:
            places = [int(u * len(support)) for u in rng(seed, "timestep", step).random(count)]
        return tuple(sorted((support[min(p, len(support) - 1)] for p in places), reverse=True))

    def paths(self, count: int, settings: Inversion, seed: int, step: int) -> list[NoisePath]:
        """The paths of an optimizer step's pairs (all ranks), deepest first, with ``count`` landing points in total.

        A pair with M landing points gets timesteps that are count/M apart in the descending list: each path spreads
        over the whole schedule, and the timesteps of the step as a whole stay uniform.
        """
        times, each = self.timesteps(count, settings, seed, step), settings.per_trajectory
        pairs = count // each
        paths = [self.path(times[i::pairs][::-1], settings) for i in range(pairs)]
        # The sort is stable and matters only with several landing points: one alone comes in descending order already.
        return sorted(paths, key=lambda p: p.depth, reverse=True)


def _released_grid(num_train: int, steps: int) -> list[int]:
    """Source timesteps of the released script: DDIMInverseScheduler of diffusers 0.20, offset 1, list rolled by one."""
    spacing = num_train // steps
    return [1 + spacing * k for k in range(-1, steps - 1)]


def _betas(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The betas [steps] of a scheduler's configuration, float64. Raises ModelError for what is none."""
    trained = config.get("trained_betas")
    if trained is not None:
        return _trained_betas(trained, steps)
    kind, start, end = (
        config.get("beta_schedule", "linear"),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
    )
    if kind not in BETAS:
        raise ModelError(f"scheduler: beta_schedule {kind!r:.40} is not supported; supported: {', '.join(BETAS)}")
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if type(beta) not in (int, float) or not 0 < beta < 1:
            raise ModelError(f"scheduler: {name} = {beta!r:.40}: a number between 0 and 1 is expected")
    if kind == "scaled_linear":
        return np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
    if kind == "linear":
        return np.linspace(start, end, steps)
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - signal[1:] / signal[:-1], 0.999)


def _trained_betas(values: Any, steps: int) -> np.ndarray:
    if not isinstance(values, (list, tuple)) or len(values) != steps:
        raise ModelError(f"scheduler: trained_betas should list {steps} numbers, one for each timestep")
    wrong = [i for i, beta in enumerate(values) if type(beta) not in (int, float) or not 0 < beta < 1]
    if wrong:
        raise ModelError(
            f"scheduler: trained_betas[{wrong[0]}] = {values[wrong[0]]!r:.40}: a number between 0 and 1 is expected"
        )
    return np.array(values, dtype=np.float64)


def _rescaled(alphas: np.ndarray) -> np.ndarray:
    """alphas_cumprod [T] shifted and scaled in their square roots: 0 at the end, unchanged at the start."""
    signal = np.sqrt(alphas)
    shifted = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    return np.maximum(shifted**2, TERMINAL_ALPHA)
