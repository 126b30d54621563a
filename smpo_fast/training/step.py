"""One optimizer step of SmPO, as the paper has it: a window of pairs, phase after phase.

All pairs of a step see the same weights, so nothing changes when the step is done in phases: (1) invert all pairs, in
large batches without gradients; (2) take the reference's errors, two numbers an example; (3) predict with the policy
and back-propagate, in micro-batches. Between the phases the host never asks the device for a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from smpo_fast.common.runtime import StopSignal, World
from smpo_fast.config.schema import Config, Optim
from smpo_fast.engine.protocol import Engine, StepResult
from smpo_fast.method import inversion
from smpo_fast.method.batch import Pairs, to_device
from smpo_fast.method.inversion import NoisePredictor
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.method.schedule import NoisePath, NoiseSchedule
from smpo_fast.models import footprint, step_ops
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import compilation
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.training.loader import Loader
from smpo_fast.training.metrics import Meter, StepTable
from smpo_fast.training.prefetch import Prefetcher
from smpo_fast.training.progress import StepProgress
from smpo_fast.training.trajectories import TrajectoryStore

TRAINING_COST = 3  # of a forward and backward pass, in forward passes: for the bar


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or falling to 0 at the end of the run."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    done = max(0.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr * warm * decay


@dataclass(frozen=True)
class Examples:
    """Pairs at one timestep each: what a loss is made of. Shapes as in ``batch``; x_t and tau like the latents."""

    pairs: Pairs
    x_t: Tensor
    tau: Tensor
    time: Tensor  # [B]
    times: tuple[int, ...]  # the same on the host

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: slice) -> Examples:
        """Some of the examples."""
        return Examples(self.pairs.take(rows), self.x_t[rows], self.tau[rows], self.time[rows], self.times[rows])


@dataclass
class Trainer:
    """Makes optimizer steps. ``reference`` gives the frozen network for as long as a phase needs it."""

    config: Config
    world: World
    schedule: NoiseSchedule
    engine: Engine
    policy: Denoiser
    reference: Callable[[], AbstractContextManager[Denoiser]]
    loader: Loader
    store: TrajectoryStore | None
    stop: StopSignal
    bar: tqdm

    def __post_init__(self) -> None:
        self.objective = OBJECTIVES[self.config.objective.name]
        self.ops = step_ops.select_ops(self.config)
        self.meter = Meter(self.world)
        self._step_paths = lru_cache(maxsize=1)(self._drawn_paths)
        self.draw = Prefetcher(self.loader.window, self.world.device, self.config.run.steps)
        self._callers: dict[tuple[nn.Module, int], InferenceCaller] = {}
        self._work = StepProgress(self.bar, 0, 1)

    def step(self, step: int) -> tuple[StepResult, StepTable, dict[str, float]]:
        """Train on the pairs of a step; returns the engine's result, the step's table and seconds per phase."""
        with self.meter.phase("load"):
            window = self.draw(step)
        self._work = StepProgress(self.bar, self.config.batch.pairs_per_step, self._calls(step, window))
        with self._reference_for_both_phases(step):
            with self.meter.phase("inversion"):
                examples = [e for pairs in window for e in self.examples(pairs, step)]
            with self.meter.phase("reference"):
                frozen = self.reference_errors(examples, step)
        with self.meter.phase("policy"):
            self.backward(examples, frozen)
        with self.meter.phase("optimizer"):
            result = self.engine.step(learning_rate(self.config.optim, step, self.config.run.steps))
        return result, *self.meter.flush()

    def _reference_for_both_phases(self, step: int) -> AbstractContextManager[Any]:
        """Held from one phase into the next where both need it: a streamed reference is then copied once."""
        settings = self.config.inversion
        if settings.source == "noise" or settings.network == "policy" or (self.store and self.store.has(step)):
            return nullcontext()
        return self.reference()

    # --- phase 1: where the examples lie ----------------------------------------------------------------------

    def examples(self, pairs: Pairs, step: int) -> list[Examples]:
        """What pairs of one shape are trained on: a set of examples for each landing of their trajectories."""
        paths, active = self.paths(step, pairs.places)
        x_t, tau = self.trajectory(pairs, paths, active, step)
        times = [tuple(p.landings[m].level.timestep for p in paths) for m in range(len(x_t))]
        on_device = to_device(torch.tensor(times), self.world.device)
        return [Examples(pairs, *landing) for landing in zip(x_t, tau, on_device, times, strict=True)]

    def paths(self, step: int, places: Sequence[int]) -> tuple[list[NoisePath], list[int]]:
        """Noise paths of this rank's pairs at ``places`` of a step, deepest first, and pairs per round of any rank."""
        world, paths = self.world, self._step_paths(step)
        by_rank = [[paths[rank + world.size * place] for place in places] for rank in range(world.size)]
        moving = zip_longest(*(inversion.active_counts(p) for p in by_rank), fillvalue=0)
        return by_rank[world.rank], [max(n) for n in moving]

    def _drawn_paths(self, step: int) -> list[NoisePath]:
        """The noise paths of a step's pairs on all ranks."""
        c = self.config
        return self.schedule.paths(c.batch.pairs_per_step, c.inversion, c.run.seed, step)

    @torch.no_grad()
    def trajectory(
        self, pairs: Pairs, paths: Sequence[NoisePath], active: Sequence[int], step: int
    ) -> tuple[Tensor, Tensor]:
        """x_t and tau, [M, B, 2, C, H, W]: by inversion, by adding the same noise to both pictures, or as stored."""
        if self.store is not None:
            tau = self.store.tau(step, pairs.places)
            if tau is None:
                tau = self.store.round(self._noise_of(pairs, paths, active, step)[1])
            else:
                self._work.advance(sum(inversion.network_calls(p.depth, self.config.inversion) for p in paths))
            return inversion.forward_noise(pairs.latents, tau, paths), tau
        return self._noise_of(pairs, paths, active, step)

    def _noise_of(
        self, pairs: Pairs, paths: Sequence[NoisePath], active: Sequence[int], step: int
    ) -> tuple[Tensor, Tensor]:
        if self.config.inversion.source == "inversion":
            return self._invert(pairs, paths, active, step)
        noise = self.loader.normals(step, "noise", (1, *pairs.latents.shape[2:]), pairs.places)
        tau = to_device(noise, self.world.device).expand_as(pairs.latents)[None]
        return inversion.forward_noise(pairs.latents, tau, paths), tau

    def _invert(
        self, pairs: Pairs, paths: Sequence[NoisePath], active: Sequence[int], step: int
    ) -> tuple[Tensor, Tensor]:
        settings, picture = self.config.inversion, tuple(pairs.latents.shape[1:])

        def normals(rows: slice) -> Tensor:
            draws = self.loader.normals(step, "inversion", (len(active), *picture), pairs.places[rows])
            return to_device(draws, self.world.device).transpose(0, 1)

        chunk = self._chunk(pairs)
        with self._inverter(chunk) as caller:
            caller.weights_changed()

            def network(rows: slice) -> NoisePredictor:
                eps = caller.predictor(pairs.cond.take(rows))

                def observed(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
                    self.stop.check()
                    self._work.advance(len(x))
                    return eps(x, timesteps, refinement=refinement)

                return observed

            return inversion.invert(
                network, pairs.latents, paths, settings, chunk=chunk, active=active,
                noise=normals, solver=self.ops.solver, dtype=caller.input_dtype,
            )  # fmt: skip

    @contextmanager
    def _inverter(self, chunk: int) -> Iterator[InferenceCaller]:
        if self.config.inversion.network == "reference":
            with self.reference() as reference:
                yield self._caller(reference, chunk)
        else:
            self.policy.unet.eval()
            yield self._caller(self.policy, chunk)

    def _caller(self, denoiser: Denoiser, chunk: int) -> InferenceCaller:
        key = (denoiser.unet, chunk)
        if key not in self._callers:
            self._callers[key] = InferenceCaller(denoiser, self.config.model, self.config.inversion, chunk=chunk)
        return self._callers[key]

    def _chunk(self, pairs: Pairs) -> int:
        """Pairs in a no-gradient call: as set, or what ``batch.inversion_gb`` has room for."""
        batch, unet = self.config.batch, cast(Any, self.policy.unet)
        if batch.inversion_pairs:
            return batch.inversion_pairs
        return footprint.inversion_pairs_within(
            dict(unet.config), "sdxl" if pairs.cond.pooled is not None else "sd15", tuple(pairs.latents.shape[2:]),
            tuple(pairs.cond.prompt.shape[1:]), self.policy.dtype, batch.inversion_gb,
        )  # fmt: skip

    # --- phase 2: the reference's errors ----------------------------------------------------------------------

    @torch.no_grad()
    def reference_errors(self, examples: Sequence[Examples], step: int) -> list[Tensor | None]:
        """The reference's errors [B, 2] of each set of examples; None where the objective needs none.

        It is asked in the micro-batches of the policy: equal weights then give equal errors, bit for bit.
        """
        if not self.objective.needs_reference:
            return [None] * len(examples)
        if self.store is not None and (stored := self._stored_errors(self.store, examples, step)) is not None:
            return stored
        with self.reference() as reference:
            frozen = [torch.cat([self._errors(reference, micro) for micro in self._micro(e)]) for e in examples]
        if self.store is not None:
            self.store.write(step, list(_by_pairs(examples, frozen)))
        return list(frozen)

    def _stored_errors(
        self, store: TrajectoryStore, examples: Sequence[Examples], step: int
    ) -> list[Tensor | None] | None:
        found: list[Tensor | None] = []
        for _, group in groupby(examples, key=lambda e: id(e.pairs)):
            errors = store.errors(step, next(group).pairs.places)
            if errors is None:
                return None
            found += errors.unbind()
        self._work.advance(sum(map(len, examples)))
        return found

    def _errors(self, reference: Denoiser, e: Examples) -> Tensor:
        self.stop.check()
        self._work.advance(len(e))
        with compilation.through_policy_code(self.config.model):
            prediction = reference(e.x_t, e.time, e.pairs.cond).detach()
        return self.ops.pair_errors(prediction, self._target(e))

    # --- phase 3: the policy's gradient -----------------------------------------------------------------------

    def backward(self, examples: Sequence[Examples], frozen: Sequence[Tensor | None]) -> None:
        """Predictions of the policy, the pairs' losses and their mean's gradient, a micro-batch at a time."""
        self.policy.unet.train()
        total, done, beta = sum(map(len, examples)), 0, self.config.objective.beta
        for e, reference in zip(examples, frozen, strict=True):
            errors = iter([None] * len(e) if reference is None else reference.split(self.config.batch.micro_pairs))
            for micro in self._micro(e):
                self.stop.check()
                done += len(micro)
                weight = self.objective.weigh(micro.pairs.weight)
                prediction = self.policy(micro.x_t, micro.time, micro.pairs.cond)
                out = self.ops.pair_loss(prediction, next(errors), self._target(micro), weight, beta)
                self.engine.backward(out.loss.sum() / total, last=done == total)
                self.meter.add(
                    micro.pairs.ids, micro.times,
                    loss=out.loss, logit=out.logit, weight=weight,
                    policy_w=out.policy[:, 0], policy_l=out.policy[:, 1],
                    reference_w=out.reference[:, 0], reference_l=out.reference[:, 1],
                )  # fmt: skip
                self._work.advance(TRAINING_COST * len(micro))

    def _micro(self, e: Examples) -> Iterator[Examples]:
        size = self.config.batch.micro_pairs
        return (e.take(slice(first, first + size)) for first in range(0, len(e), size))

    def _target(self, e: Examples) -> Tensor:
        return self.policy.target(e.pairs.latents, e.tau, e.time)

    def _calls(self, step: int, window: Sequence[Pairs]) -> int:
        """A step's work in forward passes of a pair, for the bar."""
        paths = [p for pairs in window for p in self.paths(step, pairs.places)[0]]
        inverted = sum(inversion.network_calls(p.depth, self.config.inversion) for p in paths)
        return inverted + (TRAINING_COST + self.objective.needs_reference) * sum(len(p.landings) for p in paths)


def _by_pairs(
    examples: Sequence[Examples], errors: Sequence[Tensor]
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Of each shape's pairs their places, tau and errors, with a row for each landing."""
    for _, group in groupby(zip(examples, errors, strict=True), key=lambda item: id(item[0].pairs)):
        sets, frozen = zip(*group, strict=True)
        yield sets[0].pairs.places, torch.stack([e.tau for e in sets]), torch.stack(frozen)
