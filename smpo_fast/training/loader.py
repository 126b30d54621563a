"""Step batches: which pairs a step trains on, in which order, and with which random draws, given (seed, step).

A run visits positions 0, 1, 2, ...: step ``s`` has positions ``s*P .. (s+1)*P - 1``, of which rank ``r`` of ``R`` takes
every R-th. ``Order`` maps positions to pairs; flips, prompt dropout and the VAE's sample are functions of
(seed, position). Nothing depends on the rank, the number of ranks, or the steps before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import World, print0, rng, uniform
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs.order import Order
from smpo_fast.method.batch import Conditioning, Pairs
from smpo_fast.method.labels import weigh

EMPTY_PROMPT = 0
CHUNK = 4  # pairs that a thread reads and samples at a time: they fit into its processor cache


class Loader:
    """Step batches from a prepared cache.

    Raises DataError when the labels leave no pair to train on, and ConfigError when groups of pairs of one shape do
    not divide among the ranks.
    """

    def __init__(self, cache: CachedPairs, config: Config, world: World) -> None:
        self.cache, self.world = cache, world
        self.seed, self.data, self.pairs_per_step = config.run.seed, config.data, config.drawn_per_step
        self.labels = weigh(config.labels, cache.rewards, cache.labels)
        self.used = np.flatnonzero(self.labels.used)
        self.order = Order(self.seed, cache.shapes[self.used], self.pairs_per_step)
        if self.order.run > 1 and self.order.run % world.size:
            raise ConfigError(
                f"data.buckets: {self.pairs_per_step} pairs a step are drawn in runs of {self.order.run} pairs of one "
                f"shape (the greatest common divisor with 64), which do not divide among {world.size} ranks: change "
                "batch.pairs_per_step or the number of ranks"
            )
        if self.order.run > 1:
            print0(
                f"buckets: an epoch is {len(self) // self.order.run} runs of {self.order.run} pairs of one shape; "
                f"{self.order.repeats} of its {len(self)} visits fill up runs with pairs it sees already"
            )
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "loader")

    def __len__(self) -> int:
        """Positions in an epoch: one for each pair, and with aspect-ratio buckets ``order.repeats`` more."""
        return len(self.order)

    def positions(self, step: int) -> range:
        """This rank's positions of a step."""
        start = step * self.pairs_per_step
        return range(start + self.world.rank, start + self.pairs_per_step, self.world.size)

    def step_batch(self, step: int) -> list[Pairs]:
        """This rank's pairs of a step, winner first, on the rank's device: one entry for each shape of latents.

        Entries are ordered by shape, the pairs of an entry by their place in the step; all ranks have the same
        shapes at the same places.
        """
        positions = np.array(self.positions(step))
        index = self.used[self.order.at(positions)]
        shapes = self.cache.shapes[index]
        places = [np.flatnonzero(shapes == shape) for shape in np.unique(shapes)]
        return [self._pairs(index[here], positions[here], here) for here in places]

    def _pairs(self, index: np.ndarray, positions: np.ndarray, places: np.ndarray) -> Pairs:
        """Pairs of one shape. index: in the cache; positions: in the run; places: in the rank's step batch; int [B]."""
        drawn = np.array([rng(self.seed, "flip", int(p)).random(2) < 0.5 for p in positions]) & self.data.flip
        order = np.stack([self.labels.winner[index], 1 - self.labels.winner[index]], 1).astype(np.int64)
        flips = np.take_along_axis(drawn, order, 1)
        cond = self._threads.submit(self._conditioning, index, positions, order, flips)
        latents = self._latents(index, positions, drawn, order)
        return Pairs(
            tuple(int(row) for row in self.cache.rows[index]),
            latents.to(self.world.device),
            cond.result(),
            torch.from_numpy(self.labels.weight[index]).to(self.world.device),
            tuple(places.tolist()),
        )

    def _latents(self, index: np.ndarray, positions: np.ndarray, flips: np.ndarray, order: np.ndarray) -> Tensor:
        """Samples of the VAE's posteriors, [B, 2, C, H, W]: winner first, each image flipped or not."""

        def read(rows: slice) -> None:
            mean, std = self.cache.moments(index[rows], flips[rows])
            for pair, sample in enumerate(latents[rows]):
                normals = coarse_normals(rng(self.seed, "vae", int(positions[rows][pair])), sample.shape)
                torch.index_select(normals.mul_(std[pair]).add_(mean[pair]), 0, winner_first[rows][pair], out=sample)

        winner_first, shape = torch.from_numpy(order), self.cache.moments(index[:1], flips[:1])[0].shape[1:]
        latents = torch.from_numpy(np.empty((len(index), *shape), np.float32))  # in huge pages: see CachedPairs.prompts
        chunks = [slice(first, first + CHUNK) for first in range(0, len(index), CHUNK)]
        list(self._threads.map(read, chunks))
        return latents

    def _conditioning(
        self, index: np.ndarray, positions: np.ndarray, order: np.ndarray, flips: np.ndarray
    ) -> Conditioning:
        """Prompts, some of them dropped, and size conditioning. order: image of each row, [B, 2]; flips: of these."""
        device = self.world.device
        dropped = np.array([uniform(self.seed, "prompt", int(p)) < self.data.prompt_dropout for p in positions])
        embeds, pooled = self.cache.prompts(np.where(dropped, EMPTY_PROMPT, self.cache.prompt_index[index]).tolist())
        if pooled is None:
            return Conditioning(embeds.to(device))
        size = self.cache.pixels[self.cache.shapes[index]]  # [B, 2]
        if self.data.conditioning == "uncropped":
            time_ids = np.concatenate([size, np.zeros_like(size), size], 1)
        else:
            time_ids = self._original_sizes(index, order, flips, size)
        return Conditioning(embeds.to(device), pooled.to(device), torch.from_numpy(time_ids).float().to(device))

    def _original_sizes(self, index: np.ndarray, order: np.ndarray, flips: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Original size, top left corner of the crop, and training size of each image: [B, 2, 6]."""
        frames = np.take_along_axis(self.cache.frames[index], order[:, :, None], 1)  # [B, 2, 5]
        height, width, top, left, right = np.moveaxis(frames, 2, 0)
        trained_on = np.broadcast_to(size[:, None], (len(index), 2, 2))
        return np.concatenate([np.stack([height, width, top, np.where(flips, right, left)], 2), trained_on], 2)

    def normals(self, step: int, purpose: str, shape: tuple[int, ...], places: Sequence[int]) -> Tensor:
        """Standard normals for some of this rank's pairs of a step: [B, *shape] on the rank's device."""
        own = self.positions(step)
        draws = [rng(self.seed, purpose, own[p]).standard_normal(shape, dtype=np.float32) for p in places]
        return torch.from_numpy(np.stack(draws)).to(self.world.device)


def coarse_normals(generator: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normals on 65,536 levels of equal probability: float32 of the given shape.

    The VAE's sample needs no more: near the mean the levels are 4e-5 apart, while mean and standard deviation are
    stored in float16. Six times as fast as exact normals, which would take most of the time of reading.
    """
    count = int(np.prod(shape))
    bits = generator.integers(0, 2**64 - 1, -(-count // 4), dtype=np.uint64, endpoint=True)
    levels = bits.astype("<u8", copy=False).view("<u2")[:count].astype(np.int32)
    return normal_quantiles().index_select(0, torch.from_numpy(levels)).reshape(tuple(shape))


@cache
def normal_quantiles() -> Tensor:
    """The midpoints of 65,536 equally probable intervals of the standard normal distribution, float32."""
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    return torch.special.ndtri(middles).float()
