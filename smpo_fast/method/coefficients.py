"""The numbers of an inversion, computed on the host in float64: step sizes, weights and noise of every pair's steps.

All of a batch are copied to the device at once. Each coefficient is a column [n, 1, 1, 1, 1] over the pairs of a chunk,
so that it broadcasts against latents [n, 2, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smpo_fast.config.schema import Inversion
from smpo_fast.method.batch import to_device
from smpo_fast.method.schedule import Level, NoisePath


class StartCoefficients(NamedTuple):
    """The level at which each pair's path starts."""

    signal: Tensor
    inverse_signal: Tensor


class StepCoefficients(NamedTuple):
    """One solver step of each pair."""

    h: Tensor  # sigma_to - sigma_from; 0 for a pair that has already landed
    signal: Tensor  # of the destination
    last: Tensor  # weight of the last estimate, and
    earlier: Tensor  # of each of the earlier ones
    noise: Tensor  # standard deviation of the added noise, in the units of S
    first_time: Tensor  # [n, 2] int64, timestep of both images in the first network call
    renoise_time: Tensor  # [n, 2] int64, in the following ones


class LandingCoefficients(NamedTuple):
    """Weights of the clean latent and of S in ``x_t`` and in ``tau``, each [M, n, 1, 1, 1, 1]."""

    x_0: Tensor
    total: Tensor
    tau_x_0: Tensor
    tau_total: Tensor


class CoefficientTable:
    """The coefficients of a batch of pairs, for ``count`` solver steps."""

    def __init__(self, paths: Sequence[NoisePath], count: int, settings: Inversion, device: torch.device) -> None:
        self._paths, self.landings = paths, len(paths[0].landings)
        starts = [(p.levels[0].signal, 1.0 / p.levels[0].signal) for p in paths]
        steps = [[_step_of(p, k, settings) for p in paths] for k in range(count)]
        landings = [[_landing_of(p, m) for p in paths] for m in range(self.landings)]
        blocks = [np.array(block, dtype=np.float64).T for block in (starts, *landings, *steps)]
        host = torch.from_numpy(np.concatenate(blocks).astype(np.float32))
        parts = to_device(host, device).split([len(block) for block in blocks])
        self._starts = parts[0]
        self._landings = torch.stack(parts[1 : 1 + self.landings], 1)
        self._steps = parts[1 + self.landings :]
        self._times = torch.empty(0, 2, len(paths), 2, dtype=torch.long, device=device)
        if self._steps:  # an inversion's images, not pairs, have timesteps: repeated here, once for all calls
            times = torch.stack([step[-2:] for step in self._steps])
            self._times = times[..., None].expand(-1, -1, -1, 2).to(torch.long, memory_format=torch.contiguous_format)

    def start(self, rows: slice) -> StartCoefficients:
        """Where the pairs ``rows`` start."""
        return StartCoefficients(*map(column, self._starts[:, rows]))

    def step(self, k: int, rows: slice) -> StepCoefficients:
        """Solver step k of the pairs ``rows``."""
        return StepCoefficients(*map(column, self._steps[k][:-2, rows]), *self._times[k, :, rows])

    def landing(self, rows: slice) -> LandingCoefficients:
        """All landing points of the pairs ``rows``."""
        return LandingCoefficients(*(c[:, :, None, None, None, None] for c in self._landings[:, :, rows]))

    def landing_at(self, m: int, step: int, rows: slice) -> list[slice]:
        """Which of the pairs ``rows`` reach landing point m after ``step`` solver steps, as contiguous runs."""
        runs: list[slice] = []
        for i, path in enumerate(self._paths[rows]):
            if path.landings[m].step != step:
                continue
            if runs and runs[-1].stop == i:
                runs[-1] = slice(runs[-1].start, i + 1)
            else:
                runs.append(slice(i, i + 1))
        return runs


def column(values: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1, 1], which broadcasts against latents."""
    return values[:, None, None, None, None]


def _step_of(path: NoisePath, k: int, settings: Inversion) -> tuple[float, ...]:
    """One pair's StepCoefficients; beyond the end of its path a step of size 0."""
    source, destination = (path.levels[min(i, path.depth)] for i in (k, k + 1))
    h = destination.sigma - source.sigma
    renoise_time, last = settings.renoise_time, 1.0
    share = 0.0  # of each estimate but the last
    if settings.solver == "ab2" and k == 0:
        last, renoise_time = angle_share(source, destination, destination), "destination"  # a heun step
        share = 1.0 - last
    elif settings.solver == "ab2" and k < path.depth:
        share = angle_share(source, destination, path.levels[k - 1])  # extrapolated: negative
        last = 1.0 - share
    elif settings.average == "angle":
        last = angle_share(source, destination, destination)
        share = 1.0 - last
    elif settings.average == "mean" or (
        settings.average == "renoise" and destination.timestep < settings.average_below
    ):
        share = 1.0 / (settings.renoise_steps + 1)
        last = share
    noise = settings.noise * _ddim_deviation(source, destination) / destination.signal
    times = {"source": source.timestep, "destination": destination.timestep}
    return h, destination.signal, last, share, noise, times[settings.first_time], times[renoise_time]


def angle_share(source: Level, destination: Level, other: Level) -> float:
    """The weight of an estimate at ``other`` in the mean of the estimates over a step, next to one at ``source``.

    The mean over sigma of a function that is linear in the angle atan(sigma), in which noise levels are evenly apart
    also where sigma grows without bound. It is 1/2 for a short step up to ``other``, and 1 for one to pure noise.
    """
    if destination.sigma == source.sigma:
        return 0.0
    start = math.atan(source.sigma)
    mean = (_angle_integral(destination.sigma) - _angle_integral(source.sigma)) / (destination.sigma - source.sigma)
    return (mean - start) / (math.atan(other.sigma) - start)


def _angle_integral(sigma: float) -> float:
    """The integral of atan from 0 to sigma."""
    return sigma * math.atan(sigma) - 0.5 * math.log1p(sigma * sigma)


def _landing_of(path: NoisePath, m: int) -> tuple[float, ...]:
    """One pair's LandingCoefficients. The two terms in x_0 nearly cancel: their difference is taken in float64."""
    start, landing = path.levels[0], path.landings[m]
    reached, level = path.levels[landing.step], landing.level
    ratio = reached.signal / start.signal
    return ratio, reached.signal, (ratio - level.signal) / level.noise, reached.signal / level.noise


def _ddim_deviation(source: Level, destination: Level) -> float:
    """Standard deviation of a DDIM step with eta = 1 from ``destination`` down to ``source``: InPO's unit of noise."""
    if destination.noise == 0.0 or source == destination:
        return 0.0
    share = (source.noise / destination.noise) ** 2
    return max(0.0, share * (1.0 - (destination.signal / source.signal) ** 2)) ** 0.5
