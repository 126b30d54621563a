"""Noisy latents and targets of a step batch: by inversion, by random noise, or from stored trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.method import inversion
from smpo_fast.method.batch import Pairs, to_device
from smpo_fast.method.inversion import NoisePredictor, SolverOps
from smpo_fast.method.schedule import NoisePath
from smpo_fast.models import footprint
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.caller import InferenceCaller
from smpo_fast.training.loader import Loader
from smpo_fast.training.progress import CallHook
from smpo_fast.training.step_paths import StepPaths
from smpo_fast.training.trajectories import TrajectoryStore


class Noiser:
    """Computes x_t and tau of pairs. ``reference`` provides the frozen network while a phase needs it."""

    def __init__(
        self,
        config: Config,
        world: World,
        policy: Denoiser,
        reference: Callable[[], AbstractContextManager[Denoiser]],
        loader: Loader,
        store: TrajectoryStore | None,
        solver: SolverOps,
        before_call: CallHook,
    ) -> None:
        self._config, self._settings, self._world = config, config.inversion, world
        self._policy, self._reference, self._loader, self._store = policy, reference, loader, store
        self._solver, self._before_call = solver, before_call
        self._callers: dict[tuple[nn.Module, int], InferenceCaller] = {}
        self._copied: set[nn.Module] = set()  # networks whose copies of weights are those of this step

    def weights_changed(self) -> None:
        """To be called before the pairs of each step, which see the same weights."""
        self._copied.clear()

    def is_stored(self, step: int) -> bool:
        """Whether the trajectories of a step are read instead of computed."""
        return self._store is not None and self._store.has(step)

    def needs_reference(self, step: int) -> bool:
        """Whether the reference inverts the pairs of a step."""
        inverts = self._settings.source == "inversion" and self._settings.network == "reference"
        return inverts and not self.is_stored(step)

    def network_calls(self, paths: Sequence[NoisePath], step: int) -> int:
        """Network calls per pair, summed over paths: the work of a step's inversion."""
        if self.is_stored(step):
            return 0
        return sum(inversion.network_calls(path.depth, self._settings) for path in paths)

    @torch.no_grad()
    def __call__(self, pairs: Pairs, paths: StepPaths, step: int) -> tuple[Tensor, Tensor]:
        """x_t and tau of pairs of one shape at M landings, [M, B, 2, C, H, W]."""
        own = paths.of(pairs.places)
        if self._store is None:
            return self._compute(pairs, paths, step)
        tau = self._store.tau(step, pairs.places)
        if tau is None:
            tau = self._store.round(self._compute(pairs, paths, step)[1])
        return inversion.forward_noise(pairs.latents, tau, own), tau

    def _compute(self, pairs: Pairs, paths: StepPaths, step: int) -> tuple[Tensor, Tensor]:
        if self._settings.source == "inversion":
            return self._invert(pairs, paths, step)
        noise = self._loader.normals(step, "noise", (1, *pairs.latents.shape[2:]), pairs.places)
        tau = to_device(noise, self._world.device).expand_as(pairs.latents)[None]
        return inversion.forward_noise(pairs.latents, tau, paths.of(pairs.places)), tau

    def _invert(self, pairs: Pairs, paths: StepPaths, step: int) -> tuple[Tensor, Tensor]:
        active, latent_shape = paths.pairs_per_round(pairs.places), tuple(pairs.latents.shape[1:])
        chunk = self._chunk_size(pairs)

        def added_noise(rows: slice) -> Tensor:
            normals = self._loader.normals(step, "inversion", (len(active), *latent_shape), pairs.places[rows])
            return to_device(normals, self._world.device).transpose(0, 1)

        with self._inverting_network(chunk) as caller:
            if caller.denoiser.unet not in self._copied:  # the copies belong to the network: all its callers share them
                caller.weights_changed()
                self._copied.add(caller.denoiser.unet)

            def network(rows: slice) -> NoisePredictor:
                predict = caller.predictor(pairs.cond.take(rows))

                def hooked(x: Tensor, timesteps: Tensor, *, refinement: bool = False) -> Tensor:
                    self._before_call(len(x))
                    return predict(x, timesteps, refinement=refinement)

                return hooked

            return inversion.invert(
                network, pairs.latents, paths.of(pairs.places), self._settings, chunk=chunk, active=active,
                noise=added_noise, solver=self._solver, dtype=caller.input_dtype,
            )  # fmt: skip

    @contextmanager
    def _inverting_network(self, chunk: int) -> Iterator[InferenceCaller]:
        if self._settings.network == "reference":
            with self._reference() as reference:
                yield self._caller(reference, chunk)
        else:
            self._policy.unet.eval()
            yield self._caller(self._policy, chunk)

    def _caller(self, denoiser: Denoiser, chunk: int) -> InferenceCaller:
        key = (denoiser.unet, chunk)
        if key not in self._callers:
            self._callers[key] = InferenceCaller(denoiser, self._config.model, self._settings, chunk=chunk)
        return self._callers[key]

    def _chunk_size(self, pairs: Pairs) -> int:
        """Pairs in a no-gradient call: as set, or as many as fit into ``batch.inversion_gb``."""
        batch, unet = self._config.batch, cast(Any, self._policy.unet)
        if batch.inversion_pairs:
            return batch.inversion_pairs
        return footprint.inversion_pairs_within(
            dict(unet.config), "sdxl" if pairs.cond.pooled is not None else "sd15", tuple(pairs.latents.shape[2:]),
            tuple(pairs.cond.prompt.shape[1:]), self._policy.dtype, batch.inversion_gb,
        )  # fmt: skip
