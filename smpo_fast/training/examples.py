"""Training examples: pairs at one timestep each, with their noisy latents and targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from smpo_fast.method.batch import Pairs


@dataclass(frozen=True)
class Examples:
    """B pairs of one shape, at one landing timestep each."""

    pairs: Pairs
    x_t: Tensor  # [B, 2, C, H, W], noisy latents
    tau: Tensor  # [B, 2, C, H, W], the noise that x_t contains
    time: Tensor  # [B]
    times: tuple[int, ...]  # the same on the host

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, rows: slice) -> Examples:
        """Some of the examples."""
        return Examples(self.pairs.take(rows), self.x_t[rows], self.tau[rows], self.time[rows], self.times[rows])

    def micro_batches(self, size: int) -> Iterator[Examples]:
        """The examples in order, at most ``size`` at a time."""
        return (self.take(slice(first, first + size)) for first in range(0, len(self), size))
