"""Carry a window of clean latents up to their noise levels: DDIM inversion and ReNoise, ragged over pairs.

The state is the fp32 sum ``S = sum_k (sigma_{k+1} - sigma_k) * eps_k`` of each picture, from which
``x_level = signal_level * (x_0 / signal_start + S)`` and, with the landing on t itself,
``tau = S / sigma_t``: the sigma-weighted mean of the predictions on the way. Taking the target from the sum avoids
the cancellation in ``(x_t - signal_t x_0) / noise_t``.

One ReNoise step (Garibi et al., ECCV 2024; the released SmPO script takes K = 1):
``e_0 = eps(x, source)``, then K times ``e_k = eps(x + h e_{k-1}, destination)``, always restarting from x,
and the latent moves by the mean of the estimates, or by the last one.

The arithmetic between two network calls is a ``Solver``: ``EAGER`` below, or the kernel of the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smpo_fast.config import Inversion
from smpo_fast.schedule import Level, Path

# (x [n, 2, C, H, W], timesteps [n], the n pairs' place in the window) -> a new tensor: the noise prediction, float32
EpsFn = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class Coefficients:
    """What one round of solver steps needs to know of each pair; shape [n] or [n, 1, 1, 1, 1]."""

    h: Tensor  # sigma_to - sigma_from
    signal_from: Tensor
    signal_to: Tensor
    inverse_start: Tensor  # 1 / signal_start
    last: Tensor  # weight of the last estimate, and of each of the earlier ones
    earlier: Tensor
    noise: Tensor  # standard deviation of the added noise, in the units of S
    first_time: Tensor
    renoise_time: Tensor

    def take(self, rows: slice) -> Coefficients:
        return Coefficients(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Solver(NamedTuple):
    """What happens between two network calls; both functions write in place and return nothing.

    predict(x, x_0, S, signal, inverse_start[, estimate, h[, rest]]):
    ``x = signal (x_0 inverse_start + S + h estimate)`` and ``rest += estimate``.
    correct(x, x_0, S, signal, inverse_start, estimate, h[, rest, (a, b)]):
    ``S += h (a estimate + b rest)``, then ``x = signal (x_0 inverse_start + S)``.
    """

    predict: Callable[..., None]
    correct: Callable[..., None]


def _predict(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor,
    estimate: Tensor | None = None, h: Tensor | None = None, rest: Tensor | None = None,
) -> None:  # fmt: skip
    clean = x_0 * inverse_start + total
    if estimate is not None and h is not None:
        clean = clean + h * estimate
        if rest is not None:
            rest.add_(estimate)
    x.copy_(signal * clean)


def _correct(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor, estimate: Tensor, h: Tensor,
    rest: Tensor | None = None, weights: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    if rest is not None and weights is not None:
        estimate = weights[0] * estimate + weights[1] * rest
    total.add_(h * estimate)
    x.copy_(signal * (x_0 * inverse_start + total))


EAGER = Solver(_predict, _correct)


def rounds(paths: Sequence[Path]) -> list[int]:
    """How many pairs move in round k: the window's pairs whose path is deeper than k.

    Raises ValueError when the paths are not sorted deepest first.
    """
    depths = [p.depth for p in paths]
    if depths != sorted(depths, reverse=True):
        raise ValueError("paths must be sorted deepest first, so that the pairs that move are a prefix")
    return [sum(d > k for d in depths) for k in range(max(depths, default=0))]


@torch.no_grad()
def invert(
    eps: EpsFn,
    x_0: Tensor,
    paths: Sequence[Path],
    settings: Inversion,
    *,
    chunk: int,
    active: Sequence[int] = (),
    noise: Tensor | None = None,
    solver: Solver = EAGER,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noisy latents and targets of a window.

    x_0: [B, 2, C, H, W] float32; paths: B of them, deepest first; chunk: pairs in one network call.
    active: for each round at least so many pairs are put through the network (ranks that must make equally
    many calls agree on it; a pair that has landed is moved by zero). noise: [rounds, B, 2, C, H, W] standard
    normals, needed where ``settings.noise`` is not 0. dtype: what the network is given x in; the state is fp32.
    Returns x_t and tau, both like x_0, with ``x_t = signal_t x_0 + noise_t tau`` for every pair.
    """
    total = torch.zeros(x_0.shape, device=x_0.device)
    x = torch.empty(x_0.shape, dtype=dtype, device=x_0.device)
    start = _coefficients(paths, 0, settings, x_0.device)
    solver.predict(x, x_0, total, start.signal_from, start.inverse_start)
    own = rounds(paths)
    for k in range(max(len(own), len(active))):
        count = max(own[k] if k < len(own) else 0, active[k] if k < len(active) else 0)
        table = _coefficients(paths[:count], k, settings, x_0.device)
        for first in range(0, count, chunk):
            rows = slice(first, min(first + chunk, count))
            _step(eps, solver, x[rows], x_0[rows], total[rows], table.take(rows), rows, settings.renoise_steps)
        if settings.noise and noise is not None and k < len(noise):
            total[:count] += table.noise * noise[k, :count]
            solver.predict(x[:count], x_0[:count], total[:count], table.signal_to, table.inverse_start)
    return _land(x_0, total, paths)


