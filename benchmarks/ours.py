"""This project's own trainer on random weights and synthetic pairs, and discovery of its optional features.

The step, the engine, the loader and whatever loading does to the networks are the real ones; only the contents of files
are replaced by random numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import counting
import torch
from architectures import SCHEDULER, Architecture, make_unet

from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.models import kernel_checks, kernel_patch, load
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.network_spec import NetworkSpec
from smpo_fast.training import reference
from smpo_fast.training.step import Trainer
from smpo_fast.tuning.synthetic import synthetic_trainer

Overrides = Mapping[str, Mapping[str, Any]]


def settings(architecture: Architecture, overrides: Overrides | None = None) -> Config:
    """The released recipe of a model family, changed by ``overrides``."""
    values: dict[str, dict[str, Any]] = {
        "data": {"resolution": architecture.resolution, "flip": False},
        "batch": {"pairs_per_step": 8, "micro_pairs": 1, "inversion_pairs": 8},
        "inversion": {"fidelity": "release", "steps": architecture.inversion_steps, "timesteps": "stratified"},
        "objective": {"beta": architecture.beta},
        "optim": {"name": architecture.optimizer},
        "model": {"precision": "fp32"},
    }
    for section, given in (overrides or {}).items():
        values[section] = {**values.get(section, {}), **given}
    return loading.from_dict(values)


def make_trainer(architecture: Architecture, device: torch.device, overrides: Overrides | None = None) -> Trainer:
    """A trainer ready for ``step(0)``."""
    run, network = settings(architecture, overrides), network_spec(architecture)
    with random_weights(architecture, device):
        where = reference.resolve(run, None)
        return synthetic_trainer(run, source(architecture), network, run.model.precision, device, where)


@contextmanager
def random_weights(architecture: Architecture, device: torch.device) -> Iterator[None]:
    """Inside, networks of the architecture have the same random weights wherever they are loaded."""

    def load_network(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        return make_unet(architecture, device, dtype)

    with mock.patch.object(load, "load_network", load_network):
        yield


def source(architecture: Architecture) -> ModelSource:
    """A pipeline without files."""
    here = Path(".")
    return ModelSource(here, here, here, architecture.kind, "epsilon", SCHEDULER, None)


def network_spec(architecture: Architecture) -> NetworkSpec:
    """The architecture's UNet at its own resolution."""
    latent, prompt = (4, architecture.latent, architecture.latent), (architecture.tokens, architecture.prompt_width)
    return NetworkSpec.make(architecture.unet, architecture.kind, latent, prompt)


def planned_peak(architecture: Architecture, checkpointing: bool) -> int:
    """Simulated peak bytes of a step with the released recipe's optimizer in half precision.

    The step has two micro-batches of one pair each, so that gradients already exist when the second one begins. The
    inversion is left out, because its own peak is lower.
    """
    overrides: dict[str, dict[str, Any]] = {
        "model": {"precision": "bf16", "gradient_checkpointing": checkpointing},
        "inversion": {"source": "noise"},
        "batch": {"pairs_per_step": 2},
    }
    trainer: Any = make_trainer(architecture, counting.META, overrides)
    with trainer.reference() as reference:
        networks = counting.parameters_of([trainer.policy.unet, reference.unet])
    held = [*networks, *trainer.engine._masters.values()]
    with counting.fused_attention(), counting.DeviceSpy(), counting.LiveBytes(held) as live:
        trainer.step(0)
    return live.peak


def kernel_modules() -> list[ModuleType]:
    """The modules of ``smpo_fast.kernels`` that hold operations; none if Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        return []
    package = importlib.import_module("smpo_fast.kernels")
    names = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
    return [importlib.import_module(f"smpo_fast.kernels.{name}") for name in names]


def all_kernels() -> dict[str, dict[str, Any]]:
    """Settings that enable every kernel."""
    return {"kernels": {"enabled": list(kernel_checks.NAMES)}}


def patch_kernels(unet: Any, enabled: Sequence[str] | None = None) -> dict[str, int]:
    """Patch kernels into a UNet in place: those named, by default all."""
    return kernel_patch.patch(unet, kernel_patch.MODULES if enabled is None else enabled)


def variants(device: torch.device) -> dict[str, dict[str, dict[str, Any]]]:
    """Name -> settings: the solver with one call per step and, on a GPU, other ways to run the same arithmetic."""
    found: dict[str, dict[str, dict[str, Any]]] = {"solver pec": {"inversion": {"fidelity": "paper", "solver": "pec"}}}
    if device.type == "cuda":
        found["compiled inversion"] = {"model": {"compile": "inversion"}}
        found["compiled inversion, CUDA graphs"] = {"model": {"compile": "inversion", "cuda_graphs": True}}
        found["all compiled, CUDA graphs, channels-last"] = {
            "model": {"compile": "all", "cuda_graphs": True, "channels_last": True}
        }
        found["cuDNN attention"] = {"model": {"attention": "cudnn"}}
    return found


def approximations() -> dict[str, dict[str, dict[str, Any]]]:
    """Opt-in approximations: settings that are off by default and whose description says 'approximation'."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, field in loading.keys():
        section, _, key = name.partition(".")
        if "approximation" in (field.description or "").lower() and field.annotation is bool and field.default is False:
            found[name] = {section: {key: True}}
    return found
