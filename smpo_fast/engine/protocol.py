"""The engine's protocol: precision, gradient accumulation, clipping and sharding behind five methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config


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
    """The dtype of the weights that compute; master weights, where there are any, are fp32."""
    layout: dict[str, str | int]
    """How the state is stored (engine, zero_stage, world_size), and what a checkpoint must share to be loaded
    (precision, master, optimizer)."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``, a scalar: this micro-batch's share of the mean over the rank's pairs.

        ``last`` marks the last micro-batch of the step.
        """

    def step(self, lr: float) -> StepResult:
        """Average the gradients over the ranks, clip, update with learning rate ``lr``, and drop the gradients.

        The moving average follows. A loss or gradient that is not finite on any rank leaves weights, optimizer state
        and average unchanged on every rank.
        """

    def largest_weight(self) -> float:
        """The largest absolute value of the trained weights over all ranks; inf or nan where one is not finite."""

    def save(self, folder: Path) -> None:
        """Write this rank's slices of weights, optimizer state and average into ``folder``, which exists.

        Gradients of an unfinished step are not saved. Not collective: an error is raised on this rank alone.
        """

    def load(self, files: Sequence[Path]) -> None:
        """Read the files that all ranks of a run wrote with ``save``, whatever their number, engine or ZeRO stage.

        Call it before the first backward pass. An error on one rank is raised on all.
        """

    def full_state(self) -> dict[str, Tensor]:
        """The state dict with the master weights in fp32, on the CPU: complete on rank 0, empty on the others."""

    def full_average(self) -> dict[str, Tensor]:
        """The moving average of the trained weights by name, in fp32 on the CPU: complete on rank 0.

        Empty on the others, and without ``optim.ema``.
        """

    def close(self) -> None:
        """Free the weights, gradients and optimizer states. Neither the engine nor ``unet`` can be used afterwards.

        Collective.
        """


# --- what both engines share ----------------------------------------------------------------------------------


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def nan_unless_finite(loss: Tensor) -> Tensor:
    """A scalar loss whose gradients are NaN when it is not finite; bitwise the same when it is. No host sync."""
    value = loss.detach()
    return loss * (1 + (value - value))  # the difference is 0, or NaN


def describe_layout(engine: str, stage: int, world: World, precision: str, config: Config) -> dict[str, str | int]:
    """``Engine.layout``."""
    return {
        "engine": engine,
        "zero_stage": stage,
        "world_size": world.size,
        "precision": precision,
        "master": config.optim.master,
        "optimizer": config.optim.name,
    }


def largest_absolute(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The largest absolute value in tensors of any shape, a scalar; inf or nan where one is not finite."""
    values = [t.detach().abs().amax().float().to(device) for t in tensors if t.numel()]
    return torch.stack(values).amax() if values else torch.zeros((), device=device)


def require_last_backward(done: bool) -> None:
    """Raise RuntimeError when a step is made before the last micro-batch's backward pass."""
    if not done:
        raise RuntimeError("step() needs backward(loss, last=True) before it")


def free_tensors(parameters: Iterable[nn.Parameter], holders: Iterable[object]) -> None:
    """Empty parameters of any shape, and drop all attributes of the objects that hold the rest of an engine's memory.

    Autograd and DeepSpeed refer to both from where Python's collector does not look, so dropping the engine is not
    enough.
    """
    for parameter in parameters:
        parameter.grad = None
        vars(parameter).clear()
        parameter.data = parameter.data.new_empty(0)
    for holder in holders:
        vars(holder).clear()
