"""Choosing the engine of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.combinations import check_combination
from smpo_fast.engine.local import LocalEngine
from smpo_fast.engine.protocol import Engine
from smpo_fast.engine.zero import DeepSpeedEngine


def make_engine(
    unet: nn.Module, config: Config, world: World, precision: str, ds_settings: dict[str, Any] | None
) -> Engine:
    """The engine that trains the parameters of ``unet`` with ``requires_grad``, in place.

    ``precision`` comes from ``resolve_precision``, ``ds_settings`` from ``resolve_ds_settings`` (None: no
    DeepSpeed). With 'bf16-autocast' the engine's ``unet`` autocasts by itself. Raises ConfigError for a
    combination of settings that does not work, EnvironmentProblem when bitsandbytes is needed and missing.
    """
    check_combination(config, precision, world, ds_settings)
    if precision == "bf16-autocast":
        # On the module, not around it: DeepSpeed's forward disables an outer autocast.
        unet.forward = torch.autocast(world.device.type, torch.bfloat16)(unet.forward)  # type: ignore[method-assign]
    if ds_settings is None:
        return LocalEngine(unet, config, world, precision)
    return DeepSpeedEngine(unet, config, world, precision, ds_settings)
