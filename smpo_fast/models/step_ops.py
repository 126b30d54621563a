"""Which fused kernels a run uses, and the functions of its training step, some of which are such kernels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smpo_fast.common.errors import ConfigError, EnvironmentProblem
from smpo_fast.common.runtime import warn0
from smpo_fast.config.schema import Config, KernelName
from smpo_fast.method import inversion, objective
from smpo_fast.method.inversion import SolverOps
from smpo_fast.method.objective import Losses
from smpo_fast.models import kernel_patch
from smpo_fast.models.kernel_checks import LATENT, KernelCheck, check_kernel


class StepOps(NamedTuple):
    """The functions of one training step."""

    pair_errors: Callable[[Tensor, Tensor], Tensor]
    """Prediction and target [B, 2, C, H, W] -> mean squared errors [B, 2]; called without gradients."""
    pair_loss: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], Losses]
    """Prediction, the reference's errors, target, weight [B], beta -> the pairs' losses; see Objective.losses."""
    solver: SolverOps


class Selection(NamedTuple):
    """The kernels that a run uses, and how each that was wanted compared with eager code (of the first rank)."""

    enabled: tuple[KernelName, ...]
    checks: tuple[KernelCheck, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON has it, which has no NaN."""
        checks = [{**c._asdict(), "error": c.error if math.isfinite(c.error) else None} for c in self.checks]
        return {"enabled": list(self.enabled), "checks": checks}


def check(config: Config) -> None:
    """Raise ConfigError for a kernel that the settings name and nothing in this run would use."""
    useful = _useful(config)
    if "pair_loss" in config.kernels.listed and "pair_loss" not in useful:
        raise ConfigError(
            f"kernels.enabled: pair_loss has no effect: objective.name = '{config.objective.name}' compares no pairs"
        )
    if "renoise_step" in config.kernels.listed and "renoise_step" not in useful:
        raise ConfigError(
            f"kernels.enabled: renoise_step has no effect: inversion.source = '{config.inversion.source}'"
        )


def wanted(config: Config, device: torch.device) -> tuple[KernelName, ...]:
    """The kernels that a run on a device asks for, whether or not they work there.

    Those that kernels.enabled names; if it is 'auto', pair_loss and renoise_step on CUDA with Triton, where the run
    has a use for them.
    """
    if config.kernels.enabled != "auto":
        return tuple(config.kernels.listed)
    return _useful(config) if has_kernels(device) else ()


def has_kernels(device: torch.device) -> bool:
    """Whether compiled kernels can run on a device."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def resolve(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    latent: tuple[int, int, int] = LATENT,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> Selection:
    """The kernels that a run uses: those it asks for, after each has been compared with eager code on the device.

    dtype: of the network's activations; latent: channels, height and width. gather: collects a value from all ranks,
    which use the same kernels. If a check fails, a kernel of 'auto' is left out with a warning. Raises
    EnvironmentProblem for one that the settings name.
    """
    names = wanted(config, device)
    checks = () if kernel_patch.only_eager(device) else tuple(check_kernel(n, device, dtype, latent) for n in names)
    ranks: list[tuple[KernelCheck, ...]] = gather(checks)
    failed = {check.name: check.reason for rank in ranks for check in rank if not check.ok}
    problem = "; ".join(f"{name} does not agree with eager code ({reason})" for name, reason in failed.items())
    if failed and config.kernels.enabled != "auto":
        raise EnvironmentProblem(f"kernels.enabled: on this device {problem}: remove it from the list, or use 'auto'")
    if failed:
        warn0(f"kernels.enabled = 'auto': on this device {problem}; eager code is used instead")
    return Selection(tuple(name for name in names if name not in failed), checks)


def _useful(config: Config) -> tuple[KernelName, ...]:
    """The kernels of the training step that would be called in this run."""
    compares = objective.OBJECTIVES[config.objective.name].needs_reference
    inverts = config.inversion.source == "inversion"
    return (*(("pair_loss",) if compares else ()), *(("renoise_step",) if inverts else ()))


def select_ops(config: Config, enabled: Collection[KernelName]) -> StepOps:
    """The functions of a run's training step: kernels where they are enabled, eager code elsewhere."""
    chosen = objective.OBJECTIVES[config.objective.name]
    ops = StepOps(objective.pair_errors, chosen.losses, inversion.EAGER_OPS)
    if "pair_loss" in enabled:
        from smpo_fast.kernels import pair_loss

        ops = ops._replace(pair_errors=pair_loss.pair_errors, pair_loss=_fused_losses)
    if "renoise_step" in enabled:
        from smpo_fast.kernels import renoise_step

        ops = ops._replace(solver=SolverOps(renoise_step.predict_, renoise_step.correct_))
    return ops


def _fused_losses(prediction: Tensor, reference: Tensor | None, target: Tensor, weight: Tensor, beta: float) -> Losses:
    from smpo_fast.kernels.pair_loss import pair_loss

    assert reference is not None  # check has refused objectives without one
    return Losses(*pair_loss(prediction, reference, target, weight, beta=beta))
