"""A trainer on synthetic pairs: the step, the engine and the loader are the real ones, the pairs random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config.schema import Config
from smpo_fast.engine import create
from smpo_fast.models import step_ops
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import compilation
from smpo_fast.models.locate import ModelSource, schedule_of
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.training import reference
from smpo_fast.training.loader import Loader
from smpo_fast.training.policy import load_policy
from smpo_fast.training.progress import CallHook
from smpo_fast.training.step import Trainer


class SyntheticCache:
    """A prepared cache of random pairs in memory: the part of ``CachedPairs`` that ``Loader`` uses."""

    def __init__(self, network: NetworkSpec, resolution: int, pairs: int, seed: int = 6) -> None:
        generator = np.random.default_rng(seed)

        def normal(*shape: int) -> Any:
            return generator.standard_normal(shape, dtype=np.float32).astype(np.float16)

        self.rows = np.arange(pairs)
        self.rewards = generator.random((pairs, IMAGES_PER_PAIR))
        self.labels = np.full(pairs, np.nan)
        self.prompt_index = np.arange(1, pairs + 1)
        self.shapes = np.zeros(pairs, np.int32)
        self.pixels = np.array([[resolution, resolution]])
        self.frames = np.tile(np.array([resolution, resolution, 0, 0, 0]), (pairs, IMAGES_PER_PAIR, 1))
        self._mean = normal(pairs, IMAGES_PER_PAIR, *network.latent)
        self._prompts = normal(pairs + 1, *network.prompt)
        self._pooled = normal(pairs + 1, network.pooled) if network.kind == "sdxl" else None

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self, index: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of some pairs, [B, 2, C, H, W]; flips are ignored."""
        mean = torch.from_numpy(self._mean[index]).float()
        return mean, torch.full_like(mean, 0.05)

    def prompts(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Prompts [B, S, D] and, for SDXL, pooled prompts [B, E]."""
        pooled = None if self._pooled is None else torch.from_numpy(self._pooled[list(indices)]).float()
        return torch.from_numpy(self._prompts[list(indices)]).float(), pooled


class NoSignals:
    """Replaces ``StopSignal``; never stops."""

    def check(self) -> None:
        """Never stops."""


def synthetic_loader(settings: Config, network: NetworkSpec) -> Loader:
    """A loader of random pairs, enough for one step of one process."""
    pairs = max(16, settings.batch.pairs_per_step)
    return Loader(cast(Any, SyntheticCache(network, settings.data.resolution, pairs)), settings, World())


def synthetic_trainer(
    settings: Config, source: ModelSource, network: NetworkSpec, precision: str, device: torch.device, where: str
) -> Trainer:
    """A trainer of one process without DeepSpeed, ready for ``step(0)``.

    where: where the reference is kept (``training.reference.resolve``). Raises UserError like the functions that a run
    calls.
    """
    world, schedule = World(device=device), schedule_of(source, settings.inversion)
    as_denoiser = partial(Denoiser, source=source, schedule=schedule, precision=precision, device=device)
    policy = load_policy(settings, source, precision, device)
    engine = create.make_engine(policy, settings, world, precision, None)
    frozen = reference.make_reference(where, settings, source, world, precision, engine.unet, as_denoiser, None)
    if settings.model.compile == "all":
        with frozen() as compared:
            compilation.compile_training(engine.unet, compared.unet)
    loader, before_call = synthetic_loader(settings, network), CallHook(cast(Any, NoSignals()), tqdm(disable=True))
    kernels = step_ops.resolve(settings, device, COMPUTE_DTYPES[precision], network.latent).enabled
    ops = step_ops.select_ops(settings, kernels)
    return Trainer(settings, world, schedule, engine, as_denoiser(engine.unet), frozen, loader, None, before_call, ops)
