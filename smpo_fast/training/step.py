"""One optimizer step of SmPO-Diffusion (Lu et al., ICML 2025, arXiv 2506.02698) on a step batch of pairs.

All pairs of a step see the same weights, so each phase runs over the whole step batch before the next one begins:
inversion in large batches without gradients; the reference's errors, two numbers per example; then the policy's
gradient, in micro-batches. Between the phases the host never reads a number from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.protocol import Engine, StepResult
from smpo_fast.method.batch import Pairs, to_device
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import attention
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import compilation
from smpo_fast.models.step_ops import StepOps
from smpo_fast.training.examples import Examples, MicroBatch, micro_batches
from smpo_fast.training.learning_rate import learning_rate
from smpo_fast.training.loader import Loader
from smpo_fast.training.metrics import Meter, StepTable
from smpo_fast.training.noising import Noiser
from smpo_fast.training.prefetch import Prefetcher
from smpo_fast.training.progress import CallHook
from smpo_fast.training.step_paths import StepPaths
from smpo_fast.training.trajectories import TrajectoryStore

TRAINING_COST = 3  # of a forward and backward pass, in forward passes


@dataclass
class Trainer:
    """Makes optimizer steps. ``reference`` provides the frozen network while a phase needs it."""

    config: Config
    world: World
    schedule: NoiseSchedule
    engine: Engine
    policy: Denoiser
    reference: Callable[[], AbstractContextManager[Denoiser]]
    loader: Loader
    store: TrajectoryStore | None
    before_call: CallHook
    ops: StepOps

    def __post_init__(self) -> None:
        self.objective = OBJECTIVES[self.config.objective.name]
        self.meter = Meter(self.world)
        self.step_batch = Prefetcher(self.loader.step_batch, self.world.device, self.config.run.steps)
        self.noiser = Noiser(
            self.config, self.world, self.policy, self.reference, self.loader, self.store, self.ops.solver,
            self.before_call,
        )  # fmt: skip

    def step(self, step: int) -> tuple[StepResult, StepTable, dict[str, float]]:
        """Train on the step batch; returns the engine's result, the table of the step and seconds per phase."""
        with self.meter.phase("load"):
            step_batch = self.step_batch(step)
        paths = self.noise_paths(step)
        self.before_call.begin_step(self.config.batch.pairs_per_step, self._work(step, step_batch, paths))
        with self._reference_for_both_phases(step):
            with self.meter.phase("inversion"):
                examples = self.invert(step, step_batch, paths)
            with self.meter.phase("reference"):
                reference_errors = self.reference_errors(step, examples)
        with self.meter.phase("policy"):
            self.policy_gradient(examples, reference_errors)
        with self.meter.phase("optimizer"):
            result = self.engine.step(learning_rate(self.config.optim, step, self.config.run.steps))
        return result, *self.meter.flush()

    def noise_paths(self, step: int) -> StepPaths:
        """From the clean latents of each pair of the step to its landing timesteps."""
        c = self.config
        return StepPaths(self.schedule.paths(c.batch.pairs_per_step, c.inversion, c.run.seed, step), self.world)

    def invert(self, step: int, step_batch: Sequence[Pairs], paths: StepPaths) -> list[Examples]:
        """The examples of the step batch: of the pairs of each shape, one set for every landing of their paths."""
        self.noiser.weights_changed()
        return [examples for pairs in step_batch for examples in self._landings(step, pairs, paths)]

    def _landings(self, step: int, pairs: Pairs, paths: StepPaths) -> Iterator[Examples]:
        x_t, tau = self.noiser(pairs, paths, step)
        times = [tuple(path.landings[m].level.timestep for path in paths.of(pairs.places)) for m in range(len(x_t))]
        for landing in zip(x_t, tau, to_device(torch.tensor(times), self.world.device), times, strict=True):
            yield Examples(pairs, *landing)

    @torch.no_grad()
    def reference_errors(self, step: int, examples: Sequence[Examples]) -> list[Tensor] | list[None]:
        """The reference's errors [B, 2] of each set of examples; None where the objective needs none.

        They are computed in the micro-batches of the policy: equal weights then give equal errors, bit for bit.
        """
        if not self.objective.needs_reference:
            return [None] * len(examples)
        if self.store is not None and (stored := self.store.reference_errors(step, examples)) is not None:
            return stored
        with self.reference() as reference:
            errors = [torch.cat([self._errors(reference, micro) for micro in self._micro_batches(e)]) for e in examples]
        if self.store is not None:
            self.store.write_examples(step, examples, errors)
        return errors

    def _errors(self, reference: Denoiser, micro: MicroBatch) -> Tensor:
        self.before_call(len(micro.examples))
        with compilation.through_policy_code(self.config.model):
            prediction = reference.predict(micro.x_t, micro.timesteps, micro.inputs.unet).detach()
        return self.ops.pair_errors(prediction, micro.target)

    def policy_gradient(self, examples: Sequence[Examples], reference_errors: Sequence[Tensor | None]) -> None:
        """Back-propagate the mean loss of all examples, one micro-batch at a time.

        reference_errors: [B, 2] of each set of examples, or None.
        """
        self.policy.unet.train()
        total, done, beta = sum(map(len, examples)), 0, self.config.objective.beta
        for e, errors in zip(examples, reference_errors, strict=True):
            frozen = iter([None] * len(e) if errors is None else errors.split(self.config.batch.micro_pairs))
            for micro in self._micro_batches(e):
                trained = micro.examples
                self.before_call(len(trained), cost=TRAINING_COST)
                done += len(trained)
                prediction = self.policy.predict(micro.x_t, micro.timesteps, micro.inputs.unet)
                out = self.ops.pair_loss(prediction, next(frozen), micro.target, micro.weight, beta)
                with attention.preferred(self.policy.unet):  # checkpointing repeats the forward pass in here
                    self.engine.backward(out.loss.sum() / total, last=done == total)
                self.meter.add(
                    trained.pairs.ids, trained.times,
                    loss=out.loss, logit=out.logit, weight=micro.weight,
                    policy_w=out.policy[:, 0], policy_l=out.policy[:, 1],
                    reference_w=out.reference[:, 0], reference_l=out.reference[:, 1],
                )  # fmt: skip

    def _micro_batches(self, examples: Examples) -> Iterator[MicroBatch]:
        return micro_batches(examples, self.config.batch.micro_pairs, self.policy, self.objective)

    def _reference_for_both_phases(self, step: int) -> AbstractContextManager[object]:
        """Where the reference inverts too, it stays in place for both phases: a streamed one is copied only once."""
        return self.reference() if self.noiser.needs_reference(step) else nullcontext()

    def _work(self, step: int, step_batch: Sequence[Pairs], paths: StepPaths) -> int:
        """Forward passes of a pair that this rank's share of the step costs."""
        own = [path for pairs in step_batch for path in paths.of(pairs.places)]
        compared = self.objective.needs_reference and not self.noiser.is_stored(step)
        return self.noiser.network_calls(own, step) + (TRAINING_COST + compared) * sum(len(p.landings) for p in own)
