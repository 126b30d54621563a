"""The functions of a training step that can be fused kernels: pair errors, pair losses, and the solver's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from smpo_fast.common.errors import ConfigError
from smpo_fast.config.schema import Config
from smpo_fast.method import inversion, objective
from smpo_fast.method.inversion import SolverOps
from smpo_fast.method.objective import Losses


class StepOps(NamedTuple):
    """The functions of one training step."""

    pair_errors: Callable[[Tensor, Tensor], Tensor]
    """Prediction and target [B, 2, C, H, W] -> mean squared errors [B, 2]; called without gradients."""
    pair_loss: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], Losses]
    """Prediction, the reference's errors, target, weight [B], beta -> the pairs' losses; see Objective.losses."""
    solver: SolverOps


def check(config: Config) -> None:
    """Raise ConfigError for an enabled kernel that nothing in this run would use."""
    enabled = config.kernels.enabled
    if "pair_loss" in enabled and not objective.OBJECTIVES[config.objective.name].needs_reference:
        raise ConfigError(
            f"kernels.enabled: pair_loss has no effect: objective.name = '{config.objective.name}' compares no pairs"
        )
    if "renoise_step" in enabled and config.inversion.source != "inversion":
        raise ConfigError(
            f"kernels.enabled: renoise_step has no effect: inversion.source = '{config.inversion.source}'"
        )


def select_ops(config: Config) -> StepOps:
    """The functions of a run's training step: kernels where they are enabled, eager code elsewhere."""
    chosen = objective.OBJECTIVES[config.objective.name]
    ops = StepOps(objective.pair_errors, chosen.losses, inversion.EAGER_OPS)
    if "pair_loss" in config.kernels.enabled:
        from smpo_fast.kernels import pair_loss

        ops = ops._replace(pair_errors=pair_loss.pair_errors, pair_loss=_fused_losses)
    if "renoise_step" in config.kernels.enabled:
        from smpo_fast.kernels import renoise_step

        ops = ops._replace(solver=SolverOps(renoise_step.predict_, renoise_step.correct_))
    return ops


def _fused_losses(prediction: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, beta: float) -> Losses:
    from smpo_fast.kernels.pair_loss import pair_loss

    assert reference is not None  # check has refused objectives without one
    return Losses(*pair_loss(prediction, reference, target, weight, beta=beta))
