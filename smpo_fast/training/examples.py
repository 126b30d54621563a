"""Training examples: pairs at one timestep each, with their noisy latents and targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from smpo_fast.method.batch import Pairs
from smpo_fast.method.objective import Objective
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference.kv_cache import CallInputs

PREPARED = 32  # examples that micro-batches are prepared for at a time: 20 MB of SDXL's prompts in half precision


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

    def split(self, size: int) -> Iterator[Examples]:
        """The examples in order, at most ``size`` at a time."""
        return (self.take(slice(first, first + size)) for first in range(0, len(self), size))


class MicroBatch(NamedTuple):
    """Some examples, and what a network is given for them and should predict, [b, 2, ...] each."""

    examples: Examples
    x_t: Tensor  # in the networks' dtype
    timesteps: Tensor
    inputs: CallInputs
    target: Tensor
    weight: Tensor  # [b], of the objective


def prepared_together(pairs: int, micro_pairs: int) -> int:
    """For how many of ``pairs`` examples micro-batches are prepared at a time: whole micro-batches."""
    return min(pairs, max(1, PREPARED // micro_pairs) * micro_pairs)


def micro_batches(examples: Examples, size: int, denoiser: Denoiser, objective: Objective) -> Iterator[MicroBatch]:
    """The examples in order, at most ``size`` at a time, as networks like ``denoiser`` take them.

    What can be is computed for many micro-batches at once, and is of the same bits: casts, the second row of each
    pair's prompt, targets.
    """
    for block in examples.split(prepared_together(len(examples), size)):
        inputs = CallInputs(denoiser.unet_inputs(block.pairs.cond), [])
        x_t, timesteps = block.x_t.to(denoiser.dtype), block.time[:, None].repeat(1, 2)
        target = denoiser.target(block.pairs.latents, block.tau, block.time)
        weight = objective.weigh(block.pairs.weight)
        for first in range(0, len(block), size):
            rows = slice(first, min(first + size, len(block)))
            yield MicroBatch(
                block.take(rows), x_t[rows], timesteps[rows], inputs.take(rows.start, rows.stop), target[rows],
                weight[rows],
            )  # fmt: skip
