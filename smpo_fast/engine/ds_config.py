"""The DeepSpeed file: what it may contain, and which of its keys the run's settings fill in."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smpo_fast.common.errors import ConfigError
from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.config import recipes
from smpo_fast.config.schema import Config
from smpo_fast.engine.batch_size import micro_batches_per_step, pairs_per_rank

_AUTO = (None, "auto")

# What a DeepSpeed file must not contain: the run's settings own it, or a promise of this project would break.
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
    "zero_optimization.offload_optimizer.super_offload": (True, "it comes with its own optimizer"),
    "zero_optimization.offload_optimizer.device": (
        "nvme",
        'optimizer states are stored per parameter here, and DeepSpeed swaps only those of flat tensors; take "cpu"',
    ),
    "zero_optimization.offload_param.device": ("nvme", 'it is not tested; take "cpu" (SDXL in bf16: 5 GB)'),
    "bf16.check_grad_overflow": (False, "a step with a non-finite gradient is skipped"),
    "bf16.bf16_master_weights_and_grads": (True, "master weights and gradient sums are fp32"),
    "fp16.fp16_master_weights_and_grads": (True, "master weights and gradient sums are fp32"),
}
# Keys whose values are objects.
_SECTIONS = (
    "bf16", "bfloat16", "fp16", "data_types", "zero_optimization",
    "zero_optimization.offload_optimizer", "zero_optimization.offload_param",
)  # fmt: skip
# Sections of zero_optimization that change where parameters are stored, or which optimizer updates them.
_ZERO_REFUSED = {
    "zenflow": "it comes with its own optimizer",
    "mics_shard_size": "parameters are split over all ranks",
    "elastic_checkpoint": "checkpoints are written by this project's engine and fit any number of ranks",
    "cpu_offload": "it is the old name of offload_optimizer",
}


def read_ds_file(path: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON file, given by path or by the name of a shipped one.

    Raises ConfigError when it is missing or not a JSON object.
    """
    path = recipes.located(Path(path), ".json")
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        known = ", ".join(recipes.names(".json"))
        reason = (
            f"{path}: cannot be read ({error.strerror}): give --ds_config a DeepSpeed JSON file, or a name of {known}"
        )
        raise ConfigError(reason) from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: found a JSON {type(values).__name__}, a DeepSpeed file is an object: {{...}}")
    _check_sections(values, path)
    return values


