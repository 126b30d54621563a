"""Carry a window of clean latents up to their noise levels: solvers of the probability flow, ragged over pairs.

The state is the fp32 sum ``S = sum_k (sigma_{k+1} - sigma_k) * eps_k`` of each picture, from which
``x_level = signal_level * (x_0 / signal_start + S)`` and, with the landing on t itself,
``tau = S / sigma_t``: the sigma-weighted mean of the predictions on the way. Taking the target from the sum avoids
the cancellation in ``(x_t - signal_t x_0) / noise_t``. In ``y = x / signal`` a step is ``y += h * estimate`` with
``h = sigma_{k+1} - sigma_k``, and the solvers differ in the estimate alone:

=======  ==========================================================================================================
ddim     ``e_0 = eps(x, source)``
renoise  ``e_0``, then K times ``e_k = eps(x + h e_{k-1}, destination)`` from the same x; their mean, or the last one
         (Garibi et al., ECCV 2024; the released SmPO script takes K = 1)
heun     renoise with K = 1 and the mean
ab2      ``(1 + r/2) e_0 - (r/2) e'_0`` with the previous step's ``e'_0`` and ``r = h / h'``; the first step is ddim
pec      predict with the previous step's last estimate, evaluate once at the destination, take the mean of the two;
         the first step is heun
=======  ==========================================================================================================

A chunk of pairs goes through all its steps before the next one begins, so that what depends on its prompts alone is
computed once. The arithmetic between two network calls is a ``SolverOps``: ``EAGER_OPS`` below, or the kernel of the
same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from smpo_fast.config.schema import Inversion
from smpo_fast.method.schedule import Level, NoisePath


class NoisePredictor(Protocol):
    """The network for a chunk of pairs: the noise prediction of the first n of them.

    x: [n, 2, C, H, W], timesteps: [n] on the device; returns a new float32 tensor like x. ``again``: the call follows
    one at nearly the same x in the same step.
    """

    def __call__(self, x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor: ...


PredictorFactory = Callable[[slice], NoisePredictor]
"""From the rows of a chunk in its window to the network for them."""


class SolverOps(NamedTuple):
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


EAGER_OPS = SolverOps(_predict, _correct)


def active_counts(paths: Sequence[NoisePath]) -> list[int]:
    """How many pairs move in round k: the window's pairs whose path is deeper than k.

    Raises ValueError when the paths are not sorted deepest first.
    """
    depths = [p.depth for p in paths]
    if depths != sorted(depths, reverse=True):
        raise ValueError("paths must be sorted deepest first, so that the pairs that move are a prefix")
    return [sum(d > k for d in depths) for k in range(max(depths, default=0))]


def network_calls(depth: int, settings: Inversion) -> int:
    """Network calls on the way of a picture."""
    return (
        depth + (settings.solver == "pec")
        if settings.solver in ("pec", "ab2")
        else depth * (1 + settings.renoise_steps)
    )


@torch.no_grad()
def invert(
    network: PredictorFactory,
    x_0: Tensor,
    paths: Sequence[NoisePath],
    settings: Inversion,
    *,
    chunk: int,
    active: Sequence[int] = (),
    noise: Callable[[slice], Tensor] | None = None,
    solver: SolverOps = EAGER_OPS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noisy latents and targets of a window.

    x_0: [B, 2, C, H, W] float32; paths: B of them with M landings each, deepest first; chunk: pairs in one network
    call. active: for each round at least so many pairs are put through the network (ranks that must make equally
    many calls agree on it; a pair that has landed is moved by zero). noise: standard normals of a chunk,
    [rounds, n, 2, C, H, W], needed where ``settings.noise`` is not 0. dtype: what the network is given x in; the
    state is fp32. Returns x_t and tau, both [M, B, 2, C, H, W], lowest timestep first, with
    ``x_t = signal_t x_0 + noise_t tau`` for every one.
    """
    own = active_counts(paths)
    counts = [max(a, b) for a, b in zip_longest(own, active, fillvalue=0)]
    table = _Table(paths, len(counts), settings, x_0.device)
    x_t, tau = (torch.empty(len(paths[0].landings), *x_0.shape, device=x_0.device) for _ in range(2))
    for first in range(0, len(paths), chunk):
        rows = slice(first, min(first + chunk, len(paths)))
        climb = _Climb(network(rows), solver, x_0[rows], table, rows, settings, dtype)
        normals = noise(rows) if settings.noise and noise is not None else ()
        for k, n in enumerate(min(n, rows.stop) - first for n in counts if n > first):
            climb.step(k, n, normals[k] if k < len(normals) else None)
        x_t[:, rows], tau[:, rows] = climb.landed()
    return x_t, tau


