"""The engine's protocol: precision, gradient accumulation, clipping and sharding behind five methods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank that is not heard of for so long ends the others


@dataclass(frozen=True)
class StepResult:
    """What a step did. ``grad_norm`` is the global norm before clipping; inf or nan when not applied."""

    applied: bool
    grad_norm: float


class Engine(Protocol):
    """Trains ``unet``. All methods are collective: every rank calls them in the same order."""

    unet: nn.Module
    """Call it for every forward pass of the policy, with or without gradients, in train or eval mode."""
    dtype: torch.dtype
    """What the weights are held in for computing; master weights, where there are any, are fp32."""
    layout: dict[str, str | int]
    """How the state is kept: engine, zero_stage, world_size, and what a checkpoint must share to be read:
    precision, master, optimizer."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``, a scalar: this micro-batch's share of the mean over the rank's pairs.

        ``last`` marks the step's last micro-batch.
        """

    def step(self, lr: float) -> StepResult:
        """Average the gradients over the ranks, clip, update with rate ``lr``, and drop them.

        A loss or gradient that is not finite on any rank leaves weights and optimizer state as they were, on
        every rank.
        """

    def save(self, folder: Path) -> None:
        """Write this rank's slices of weights and optimizer state into ``folder``, which exists.

        Gradients on their way are left out. Not collective: an error is this rank's alone.
        """

    def load(self, folder: Path) -> None:
        """Read what all ranks of a run wrote with ``save``, whatever their number, engine or ZeRO stage.

        Call it before the first backward pass. An error on one rank is raised on all.
        """

    def full_state(self) -> dict[str, Tensor]:
        """The state dict with the master weights in fp32, on CPU: complete on rank 0, empty on the others."""


def micro_steps(config: Config, world_size: int) -> int:
    """Micro-batches in one step of a rank; the last one may be smaller.

    Raises SettingsError when the pairs of a step do not divide evenly among the ranks.
    """
    return math.ceil(pairs_per_rank(config, world_size) / config.batch.micro_pairs)


def pairs_per_rank(config: Config, world_size: int) -> int:
    """Pairs of one rank in one step; raises SettingsError when they do not divide evenly."""
    pairs, rest = divmod(config.batch.pairs_per_step, world_size)
    if rest:
        raise UserError(
            f"batch.pairs_per_step = {config.batch.pairs_per_step} does not divide among {world_size} ranks: "
            f"take a multiple of {world_size}"
        )
    return pairs


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _poisoned(loss: Tensor) -> Tensor:
    """``loss`` with its gradients made NaN when it is not finite; bitwise the same when it is. No host sync."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _layout(kind: str, stage: int, world: World, precision: str, config: Config) -> dict[str, str | int]:
    return {
        "engine": kind,
        "zero_stage": stage,
        "world_size": world.size,
        "precision": precision,
        "master": config.optim.master,
        "optimizer": config.optim.name,
    }


def _check_ready(ready: bool) -> None:
    if not ready:
        raise RuntimeError("step() needs backward(loss, last=True) before it")