def _check_sections(values: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for a section that is no JSON object."""
    for key in _SECTIONS:
        found = get_key(values, key)
        if found is not None and not isinstance(found, dict):
            raise ConfigError(f"{path}: {key} = {json.dumps(found)[:200]}: it is a section, an object: {{...}}")


def zero_stage(ds: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed file's content, 0 by default; raises ConfigError for one that does not exist."""
    stage = get_key(ds, "zero_optimization.stage")
    if stage in _AUTO:
        return 0
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(f"DeepSpeed file: zero_optimization.stage = {stage!r}: 0, 1, 2 and 3 exist")
    return stage


def resolve_ds_settings(
    raw: dict[str, Any], source: str, config: Config, world_size: int, precision: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings for DeepSpeed, and those of them that were filled in (dotted key -> value).

    raw: the content of the file; source: its name, for messages. Keys that the run decides may be absent or "auto" in
    the file; any other "auto" becomes DeepSpeed's default. Raises ConfigError where the file contradicts the run: the
    message names the key and value of the file, and the setting.
    """
    settings = copy.deepcopy(raw)
    if "bfloat16" in settings:  # DeepSpeed's old name
        settings["bf16"] = settings.pop("bfloat16")
    _refuse_foreign(settings, source)
    filled: dict[str, Any] = {}
    for key, (value, setting) in _owned(config, world_size, precision, settings).items():
        found = get_key(settings, key)
        if found in _AUTO:
            filled[key] = value
        elif found != value:
            here = f"{source}: {key} = {json.dumps(found)}"
            raise ConfigError(f'{here} contradicts {setting}: change one of them, or write "auto" in the file')
        _set_key(settings, key, value)
    for key, value in _better_defaults(precision).items():
        if get_key(settings, key) in _AUTO:
            filled[key] = value
            _set_key(settings, key, value)
    # DeepSpeed requires this product, which exceeds pairs_per_step when the last micro-batch is smaller.
    micro = min(config.batch.micro_pairs, pairs_per_rank(config, world_size))
    settings["train_micro_batch_size_per_gpu"] = micro
    settings["train_batch_size"] = micro * settings["gradient_accumulation_steps"] * world_size
    for key in _drop_auto(settings):
        filled[key] = "DeepSpeed's default"
    return settings, filled


def _owned(config: Config, world_size: int, precision: str, settings: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """DeepSpeed keys that the run's settings decide -> (value, the settings for messages)."""
    batch, clip = config.batch, config.optim.clip
    accumulation = micro_batches_per_step(config, world_size)
    sizes = f"batch.pairs_per_step = {batch.pairs_per_step}, batch.micro_pairs = {batch.micro_pairs}"
    exact = f'model.precision = "{config.model.precision}"'
    if config.model.precision == "auto":
        exact += f", which is {precision} here"
    named = f'optim.name = "{config.optim.name}"'
    offloaded = {"zero_force_ds_cpu_optimizer": (False, named)} if offloads(settings, "optimizer") else {}
    return {
        "train_batch_size": (batch.pairs_per_step, f"batch.pairs_per_step = {batch.pairs_per_step}"),
        "train_micro_batch_size_per_gpu": (batch.micro_pairs, f"batch.micro_pairs = {batch.micro_pairs}"),
        "gradient_accumulation_steps": (accumulation, f"{sizes}, ranks = {world_size}, which give {accumulation}"),
        "gradient_clipping": (clip, f"optim.clip = {clip}"),
        "bf16.enabled": (precision == "bf16", exact),
        "fp16.enabled": (precision == "fp16", exact),
        "data_types.grad_accum_dtype": ("fp32", "the rule that gradients are summed in fp32"),
        "zero_allow_untested_optimizer": (True, named),
        **offloaded,
    }


def _better_defaults(precision: str) -> dict[str, Any]:
    """DeepSpeed keys whose default differs here; the file may set them otherwise."""
    # DeepSpeed's default reduces the gradients of half-precision weights in half precision, after the fp32 sum.
    return {} if COMPUTE_DTYPES[precision] is torch.float32 else {"communication_data_type": "fp32"}


def _refuse_foreign(settings: dict[str, Any], source: str) -> None:
    for key, why in _REFUSED.items():
        section = settings.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(f"{source}: section '{key}' does not belong in the DeepSpeed file: {why}; remove it")
    for key, (value, why) in _REFUSED_VALUES.items():
        if (found := get_key(settings, key)) not in _AUTO and found == value:
            raise ConfigError(f"{source}: {key} = {json.dumps(found)} does not work here: {why}; change or remove it")
    for key, why in _ZERO_REFUSED.items():
        if (found := get_key(settings, f"zero_optimization.{key}")) not in (*_AUTO, False, -1):
            here = f"{source}: zero_optimization.{key} = {json.dumps(found)}"
            raise ConfigError(f"{here} does not work here: {why}; remove it")
    if (ratio := get_key(settings, "zero_optimization.offload_optimizer.ratio")) not in (*_AUTO, 1, 1.0):
        raise ConfigError(
            f"{source}: zero_optimization.offload_optimizer.ratio = {ratio} does not work here: DeepSpeed updates "
            "the rest with its own optimizer; remove it"
        )


def offloads(settings: dict[str, Any], what: str) -> bool:
    """Whether a DeepSpeed file's content keeps the 'optimizer' or the parameters ('param') off the device."""
    return get_key(settings, f"zero_optimization.offload_{what}.device") not in (*_AUTO, "none")


def get_key(settings: dict[str, Any], dotted: str) -> Any:
    """The value of a dotted key such as 'bf16.enabled'; None where it is absent."""
    value: Any = settings
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _set_key(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        if settings.get(key) is None:
            settings[key] = {}
        settings = settings[key]
    settings[last] = value


def _drop_auto(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in list(settings.items()):
        if isinstance(value, dict):
            yield from _drop_auto(value, f"{prefix}{key}.")
        elif value == "auto":
            del settings[key]
            yield prefix + key
