"""This project's own trainer on random weights and synthetic pairs, and discovery of its optional features.

The step, the engine, the loader and whatever loading does to the networks are the real ones; only the contents of files
are replaced by random numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import counting
import numpy as np
import torch
from architectures import SCHEDULER, Architecture, make_unet
from torch import Tensor
from tqdm import tqdm

from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config import loading
from smpo_fast.config.schema import Config
from smpo_fast.engine import create
from smpo_fast.models import kernel_checks, kernel_patch, load, locate, step_ops
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.inference import compilation
from smpo_fast.models.locate import ModelSource
from smpo_fast.training import reference
from smpo_fast.training.loader import Loader
from smpo_fast.training.policy import load_policy
from smpo_fast.training.progress import CallHook
from smpo_fast.training.step import Trainer

Overrides = Mapping[str, Mapping[str, Any]]


class SyntheticCache:
    """A prepared cache of random pairs in memory: the part of ``CachedPairs`` that ``Loader`` uses."""

    def __init__(self, architecture: Architecture, pairs: int, seed: int = 6) -> None:
        generator = np.random.default_rng(seed)
        shape = (pairs, 2, 4, architecture.latent, architecture.latent)
        self.rows = np.arange(pairs)
        self.rewards = generator.random((pairs, 2))
        self.labels = np.full(pairs, np.nan)
        self.prompt_index = np.arange(1, pairs + 1)
        self.shapes = np.zeros(pairs, np.int32)
        self.pixels = np.array([[architecture.resolution, architecture.resolution]])
        self._mean = generator.standard_normal(shape, dtype=np.float32).astype(np.float16)
        width, pooled = architecture.prompt_width, architecture.pooled_width
        texts = (pairs + 1, architecture.tokens, width)
        self._prompts = generator.standard_normal(texts, dtype=np.float32).astype(np.float16)
        self._pooled = None if pooled is None else generator.standard_normal((pairs + 1, pooled)).astype(np.float16)

    def __len__(self) -> int:
        return len(self.rows)

    def moments(self, index: np.ndarray, flips: np.ndarray) -> tuple[Tensor, Tensor]:
        mean = torch.from_numpy(self._mean[index]).float()
        return mean, torch.full_like(mean, 0.05)

    def prompts(self, indices: list[int]) -> tuple[Tensor, Tensor | None]:
        pooled = None if self._pooled is None else torch.from_numpy(self._pooled[indices]).float()
        return torch.from_numpy(self._prompts[indices]).float(), pooled


class NoSignals:
    """Replaces ``StopSignal``; never stops."""

    def check(self) -> None:
        """Never stops."""


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
    run, world = settings(architecture, overrides), World(device=device)
    here = Path(".")
    source = ModelSource(here, here, here, architecture.kind, "epsilon", SCHEDULER, None)
    precision = run.model.precision

    def random_weights(cls: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
        return make_unet(architecture, device, dtype)

    schedule = locate.schedule_of(source, run.inversion)
    as_denoiser = partial(Denoiser, source=source, schedule=schedule, precision=precision, device=device)
    with mock.patch.object(load, "load_network", random_weights):
        policy = load_policy(run, source, precision, device)
        engine_ = create.make_engine(policy, run, world, precision, None)
        where = reference.resolve(run, None)
        frozen = reference.make_reference(where, run, source, world, precision, engine_.unet, as_denoiser, None)
    if run.model.compile == "all":
        with frozen() as network:
            compilation.compile_training(engine_.unet, network.unet)
    cache: Any = SyntheticCache(architecture, max(16, run.batch.pairs_per_step))
    loader, before_call = Loader(cache, run, World()), CallHook(cast(Any, NoSignals()), tqdm(disable=True))
    latent = (4, architecture.latent, architecture.latent)
    ops = step_ops.select_ops(run, step_ops.resolve(run, device, COMPUTE_DTYPES[precision], latent).enabled)
    return Trainer(run, world, schedule, engine_, as_denoiser(engine_.unet), frozen, loader, None, before_call, ops)


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