def forward_noise(x_0: Tensor, tau: Tensor, paths: Sequence[Path]) -> Tensor:
    """x_t for given noise: Diffusion-DPO's way. Shapes as in ``invert``."""
    signal, noise = (_column([getattr(p.at, name) for p in paths], x_0.device) for name in ("signal", "noise"))
    return signal * x_0 + noise * tau


def _step(
    eps: EpsFn, solver: Solver, x: Tensor, x_0: Tensor, total: Tensor, c: Coefficients, rows: slice, renoise_steps: int
) -> None:
    """One step of some pairs, in place: ``total`` moves on, and x becomes what the network reads next."""
    clean = (x, x_0, total, c.signal_to, c.inverse_start)
    estimate, earlier = eps(x, c.first_time, rows), None
    for _ in range(renoise_steps):
        solver.predict(*clean, estimate, c.h, earlier)
        earlier = estimate if earlier is None else earlier
        estimate = eps(x, c.renoise_time, rows)
    solver.correct(*clean, estimate, c.h, *([] if earlier is None else [earlier, (c.last, c.earlier)]))


def _land(x_0: Tensor, total: Tensor, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """x at the landing, and the tau that makes it signal_t x_0 + noise_t tau; the x_0 terms cancel in float64."""
    start, land, at = [p.levels[0] for p in paths], [p.levels[-1] for p in paths], [p.at for p in paths]
    ratio = [b.signal / a.signal for a, b in zip(start, land, strict=True)]
    x_t = _column(ratio, x_0.device) * x_0 + _column([b.signal for b in land], x_0.device) * total
    of_total = [b.signal / t.noise for b, t in zip(land, at, strict=True)]
    of_x_0 = [(r - t.signal) / t.noise for r, t in zip(ratio, at, strict=True)]
    return x_t, _column(of_total, x_0.device) * total + _column(of_x_0, x_0.device) * x_0


def _coefficients(paths: Sequence[Path], k: int, settings: Inversion, device: torch.device) -> Coefficients:
    source = [p.levels[min(k, p.depth)] for p in paths]
    destination = [p.levels[min(k + 1, p.depth)] for p in paths]
    times = {"source": [s.time for s in source], "destination": [d.time for d in destination]}
    mean = {"mean": [1.0] * len(paths), "last": [0.0] * len(paths)}
    mean["renoise"] = [float(d.time < settings.average_below) for d in destination]
    share = [m / (settings.renoise_steps + 1) for m in mean[settings.average]]
    pairs = list(zip(source, destination, strict=True))
    return Coefficients(
        h=_column([d.sigma - s.sigma for s, d in pairs], device),
        signal_from=_column([s.signal for s in source], device),
        signal_to=_column([d.signal for d in destination], device),
        inverse_start=_column([1.0 / p.levels[0].signal for p in paths], device),
        last=_column([1.0 - settings.renoise_steps * s for s in share], device),
        earlier=_column(share, device),
        noise=_column([settings.noise * _ddim_deviation(s, d) / d.signal for s, d in pairs], device),
        first_time=torch.tensor(times[settings.first_time], device=device),
        renoise_time=torch.tensor(times[settings.renoise_time], device=device),
    )


def _ddim_deviation(source: Level, destination: Level) -> float:
    """Standard deviation of a DDIM step with eta = 1 from ``destination`` down to ``source`` (InPO's noise unit)."""
    if destination.noise == 0.0 or source == destination:
        return 0.0
    share = (source.noise / destination.noise) ** 2
    return max(0.0, share * (1.0 - (destination.signal / source.signal) ** 2)) ** 0.5


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).float().to(device)[:, None, None, None, None]
