"""Which precisions, optimizers, ZeRO stages and devices work together."""

from __future__ import annotations

from typing import Any

import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config.schema import Config
from smpo_fast.engine.aligned_adamw8bit import ALIGNED
from smpo_fast.engine.batch_size import micro_batches_per_step
from smpo_fast.engine.ds_config import get_key, offloads, zero_stage


def resolve_precision(config: Config, ds_file: dict[str, Any] | None, device: torch.device) -> str:
    """``model.precision`` with 'auto' resolved: what the DeepSpeed file says, else bf16 on CUDA and fp32 on the CPU.

    ds_file: the file's content as it was read. Where the file does not enable bf16 and DeepSpeed could not sum bf16
    gradients in fp32 (ZeRO stage 0, or 1 and 2 with the optimizer offloaded), 'auto' on CUDA is 'bf16-autocast'; on a
    GPU without bf16 it is 'fp32'. Raises ConfigError when the file enables both bf16 and fp16.
    """
    raw = ds_file or {}
    bf16, fp16 = (get_key(raw, f"{name}.enabled") for name in ("bf16", "fp16"))
    if bf16 is True and fp16 is True:
        raise ConfigError("DeepSpeed file: bf16.enabled and fp16.enabled are both true: enable one of them")
    if config.model.precision != "auto":
        return config.model.precision
    if bf16 is True or fp16 is True:
        return "bf16" if bf16 is True else "fp16"
    if bf16 is False or device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return "fp32"
    if ds_file is None or zero_stage(raw) == 3:
        return "bf16"
    return "bf16-autocast" if zero_stage(raw) == 0 or offloads(raw, "optimizer") else "bf16"


def check_combination(config: Config, precision: str, world: World, ds: dict[str, Any] | None) -> None:
    """Raise ConfigError for a precision, optimizer, ZeRO stage and device that do not work together."""
    if ds is None and world.size > 1:
        raise ConfigError(f"{world.size} processes need DeepSpeed: give --ds_config, e.g. configs/ds_zero2.json")
    _check_precision(precision, world, -1 if ds is None else zero_stage(ds))
    _check_optimizer(config, precision, ds)
    if ds is not None:
        _check_offload(config, precision, world, ds)


def _check_precision(precision: str, world: World, stage: int) -> None:
    if precision == "fp16" and stage < 0:
        raise ConfigError(
            "model.precision = 'fp16' needs DeepSpeed's loss scaling: give --ds_config with ZeRO stage 1, 2 or 3, "
            "or take bf16, bf16-autocast or fp32"
        )
    if precision == "fp16" and world.device.type != "cuda":
        raise ConfigError("model.precision = 'fp16' needs a CUDA device: on the CPU take fp32 or bf16")
    if stage == 0 and COMPUTE_DTYPES[precision] is not torch.float32:
        raise ConfigError(
            f"zero_optimization.stage = 0 with model.precision = '{precision}': DeepSpeed cannot sum the gradients in "
            "fp32 at this stage; take stage 1, 2 or 3, or model.precision = 'bf16-autocast' or 'fp32'"
        )


def _check_optimizer(config: Config, precision: str, ds: dict[str, Any] | None) -> None:
    optim, stage = config.optim, 0 if ds is None else zero_stage(ds)
    if optim.name == "adafactor" and stage > 0:
        raise ConfigError(
            f"optim.name = 'adafactor' with zero_optimization.stage = {stage}: Adafactor factors whole matrices, "
            "and ZeRO gives the optimizer flat slices of them; take one process without --ds_config, or ZeRO "
            "stage 0 with model.precision = 'bf16-autocast' or 'fp32' (configs/ds_zero0.json), or another optimizer"
        )
    defaults = {"master": "fp32", "accumulate": "fp32", "offload": "none"}
    for key in (key for key, default in defaults.items() if getattr(optim, key) != default):
        found = f"optim.{key} = '{getattr(optim, key)}'"
        if optim.name != ALIGNED:
            raise ConfigError(f"{found} needs optim.name = '{ALIGNED}', and it is '{optim.name}'")
        if ds is not None:
            instead = "; DeepSpeed's file can offload: configs/ds_zero3_offload.json" if key == "offload" else ""
            raise ConfigError(
                f"{found} is for one process without --ds_config: DeepSpeed sums gradients in fp32{instead}"
            )
        if precision != "bf16" and key != "offload":
            raise ConfigError(f"{found} needs model.precision = 'bf16', and it is '{precision}'")
    if optim.offload == "states+gradients" and COMPUTE_DTYPES[precision] is torch.float32:
        raise ConfigError(
            f"optim.offload = 'states+gradients' needs model.precision = 'bf16', and it is '{precision}': the "
            "gradients of fp32 weights are summed on the device of the weights"
        )


def _check_offload(config: Config, precision: str, world: World, ds: dict[str, Any]) -> None:
    stage, half = zero_stage(ds), COMPUTE_DTYPES[precision] is not torch.float32
    if offloads(ds, "optimizer") and stage == 0:
        raise ConfigError("zero_optimization.offload_optimizer needs zero_optimization.stage = 1, 2 or 3")
    if offloads(ds, "param") and stage < 3:
        raise ConfigError(f"zero_optimization.offload_param needs zero_optimization.stage = 3, and it is {stage}")
    micro_batches = micro_batches_per_step(config, world.size)
    if offloads(ds, "optimizer") and stage < 3 and half and micro_batches > 1:
        raise ConfigError(
            f"zero_optimization.offload_optimizer at stage {stage} with model.precision = '{precision}': DeepSpeed "
            f"sums the gradients of a step's {micro_batches} micro-batches in {precision} there; take stage 3 "
            "(configs/ds_zero3_offload.json), model.precision = 'bf16-autocast', or one micro-batch per step "
            "(batch.micro_pairs)"
        )
