"""Inversion: from clean latents up to their landing timesteps, along the probability-flow ODE.

SmPO (arXiv 2506.02698) trains on a noisy latent ``x_t`` that the policy itself maps back to ``x_0``, and on the target
``tau = (x_t - signal_t x_0) / noise_t``. In ``y = x / signal`` a DDIM step is ``y += h * estimate`` with
``h = sigma_{k+1} - sigma_k``, so the state kept for each image is the float32 sum ``S = sum_k h_k * estimate_k``::

    x_level = signal_level * (x_0 / signal_start + S)
    tau     = S / sigma_t                                  when the path ends exactly on t

``tau`` is the sigma-weighted mean of the noise predictions along the path. Taking it from S avoids the cancellation
in ``x_t - signal_t x_0``. The solvers differ in the estimate alone:

=======  ========================================================================================  =====  ============
solver   estimate of a step from ``source`` to ``destination``                                     order  calls a step
=======  ========================================================================================  =====  ============
ddim     ``e_0 = eps(x, source)``: the DDIM step run upwards (arXiv 2010.02502)                     1      1
renoise  ``e_0``, then K times ``e_k = eps(x + h e_{k-1}, destination)`` from the same x; below      1      1 + K
         ``average_below`` their mean, above it the last one (ReNoise, arXiv 2403.14602)
heun     renoise with K = 1 and always the mean: the trapezoidal (Heun) step                        2      2
ab2      Adams-Bashforth: ``e_0`` and the previous step's ``e'_0``, extrapolated linearly in        2      1
         ``atan(sigma)`` and integrated over the step; the first step is heun: near the clean
         latent sigma grows like the square root of the timestep, and a first step of order 1
         would leave the whole path at order 1
pec      UniPC of order 1 run upwards (arXiv 2302.04867): predict with the previous step's last     2      1
         estimate (UniP-1), evaluate once at the destination, correct with the mean of the two
         (UniC-1); the first step is heun
=======  ========================================================================================  =====  ============

The paper and the released script use renoise with K = 1. The paper's rule (mean below 250, last above) is of order 1,
as is K > 1; only the mean with K = 1 is of order 2. ``average = "angle"`` weighs the two estimates of renoise, heun or
pec by the same rule as ab2's: with the noise level far apart, the estimate at the noisier end counts more.

The pairs are processed in chunks, each through all of its steps before the next one begins, so that whatever depends
on the prompts alone is computed once per chunk. Chunks are ragged: pairs are sorted by path length, deepest first, and
in step k only a prefix of the chunk still moves. The arithmetic between two network calls is a ``SolverOps``: eager
code (``EAGER_OPS``) or a fused kernel of the same two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from smpo_fast.config.schema import Inversion
from smpo_fast.method.batch import to_device
from smpo_fast.method.coefficients import CoefficientTable
from smpo_fast.method.schedule import NoisePath


class NoisePredictor(Protocol):
    """The network for a chunk of pairs: it predicts the noise in the latents of the chunk's first n pairs.

    x: [n, 2, C, H, W], timesteps: [n, 2] int64 on the device, contiguous; returns a new float32 tensor like x.
    ``refinement``: this call re-evaluates nearly the x of the previous call, within the same solver step.
    """

    def __call__(self, x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor: ...


PredictorFactory = Callable[[slice], NoisePredictor]
"""Given a chunk's rows in the batch, the network for those pairs."""


class SolverOps(NamedTuple):
    """The arithmetic between two network calls; both functions write in place and return nothing.

    predict(x, x_0, S, signal, inverse_start[, estimate, h[, earlier]]):
    ``x = signal (x_0 inverse_start + S + h estimate)`` and ``earlier += estimate``.
    correct(x, x_0, S, signal, inverse_start, estimate, h[, earlier, (a, b)]):
    ``S += h (a estimate + b earlier)``, then ``x = signal (x_0 inverse_start + S)``.
    """

    predict: Callable[..., None]
    correct: Callable[..., None]


def _predict(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor,
    estimate: Tensor | None = None, h: Tensor | None = None, earlier: Tensor | None = None,
) -> None:  # fmt: skip
    clean = x_0 * inverse_start + total
    if estimate is not None and h is not None:
        clean = clean + h * estimate
        if earlier is not None:
            earlier.add_(estimate)
    x.copy_(signal * clean)


