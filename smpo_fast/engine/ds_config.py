"""The DeepSpeed file: what it may say, what the run's settings fill in, and which combinations work."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import COMPUTE_DTYPES as DTYPES
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.engine.aligned_adamw8bit import ALIGNED
from smpo_fast.engine.protocol import micro_steps, pairs_per_rank

_AUTO = (None, "auto")

# What a DeepSpeed file must not hold, because the run's settings own it or our promises would break.
_REFUSED: dict[str, str] = {
    "optimizer": "the optimizer is set in the run's settings, [optim]",
    "scheduler": "the learning rate is set in the run's settings, [optim] lr, warmup_steps and schedule",
    "torch_autocast": 'autocast is set in the run\'s settings: model.precision = "bf16-autocast"',
    "amp": "mixed precision is set in the run's settings: model.precision",
}
_REFUSED_VALUES: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (False, "the engine marks the accumulation boundary itself"),
    "gradient_allreduce_op": ("sum", "gradients are averaged over the ranks"),
    "zero_optimization.compute_grad_norm": (False, "clipping and the non-finite check need the gradient norm"),
    "zero_optimization.offload_optimizer.super_offload": (True, "it brings an optimizer of its own"),
    "zero_optimization.offload_optimizer.device": (
        "nvme",
        'optimizer states belong to parameters here, and DeepSpeed swaps those of flat tensors alone; take "cpu"',
    ),
    "zero_optimization.offload_param.device": ("nvme", 'it is not tested; take "cpu" (SDXL in bf16: 5 GB)'),
    "bf16.check_grad_overflow": (False, "a step with a non-finite gradient is skipped"),
    "bf16.bf16_master_weights_and_grads": (True, "master weights and gradient sums are fp32"),
    "fp16.fp16_master_weights_and_grads": (True, "master weights and gradient sums are fp32"),
}
# Sections of zero_optimization that change who holds what, or who optimizes.
_ZERO_REFUSED = {
    "zenflow": "it brings an optimizer of its own",
    "mics_shard_size": "parameters are split over all ranks",
    "elastic_checkpoint": "checkpoints are the engine's own and fit any number of ranks",
    "cpu_offload": "it is an old word: write offload_optimizer",
}


def read_ds_file(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file as it stands; raises SettingsError when it is missing or not a JSON object."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror}): give --ds_config a DeepSpeed JSON file"
        raise UserError(reason) from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: found a JSON {type(values).__name__}, a DeepSpeed file is an object: {{...}}")
    return values


def resolve_precision(config: Config, ds_raw: dict[str, Any] | None, device: torch.device) -> str:
    """``model.precision``, with 'auto' made definite: what the DeepSpeed file says, else bf16 on cuda, fp32 on cpu.

    Where bf16 was not asked for by name and cannot be had with fp32 gradient sums (ZeRO stage 0, or 1 and 2 with
    the optimizer offloaded), 'auto' on cuda is 'bf16-autocast'; on a GPU without bf16 it is 'fp32'. Raises
    SettingsError when the file enables both bf16 and fp16.
    """
    raw = ds_raw or {}
    bf16, fp16 = (_get(raw, f"{name}.enabled") for name in ("bf16", "fp16"))
    if bf16 is True and fp16 is True:
        raise UserError("DeepSpeed file: bf16.enabled and fp16.enabled are both true: enable one of them")
    if config.model.precision != "auto":
        return config.model.precision
    if bf16 is True or fp16 is True:
        return "bf16" if bf16 is True else "fp16"
    if bf16 is False or device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return "fp32"
    if ds_raw is None or zero_stage(raw) == 3:
        return "bf16"
    return "bf16-autocast" if zero_stage(raw) == 0 or _offloads(raw, "optimizer") else "bf16"


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed file asks for; 0 without one."""
    stage = _get(ds, "zero_optimization.stage")
    if stage in _AUTO:
        return 0
    if type(stage) is not int or stage not in range(4):
        raise UserError(f"DeepSpeed file: zero_optimization.stage = {stage!r}: 0, 1, 2 and 3 exist")
    return stage


