"""Which accelerations of the no-gradient calls a run can use."""

from __future__ import annotations

import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.config.schema import Config, Inversion, Model
from smpo_fast.models.inference import float8


def check(config: Config, device: torch.device, zero_stage: int) -> None:
    """Check the settings of no-gradient calls before anything heavy is loaded.

    zero_stage: -1 without DeepSpeed. Raises ConfigError naming the setting that cannot be used or has no effect.
    """
    model, inversion = config.model, config.inversion
    wanted = {
        "model.compile": model.compile != "off",
        "model.cuda_graphs": model.cuda_graphs,
        "model.merge_qkv": model.merge_qkv,
        "inversion.fp8": inversion.fp8,
        "inversion.reuse_deep": inversion.reuse_deep,
    }
    for name, value in wanted.items():
        if value and zero_stage == 3:
            raise ConfigError(f"{name}: ZeRO stage 3 gathers weights module by module; use stage 2, or leave it off")
        training_too = name == "model.compile" and model.compile == "all"
        if value and not training_too and inversion.source != "inversion":
            raise ConfigError(f"{name} has no effect: inversion.source = '{inversion.source}' makes no such calls")
    if model.channels_last and zero_stage >= 0:
        _check_channels_last_copies(model, inversion, zero_stage)
    if model.compile == "all" and model.reference == "sharded":
        raise ConfigError("model.compile = 'all': a sharded reference cannot run the policy's code; use 'inversion'")
    if model.compile == "all" and config.lora.rank:
        raise ConfigError("model.compile = 'all': with LoRA policy and reference differ as graphs; use 'inversion'")
    _check_inversion(model, inversion, device)


def _check_channels_last_copies(model: Model, inversion: Inversion, zero_stage: int) -> None:
    """Under DeepSpeed only the inversion's calls are channels-last: they have convolution weights of their own."""
    sharded = inversion.network == "reference" and model.reference == "sharded"
    if zero_stage == 3 or sharded:
        raise ConfigError(
            "model.channels_last: DeepSpeed flattens weights in the default memory format, and sharded weights have no "
            "copy in another one; leave it off, or use ZeRO stage 2 with model.reference = 'replicated'"
        )
    if inversion.source != "inversion":
        raise ConfigError(
            "model.channels_last has no effect: DeepSpeed flattens weights in the default memory format, so only the "
            f"calls of an inversion can be channels-last, and inversion.source = '{inversion.source}' makes none"
        )


def _check_inversion(model: Model, inversion: Inversion, device: torch.device) -> None:
    if model.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"model.cuda_graphs needs a CUDA device, but the run is on {device.type}: leave it off")
    if model.cuda_graphs and inversion.network == "reference" and model.reference == "streamed":
        raise ConfigError("model.cuda_graphs: a streamed reference moves in memory; use model.reference = 'replicated'")
    if inversion.reuse_deep and inversion.renoise_steps == 0:
        raise ConfigError(
            f"inversion.reuse_deep: solver = '{inversion.solver}' makes one call per step: nothing to reuse"
        )
    if model.merge_qkv and model.attention in ("xformers", "eager"):
        raise ConfigError(f"model.merge_qkv has no effect on model.attention = '{model.attention}': leave it off")
    if model.merge_qkv and inversion.fp8:
        raise ConfigError(
            "model.merge_qkv: with inversion.fp8 these layers have float8 weights of their own: choose one"
        )
    if inversion.fp8 and device.type == "cuda":
        if model.compile == "off":
            raise ConfigError(
                "inversion.fp8 without model.compile is slower than half precision: rounding a layer's input takes 11 "
                "launches that only the compiler fuses; set model.compile = 'inversion' as well, or leave it off"
            )
        if torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError("inversion.fp8 needs a GPU with float8 matrix products (compute capability 8.9 or newer)")
        float8.check_device(device)