def _correct(
    x: Tensor, x_0: Tensor, total: Tensor, signal: Tensor, inverse_start: Tensor, estimate: Tensor, h: Tensor,
    earlier: Tensor | None = None, weights: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    if earlier is not None and weights is not None:
        estimate = weights[0] * estimate + weights[1] * earlier
    total.add_(h * estimate)
    x.copy_(signal * (x_0 * inverse_start + total))


EAGER_OPS = SolverOps(_predict, _correct)


def active_counts(paths: Sequence[NoisePath]) -> list[int]:
    """How many pairs still move in solver step k: those whose path has more than k steps.

    Raises ValueError when the paths are not sorted deepest first.
    """
    depths = [p.depth for p in paths]
    if depths != sorted(depths, reverse=True):
        raise ValueError("paths must be sorted deepest first, so that the pairs that move are a prefix")
    return [sum(d > k for d in depths) for k in range(max(depths, default=0))]


def network_calls(depth: int, settings: Inversion) -> int:
    """Network calls that an image's path of ``depth`` solver steps takes."""
    if settings.solver in ("ab2", "pec"):
        return depth + 1  # the first step is heun
    return depth * (1 + settings.renoise_steps)


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
    """Noisy latents and targets of a batch of pairs.

    x_0: [B, 2, C, H, W] float32.
    paths: one per pair, each with M landing points, deepest first.
    chunk: pairs in one network call.
    active: in solver step k at least ``active[k]`` pairs go through the network. Ranks that must make equally many
        calls agree on it; pairs that have already landed move by zero.
    noise: gives standard normals of a chunk, [steps, n, 2, C, H, W]; needed where ``settings.noise`` is not 0 (InPO).
    dtype: of the x that the network is given; the state stays float32.

    Returns x_t and tau, both [M, B, 2, C, H, W], lowest timestep first, with ``x_t = signal_t x_0 + noise_t tau``.
    """
    counts = [max(a, b) for a, b in zip_longest(active_counts(paths), active, fillvalue=0)]
    table = CoefficientTable(paths, len(counts), settings, x_0.device)
    x_t, tau = (torch.empty(len(paths[0].landings), *x_0.shape, device=x_0.device) for _ in range(2))
    for first in range(0, len(paths), chunk):
        rows = slice(first, min(first + chunk, len(paths)))
        inversion = _ChunkInversion(network(rows), solver, x_0[rows], table, rows, settings, dtype)
        normals = noise(rows) if settings.noise and noise is not None else ()
        for k, n in enumerate(min(n, rows.stop) - first for n in counts if n > first):
            inversion.step(k, n, normals[k] if k < len(normals) else None)
        x_t[:, rows], tau[:, rows] = inversion.landed()
    return x_t, tau


def forward_noise(x_0: Tensor, tau: Tensor, paths: Sequence[NoisePath]) -> Tensor:
    """``x_t = signal_t x_0 + noise_t tau`` for given noise, as in Diffusion-DPO (arXiv 2311.12908).

    x_0: [B, 2, C, H, W]; tau: [M, B, 2, C, H, W], for each landing point of the paths. Returns x_t, like tau.
    """
    levels = np.array([[(landing.level.signal, landing.level.noise) for landing in p.landings] for p in paths])
    table = to_device(torch.from_numpy(levels.T.astype(np.float32)), x_0.device)  # [2, M, B]
    signal, noise = table[..., None, None, None, None]
    return signal * x_0 + noise * tau


class _ChunkInversion:
    """The state of one chunk of pairs while it is inverted; in each solver step its first n pairs move."""

    def __init__(
        self,
        eps: NoisePredictor,
        solver: SolverOps,
        x_0: Tensor,
        table: CoefficientTable,
        rows: slice,
        settings: Inversion,
        dtype: torch.dtype,
    ) -> None:
        self.eps, self.solver, self.x_0, self.settings, self.table, self.rows = eps, solver, x_0, settings, table, rows
        self.total = torch.zeros(x_0.shape, device=x_0.device)  # S
        self.x = torch.empty(x_0.shape, dtype=dtype, device=x_0.device)
        self.start = table.start(rows)
        self._previous: Tensor | None = None  # the previous step's first estimate for ab2, its last one for pec
        # S at all landing points but the last, which is self.total when the chunk is done
        self._landed = {m: torch.zeros_like(self.total) for m in range(table.landings - 1)}
        solver.predict(self.x, x_0, self.total, self.start.signal, self.start.inverse_signal)

    def step(self, k: int, n: int, noise: Tensor | None) -> None:
        """Solver step k of the first n pairs; noise: standard normals [n or more, 2, C, H, W], or None."""
        c = self.table.step(k, slice(self.rows.start, self.rows.start + n))
        x, total = self.x[:n], self.total[:n]
        state = (x, self.x_0[:n], total, c.signal, self.start.inverse_signal[:n])
        previous = None if self._previous is None else self._previous[:n]

        # the first estimate: at the source, or for pec the one that the previous step ended with
        reused = previous if self.settings.solver == "pec" else None
        estimate = self.eps(x, c.first_time) if reused is None else reused
        # further estimates, each at the point that the one before it leads to; all but the last are summed up
        earlier, at_source = None, estimate
        starts = self.settings.solver == "ab2" and previous is None
        for i in range(1 if starts else self.settings.renoise_steps):
            self.solver.predict(*state, estimate, c.h, earlier)
            earlier = estimate if earlier is None else earlier
            estimate = self.eps(x, c.renoise_time, refinement=i > 0 or reused is None)
        if self.settings.solver == "ab2" and not starts:
            earlier = previous

        weighted = () if earlier is None else (earlier, (c.last, c.earlier))
        self.solver.correct(*state, estimate, c.h, *weighted)
        if self.settings.solver in ("ab2", "pec"):
            self._previous = at_source if self.settings.solver == "ab2" else estimate
        if noise is not None:
            total += c.noise * noise[:n]
            self.solver.predict(*state)
        for m, landed in self._landed.items():
            for run in self.table.landing_at(m, k + 1, self.rows):
                landed[run] = self.total[run]

    def landed(self) -> tuple[Tensor, Tensor]:
        """x_t and tau at all landing points, [M, n, 2, C, H, W]."""
        totals = torch.stack([*self._landed.values(), self.total])
        c = self.table.landing(self.rows)
        return c.x_0 * self.x_0 + c.total * totals, c.tau_x_0 * self.x_0 + c.tau_total * totals
