"""The noise schedule in host float64: levels, the path a latent takes to its timestep, and the timesteps of a step.

A latent at level ``l`` is ``x = signal_l * x_0 + noise_l * eps`` with ``signal = sqrt(alphas_cumprod)``,
``noise = sqrt(1 - alphas_cumprod)``, ``sigma = noise / signal``. In ``y = x / signal`` a DDIM step is the Euler
step ``y += (sigma_to - sigma_from) * eps``, so a path is fully described by its levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import rng, uniform
from smpo_fast.config.schema import Inversion


class Level(NamedTuple):
    """A noise level and its timestep, the network's input there."""

    timestep: int
    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        return self.noise / self.signal


_CLEAN = Level(0, 1.0, 0.0)


class LandingPoint(NamedTuple):
    """Where a path is left for training: after ``step`` solver steps, to be trained at ``level``."""

    step: int
    level: Level


class NoisePath(NamedTuple):
    """The levels from the clean latent upwards, and the landings on the way, the last of them at the end.

    ``levels[landing.step]`` differs from ``landing.level`` only in the released script's mismatch.
    """

    levels: tuple[Level, ...]
    landings: tuple[LandingPoint, ...]

    @property
    def depth(self) -> int:
        """Number of solver steps."""
        return len(self.levels) - 1

    @property
    def final_level(self) -> Level:
        """The level of the last landing."""
        return self.landings[-1].level


class NoiseSchedule:
    """alphas_cumprod of a diffusers scheduler configuration, as float64 on the host."""

    def __init__(self, alphas_cumprod: np.ndarray) -> None:
        self.alphas_cumprod = np.asarray(alphas_cumprod, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: str = "float64") -> NoiseSchedule:
        """The schedule of a ``scheduler_config.json``; ``dtype`` float16 rounds it as the released script does.

        Raises SettingsError for a beta schedule other than scaled_linear and linear, and for zero-terminal-SNR
        rescaling: the target divides by neither, but the paths here were never checked on them.
        """
        kind, steps = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
        if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
            raise UserError("scheduler: trained_betas and rescale_betas_zero_snr are not supported")
        if kind == "scaled_linear":
            betas = np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, steps)
        else:
            raise UserError(f"scheduler: beta_schedule '{kind}' is not supported: scaled_linear or linear")
        return cls(np.cumprod(1.0 - betas).astype(dtype))

    def level(self, time: int) -> Level:
        """The level of a timestep; below 0 the level of 0, as ``set_alpha_to_one=False`` has it."""
        alpha = self.alphas_cumprod[max(time, 0)]
        return Level(time, math.sqrt(alpha), math.sqrt(1.0 - alpha))

    def path(self, times: int | Sequence[int], settings: Inversion) -> NoisePath:
        """The path of a pair trained at one timestep, or at several (ascending; docs/method.md has the options)."""
        times = (times,) if isinstance(times, int) else tuple(times)
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
        if settings.spacing == "uniform":
            return [round(time - k * len(self) / settings.steps) for k in reversed(range(count))]
        low, high = (self.level(t).sigma if t else 0.0 for t in (below, time))
        root_low, root_high = low ** (1 / settings.rho), high ** (1 / settings.rho)
        inner = [(root_low + (root_high - root_low) * k / count) ** settings.rho for k in range(1, count)]
        times = np.searchsorted(self._sigmas, inner).tolist()
        # two levels of a fine grid may fall on one timestep: each step has one of its own
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
        """The ``count`` timesteps of a whole optimizer step (all ranks), descending; a function of (seed, step).

        ``stratified`` is systematic sampling with one uniform number: every timestep is as likely as with
        independent draws, and every rank that takes each world-th entry gets the same work.
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
        """The paths of an optimizer step's pairs (all ranks), deepest first, with ``count`` landings together.

        A pair with M landings gets timesteps count/M apart in the descending list, so that its landings spread over
        the schedule and all of the step's together stay uniform.
        """
        times, each = self.timesteps(count, settings, seed, step), settings.per_trajectory
        pairs = count // each
        paths = [self.path(times[i::pairs][::-1], settings) for i in range(pairs)]
        return sorted(paths, key=lambda p: p.depth, reverse=True)  # stable: only several landings can disturb the order


def _released_grid(num_train: int, steps: int) -> list[int]:
    """Source times of the released inversion: diffusers 0.20's DDIMInverseScheduler, offset 1, list rolled by one."""
    spacing = num_train // steps
    return [1 + spacing * k for k in range(-1, steps - 1)]