def resolve_ds_settings(
    raw: dict[str, Any], source: str, config: Config, world_size: int, precision: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings handed to DeepSpeed, and what was filled in (dotted key -> value), from the file ``source``.

    Keys that the run decides may be absent or "auto" in the file; any other "auto" becomes DeepSpeed's default.
    Raises SettingsError where the file contradicts the run: it names the file's key and value and the setting's.
    """
    settings = copy.deepcopy(raw)
    if "bfloat16" in settings:  # DeepSpeed's old name
        settings["bf16"] = settings.pop("bfloat16")
    _refuse_foreign(settings, source)
    filled: dict[str, Any] = {}
    for key, (value, setting) in _owned(config, world_size, precision, settings).items():
        found = _get(settings, key)
        if found in _AUTO:
            filled[key] = value
        elif found != value:
            here = f"{source}: {key} = {json.dumps(found)}"
            raise UserError(f'{here} contradicts {setting}: change one of them, or write "auto" in the file')
        _set(settings, key, value)
    for key, value in _promised(precision).items():
        if _get(settings, key) in _AUTO:
            filled[key] = value
            _set(settings, key, value)
    # DeepSpeed insists on this product, which is more than pairs_per_step when the last micro-batch is smaller.
    micro = min(config.batch.micro_pairs, pairs_per_rank(config, world_size))
    settings["train_micro_batch_size_per_gpu"] = micro
    settings["train_batch_size"] = micro * settings["gradient_accumulation_steps"] * world_size
    for key in _drop_auto(settings):
        filled[key] = "DeepSpeed's default"
    return settings, filled


def _owned(config: Config, world_size: int, precision: str, settings: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """DeepSpeed keys that the run's settings decide -> (value, the settings in words)."""
    batch, clip = config.batch, config.optim.clip
    accumulation = micro_steps(config, world_size)
    words = f"batch.pairs_per_step = {batch.pairs_per_step}, batch.micro_pairs = {batch.micro_pairs}"
    exact = f'model.precision = "{config.model.precision}"'
    if config.model.precision == "auto":
        exact += f", which is {precision} here"
    named = f'optim.name = "{config.optim.name}"'
    offloaded = {"zero_force_ds_cpu_optimizer": (False, named)} if _offloads(settings, "optimizer") else {}
    return {
        "train_batch_size": (batch.pairs_per_step, f"batch.pairs_per_step = {batch.pairs_per_step}"),
        "train_micro_batch_size_per_gpu": (batch.micro_pairs, f"batch.micro_pairs = {batch.micro_pairs}"),
        "gradient_accumulation_steps": (accumulation, f"{words}, ranks = {world_size}, which give {accumulation}"),
        "gradient_clipping": (clip, f"optim.clip = {clip}"),
        "bf16.enabled": (precision == "bf16", exact),
        "fp16.enabled": (precision == "fp16", exact),
        "data_types.grad_accum_dtype": ("fp32", "the promise that gradients are summed in fp32"),
        "zero_allow_untested_optimizer": (True, named),
        **offloaded,
    }


def _promised(precision: str) -> dict[str, Any]:
    """DeepSpeed keys for which we have a better default than DeepSpeed; the file may say otherwise."""
    # By default half-precision weights have their gradients reduced in half precision, after the fp32 sum.
    return {} if DTYPES[precision] is torch.float32 else {"communication_data_type": "fp32"}


def _refuse_foreign(settings: dict[str, Any], source: str) -> None:
    for key, why in _REFUSED.items():
        section = settings.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise UserError(f"{source}: section '{key}' has no place in the DeepSpeed file: {why}; remove it")
    for key, (value, why) in _REFUSED_VALUES.items():
        if (found := _get(settings, key)) not in _AUTO and found == value:
            raise UserError(f"{source}: {key} = {json.dumps(found)} does not work here: {why}; change or remove it")
    for key, why in _ZERO_REFUSED.items():
        if (found := _get(settings, f"zero_optimization.{key}")) not in (*_AUTO, False, -1):
            here = f"{source}: zero_optimization.{key} = {json.dumps(found)}"
            raise UserError(f"{here} does not work here: {why}; remove it")
    if (ratio := _get(settings, "zero_optimization.offload_optimizer.ratio")) not in (*_AUTO, 1, 1.0):
        raise UserError(
            f"{source}: zero_optimization.offload_optimizer.ratio = {ratio} does not work here: DeepSpeed steps the "
            "rest with an optimizer of its own; remove it"
        )


def _offloads(settings: dict[str, Any], what: str) -> bool:
    """Whether a DeepSpeed file keeps the 'optimizer' or the parameters ('param') off the device."""
    return _get(settings, f"zero_optimization.offload_{what}.device") not in (*_AUTO, "none")


def check_combination(config: Config, precision: str, world: World, ds: dict[str, Any] | None) -> None:
    """Raise SettingsError for a precision, optimizer, stage and device that do not go together."""
    if ds is None and world.size > 1:
        raise UserError(f"{world.size} processes need DeepSpeed: give --ds_config, e.g. configs/ds_zero2.json")
    _check_precision(precision, world, -1 if ds is None else zero_stage(ds))
    _check_optimizer(config, precision, ds)
    if ds is not None:
        _check_offload(config, precision, world, ds)


def _check_precision(precision: str, world: World, stage: int) -> None:
    if precision == "fp16" and stage < 0:
        raise UserError(
            "model.precision = 'fp16' needs DeepSpeed's loss scaling: give --ds_config with ZeRO stage 1, 2 or 3, "
            "or take bf16, bf16-autocast or fp32"
        )
    if precision == "fp16" and world.device.type != "cuda":
        raise UserError("model.precision = 'fp16' needs a CUDA device: on cpu take fp32 or bf16")
    if stage == 0 and DTYPES[precision] is not torch.float32:
        raise UserError(
            f"zero_optimization.stage = 0 with model.precision = '{precision}': DeepSpeed cannot sum its gradients in "
            "fp32 there; take stage 1, 2 or 3, or model.precision = 'bf16-autocast' or 'fp32'"
        )


def _check_optimizer(config: Config, precision: str, ds: dict[str, Any] | None) -> None:
    optim, stage = config.optim, 0 if ds is None else zero_stage(ds)
    if optim.name == "adafactor" and stage > 0:
        raise UserError(
            f"optim.name = 'adafactor' with zero_optimization.stage = {stage}: Adafactor factors whole matrices, "
            "and ZeRO hands the optimizer flat pieces of them; take one process without --ds_config, or ZeRO "
            "stage 0 with model.precision = 'bf16-autocast' or 'fp32' (configs/ds_zero0.json), or another optimizer"
        )
    special = {"master": "fp32", "accumulate": "fp32", "offload": "none"}
    for key in (key for key, usual in special.items() if getattr(optim, key) != usual):
        found = f"optim.{key} = '{getattr(optim, key)}'"
        if optim.name != ALIGNED:
            raise UserError(f"{found} needs optim.name = '{ALIGNED}', and it is '{optim.name}'")
        if ds is not None:
            instead = "; its file can offload: configs/ds_zero3_offload.json" if key == "offload" else ""
            raise UserError(f"{found} is for one process without --ds_config: DeepSpeed keeps fp32 sums{instead}")
        if precision != "bf16" and key != "offload":
            raise UserError(f"{found} needs model.precision = 'bf16', and it is '{precision}'")
    if optim.offload == "states+gradients" and DTYPES[precision] is torch.float32:
        raise UserError(
            f"optim.offload = 'states+gradients' needs model.precision = 'bf16', and it is '{precision}': the "
            "gradients of fp32 weights are summed where the weights are"
        )


def _check_offload(config: Config, precision: str, world: World, ds: dict[str, Any]) -> None:
    stage, half = zero_stage(ds), DTYPES[precision] is not torch.float32
    if _offloads(ds, "optimizer") and stage == 0:
        raise UserError("zero_optimization.offload_optimizer needs zero_optimization.stage = 1, 2 or 3")
    if _offloads(ds, "param") and stage < 3:
        raise UserError(f"zero_optimization.offload_param needs zero_optimization.stage = 3, and it is {stage}")
    steps = micro_steps(config, world.size)
    if _offloads(ds, "optimizer") and stage < 3 and half and steps > 1:
        raise UserError(
            f"zero_optimization.offload_optimizer at stage {stage} with model.precision = '{precision}': DeepSpeed "
            f"sums the gradients of a step's {steps} micro-batches in {precision} there; take stage 3 "
            "(configs/ds_zero3_offload.json), model.precision = 'bf16-autocast', or one micro-batch a step "
            "(batch.micro_pairs)"
        )


def _get(settings: dict[str, Any], dotted: str) -> Any:
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        settings = settings.setdefault(key, {})
    settings[last] = value


def _drop_auto(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in list(settings.items()):
        if isinstance(value, dict):
            yield from _drop_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            del settings[key]
            yield prefix + key