def forward_noise(x_0: Tensor, tau: Tensor, paths: Sequence[NoisePath]) -> Tensor:
    """x_t for given noise: Diffusion-DPO's way. Shapes as in ``invert``'s first landing."""
    levels = np.array([[p.final_level.signal, p.final_level.noise] for p in paths], dtype=np.float32).T
    signal, noise = (_column(row) for row in to_device(torch.from_numpy(levels.copy()), x_0.device))
    return signal * x_0 + noise * tau


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A table made on the host, copied through pinned memory: the host does not wait for the device."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


# --- one chunk ------------------------------------------------------------------------------------------------


class _Climb:
    """A chunk of pairs on their way up; in a step its first n pairs move."""

    def __init__(
        self,
        eps: NoisePredictor,
        solver: SolverOps,
        x_0: Tensor,
        table: _Table,
        rows: slice,
        settings: Inversion,
        dtype: torch.dtype,
    ) -> None:
        self.eps, self.solver, self.x_0, self.settings, self.table, self.rows = eps, solver, x_0, settings, table, rows
        self.total = torch.zeros(x_0.shape, device=x_0.device)
        self.x = torch.empty(x_0.shape, dtype=dtype, device=x_0.device)
        self.start = table.pairs(rows)
        self._before: Tensor | None = None  # what ab2 and pec keep of the last step
        self._left = {m: torch.zeros_like(self.total) for m in range(table.landings - 1)}  # S at the earlier landings
        solver.predict(self.x, x_0, self.total, self.start.signal, self.start.inverse)

    def step(self, k: int, n: int, noise: Tensor | None) -> None:
        """Step k of the first n pairs."""
        c = self.table.round(k, slice(self.rows.start, self.rows.start + n))
        x, total = self.x[:n], self.total[:n]
        clean = (x, self.x_0[:n], total, c.signal, self.start.inverse[:n])
        before = None if self._before is None else self._before[:n]
        carried = before if self.settings.solver == "pec" else None
        estimate = self.eps(x, c.first_time) if carried is None else carried
        earlier = None
        for evaluated in range(self.settings.renoise_steps):
            self.solver.predict(*clean, estimate, c.h, earlier)
            earlier = estimate if earlier is None else earlier
            estimate = self.eps(x, c.renoise_time, refinement=evaluated > 0 or carried is None)
        if self.settings.solver == "ab2":
            earlier = before
        self.solver.correct(*clean, estimate, c.h, *(() if earlier is None else (earlier, (c.last, c.earlier))))
        if self.settings.solver in ("ab2", "pec"):
            self._before = estimate
        if noise is not None:
            total += c.noise * noise[:n]
            self.solver.predict(*clean)
        for m, left in self._left.items():
            for run in self.table.landing_at(m, k + 1, self.rows):
                left[run] = self.total[run]

    def landed(self) -> tuple[Tensor, Tensor]:
        """x_t and tau of all landings, [M, n, 2, C, H, W]: x_t = signal_t x_0 + noise_t tau."""
        totals = torch.stack([*self._left.values(), self.total])
        c = self.table.landing(self.rows)
        return c.x_0 * self.x_0 + c.total * totals, c.tau_x_0 * self.x_0 + c.tau_total * totals


# --- coefficients ---------------------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    signal: Tensor  # where the path starts
    inverse: Tensor  # 1 / signal


class _Round(NamedTuple):
    """What one step needs to know of each pair."""

    h: Tensor  # sigma_to - sigma_from
    signal: Tensor  # of the destination
    last: Tensor  # weight of the last estimate, and of each of the earlier ones
    earlier: Tensor
    noise: Tensor  # standard deviation of the added noise, in the units of S
    first_time: Tensor
    renoise_time: Tensor


