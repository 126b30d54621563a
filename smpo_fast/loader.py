"""Which pairs a step sees, in which order, and with which draws: a pure function of (seed, step).

A run visits positions 0, 1, 2, ...: step ``s`` owns positions ``s*P .. (s+1)*P - 1`` and rank ``r`` of ``R`` takes
every R-th of them. Position ``v`` is pair ``permutation(seed, v // N)[v % N]``; flips, prompt dropout and the VAE's
sample are functions of (seed, position). Nothing depends on the rank, the number of ranks or what ran before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from smpo_fast.batch import Conditioning, Pairs
from smpo_fast.cache import CachedPairs
from smpo_fast.config import Config
from smpo_fast.labels import weigh
from smpo_fast.runtime import World, rng, uniform

EMPTY_PROMPT = 0


class Loader:
    """Windows of pairs from a prepared cache.

    Raises SettingsError when the labels' settings leave no pair to train on.
    """

    def __init__(self, cache: CachedPairs, config: Config, world: World) -> None:
        self.cache, self.world = cache, world
        self.seed, self.data, self.pairs_per_step = config.run.seed, config.data, config.batch.pairs_per_step
        self.labels = weigh(config.labels, cache.rewards, cache.labels)
        self.used = np.flatnonzero(self.labels.used)
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: rng(self.seed, "order", epoch).permutation(len(self.used))
        )

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self.used)

    def positions(self, step: int) -> range:
        """This rank's positions of a step."""
        start = step * self.pairs_per_step
        return range(start + self.world.rank, start + self.pairs_per_step, self.world.size)

    def window(self, step: int) -> list[Pairs]:
        """This rank's pairs of a step, winner first, on the rank's device: one entry for each shape of latents."""
        positions = self.positions(step)
        index = np.array([self.used[self._permutation(p // len(self))[p % len(self)]] for p in positions])
        latents = self._latents(index, positions)
        prompts = [self._prompt(i, p) for i, p in zip(index, positions, strict=True)]
        weight = torch.from_numpy(self.labels.weight[index]).to(self.world.device)
        ids = tuple(int(row) for row in self.cache.rows[index])
        places = tuple(range(len(index)))
        return [Pairs(ids, latents.to(self.world.device), self._conditioning(prompts), weight, places)]

    def _latents(self, index: np.ndarray, positions: range) -> Tensor:
        """Samples of the VAE's posteriors, [B, 2, C, H, W]: winner first, each picture flipped or not."""
        flips = np.array([rng(self.seed, "flip", p).random(2) < 0.5 for p in positions]) & self.data.flip
        mean, std = self.cache.moments(index, flips)
        shape = mean.shape[1:]
        normal = np.stack([rng(self.seed, "vae", p).standard_normal(shape, dtype=np.float32) for p in positions])
        sample = mean + std * torch.from_numpy(normal)
        order = torch.from_numpy(np.stack([self.labels.winner[index], 1 - self.labels.winner[index]], 1)).long()
        return sample[torch.arange(len(index))[:, None], order]

    def _prompt(self, index: int, position: int) -> int:
        dropped = uniform(self.seed, "prompt", position) < self.data.prompt_dropout
        return EMPTY_PROMPT if dropped else int(self.cache.prompt_index[index])

    def _conditioning(self, prompts: list[int]) -> Conditioning:
        device, side = self.world.device, float(self.data.resolution)
        embeds, pooled = self.cache.prompts(prompts)
        if pooled is None:
            return Conditioning(embeds.to(device))
        time_ids = torch.tensor([side, side, 0.0, 0.0, side, side]).repeat(len(prompts), 1)
        return Conditioning(embeds.to(device), pooled.to(device), time_ids.to(device))

    def normals(self, step: int, purpose: str, shape: tuple[int, ...], places: Sequence[int]) -> Tensor:
        """Standard normals of a shape for some of this rank's pairs of a step: [B, *shape] on the rank's device."""
        own = self.positions(step)
        draws = [rng(self.seed, purpose, own[p]).standard_normal(shape, dtype=np.float32) for p in places]
        return torch.from_numpy(np.stack(draws)).to(self.world.device)