class _Landing(NamedTuple):
    """x_t = x_0 x_0 + total S, tau = tau_x_0 x_0 + tau_total S; [M, n, 1, 1, 1, 1]."""

    x_0: Tensor
    total: Tensor
    tau_x_0: Tensor
    tau_total: Tensor


class _Table:
    """The coefficients of a window, computed in float64 on the host and copied to the device at once."""

    def __init__(self, paths: Sequence[NoisePath], count: int, settings: Inversion, device: torch.device) -> None:
        self._paths, self.landings = paths, len(paths[0].landings)
        pairs = [(p.levels[0].signal, 1.0 / p.levels[0].signal) for p in paths]
        steps = [[_step_of(p, k, settings) for p in paths] for k in range(count)]
        landings = [[_landing_of(p, m) for p in paths] for m in range(self.landings)]
        blocks = [np.array(block, dtype=np.float64).T for block in (pairs, *landings, *steps)]
        host = torch.from_numpy(np.concatenate(blocks).astype(np.float32))
        parts = to_device(host, device).split([len(block) for block in blocks])
        self._pairs, self._landings, self._rounds = (
            parts[0],
            torch.stack(parts[1 : 1 + self.landings], 1),
            parts[1 + self.landings :],
        )

    def pairs(self, rows: slice) -> _Pairs:
        """Of each pair of a chunk."""
        return _Pairs(*map(_column, self._pairs[:, rows]))

    def round(self, k: int, rows: slice) -> _Round:
        """Of each pair in step k."""
        h, signal, last, earlier, noise, first, renoise = self._rounds[k][:, rows]
        h, signal, last, earlier, noise = (_column(c) for c in (h, signal, last, earlier, noise))
        return _Round(h, signal, last, earlier, noise, first.long(), renoise.long())

    def landing(self, rows: slice) -> _Landing:
        """Of each pair at each of its landings."""
        return _Landing(*(c[:, :, None, None, None, None] for c in self._landings[:, :, rows]))

    def landing_at(self, m: int, step: int, rows: slice) -> list[slice]:
        """The pairs of a chunk whose landing m comes after so many steps, as runs of neighbours."""
        here = [i for i, p in enumerate(self._paths[rows]) if p.landings[m].step == step]
        runs: list[slice] = []
        for i in here:
            if runs and runs[-1].stop == i:
                runs[-1] = slice(runs[-1].start, i + 1)
            else:
                runs.append(slice(i, i + 1))
        return runs


def _step_of(path: NoisePath, k: int, settings: Inversion) -> tuple[float, ...]:
    """One pair's values of a _Round."""
    source, destination = (path.levels[min(i, path.depth)] for i in (k, k + 1))
    h = destination.sigma - source.sigma
    averaged = {"mean": True, "last": False, "renoise": destination.timestep < settings.average_below}[settings.average]
    share = averaged / (settings.renoise_steps + 1)
    last = 1.0 - settings.renoise_steps * share
    if settings.solver == "ab2" and 0 < k < path.depth:
        share = -0.5 * h / (source.sigma - path.levels[k - 1].sigma)
        last = 1.0 - share
    noise = settings.noise * _ddim_deviation(source, destination) / destination.signal
    times = {"source": source.timestep, "destination": destination.timestep}
    return h, destination.signal, last, share, noise, times[settings.first_time], times[settings.renoise_time]


def _landing_of(path: NoisePath, m: int) -> tuple[float, ...]:
    """One pair's values of a _Landing; the terms in x_0 cancel here, in float64."""
    start, landing = path.levels[0], path.landings[m]
    land, at = path.levels[landing.step], landing.level
    ratio = land.signal / start.signal
    return ratio, land.signal, (ratio - at.signal) / at.noise, land.signal / at.noise


def _ddim_deviation(source: Level, destination: Level) -> float:
    """Standard deviation of a DDIM step with eta = 1 from ``destination`` down to ``source`` (InPO's noise unit)."""
    if destination.noise == 0.0 or source == destination:
        return 0.0
    share = (source.noise / destination.noise) ** 2
    return max(0.0, share * (1.0 - (destination.signal / source.signal) ** 2)) ** 0.5


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]
