"""The engine: precision, gradient accumulation, clipping and ZeRO behind one small protocol.

``LocalEngine`` is plain PyTorch on one device and the ground truth; ``DeepSpeedEngine`` gives the same numbers
on any number of ranks under ZeRO 0 to 3. Both save slices of parameters, which the other can read. Only this room
imports deepspeed.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import io
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from smpo_fast.config import Config, SettingsError
from smpo_fast.optimizers import ALIGNED, Held, SlicedOptimizer, make_optimizer
from smpo_fast.runtime import COMPUTE_DTYPES as DTYPES
from smpo_fast.runtime import World, rng
from smpo_fast.slices import Reader, Slice, Writer

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # a rank that is not heard of for so long ends the others
_AUTO = (None, "auto")
_SCALER = "loss_scale.json"

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
    """What the weights are held in for computing; master weights, where there are any, are fp32."""
    layout: dict[str, str | int]
    """How the state is kept: engine, zero_stage, world_size, and what a checkpoint must share to be read:
    precision, master, optimizer."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``, a scalar: this micro-batch's share of the mean over the rank's pairs.

        ``last`` marks the step's last micro-batch.
        """

    def step(self, lr: float) -> StepResult:
        """Average the gradients over the ranks, clip, update with rate ``lr``, and drop them.

        A loss or gradient that is not finite on any rank leaves weights and optimizer state as they were, on
        every rank.
        """

    def save(self, folder: Path) -> None:
        """Write this rank's slices of weights and optimizer state into ``folder``, which exists.

        Gradients on their way are left out. Not collective: an error is this rank's alone.
        """

    def load(self, folder: Path) -> None:
        """Read what all ranks of a run wrote with ``save``, whatever their number, engine or ZeRO stage.

        Call it before the first backward pass. An error on one rank is raised on all.
        """

    def full_state(self) -> dict[str, Tensor]:
        """The state dict with the master weights in fp32, on CPU: complete on rank 0, empty on the others."""


def make_engine(
    unet: nn.Module, config: Config, world: World, precision: str, ds_settings: dict[str, Any] | None
) -> Engine:
    """The engine that trains ``unet`` (parameters with ``requires_grad``) on ``world``, in place.

    ``precision`` comes from ``resolve_precision``, ``ds_settings`` from ``resolve_ds_settings`` (None: no
    DeepSpeed). With 'bf16-autocast' the engine's ``unet`` autocasts by itself. Raises SettingsError for a
    combination that does not work and for a missing bitsandbytes.
    """
    check_combination(config, precision, world, ds_settings)
    if precision == "bf16-autocast":
        # On the module, not around it: DeepSpeed's forward switches an outer autocast off.
        unet.forward = torch.autocast(world.device.type, torch.bfloat16)(unet.forward)  # type: ignore[method-assign]
    if ds_settings is None:
        return LocalEngine(unet, config, world, precision)
    return DeepSpeedEngine(unet, config, world, precision, ds_settings)


def micro_steps(config: Config, world_size: int) -> int:
    """Micro-batches in one step of a rank; the last one may be smaller.

    Raises SettingsError when the pairs of a step do not divide evenly among the ranks.
    """
    return math.ceil(pairs_per_rank(config, world_size) / config.batch.micro_pairs)


def pairs_per_rank(config: Config, world_size: int) -> int:
    """Pairs of one rank in one step; raises SettingsError when they do not divide evenly."""
    pairs, rest = divmod(config.batch.pairs_per_step, world_size)
    if rest:
        raise SettingsError(
            f"batch.pairs_per_step = {config.batch.pairs_per_step} does not divide among {world_size} ranks: "
            f"take a multiple of {world_size}"
        )
    return pairs


# --- settings -------------------------------------------------------------------------------------------------


def read_ds_file(path: Path) -> dict[str, Any]:
    """A DeepSpeed JSON file as it stands; raises SettingsError when it is missing or not a JSON object."""
    try:
        values = json.loads(Path(path).read_text())
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror}): give --ds_config a DeepSpeed JSON file"
        raise SettingsError(reason) from error
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: found a JSON {type(values).__name__}, a DeepSpeed file is an object: {{...}}")
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
        raise SettingsError("DeepSpeed file: bf16.enabled and fp16.enabled are both true: enable one of them")
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
        raise SettingsError(f"DeepSpeed file: zero_optimization.stage = {stage!r}: 0, 1, 2 and 3 exist")
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
            raise SettingsError(f'{here} contradicts {setting}: change one of them, or write "auto" in the file')
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
            raise SettingsError(f"{source}: section '{key}' has no place in the DeepSpeed file: {why}; remove it")
    for key, (value, why) in _REFUSED_VALUES.items():
        if (found := _get(settings, key)) not in _AUTO and found == value:
            raise SettingsError(f"{source}: {key} = {json.dumps(found)} does not work here: {why}; change or remove it")
    for key, why in _ZERO_REFUSED.items():
        if (found := _get(settings, f"zero_optimization.{key}")) not in (*_AUTO, False, -1):
            here = f"{source}: zero_optimization.{key} = {json.dumps(found)}"
            raise SettingsError(f"{here} does not work here: {why}; remove it")
    if (ratio := _get(settings, "zero_optimization.offload_optimizer.ratio")) not in (*_AUTO, 1, 1.0):
        raise SettingsError(
            f"{source}: zero_optimization.offload_optimizer.ratio = {ratio} does not work here: DeepSpeed steps the "
            "rest with an optimizer of its own; remove it"
        )


def _offloads(settings: dict[str, Any], what: str) -> bool:
    """Whether a DeepSpeed file keeps the 'optimizer' or the parameters ('param') off the device."""
    return _get(settings, f"zero_optimization.offload_{what}.device") not in (*_AUTO, "none")


def check_combination(config: Config, precision: str, world: World, ds: dict[str, Any] | None) -> None:
    """Raise SettingsError for a precision, optimizer, stage and device that do not go together."""
    if ds is None and world.size > 1:
        raise SettingsError(f"{world.size} processes need DeepSpeed: give --ds_config, e.g. configs/ds_zero2.json")
    _check_precision(precision, world, -1 if ds is None else zero_stage(ds))
    _check_optimizer(config, precision, ds)
    if ds is not None:
        _check_offload(config, precision, world, ds)


def _check_precision(precision: str, world: World, stage: int) -> None:
    if precision == "fp16" and stage < 0:
        raise SettingsError(
            "model.precision = 'fp16' needs DeepSpeed's loss scaling: give --ds_config with ZeRO stage 1, 2 or 3, "
            "or take bf16, bf16-autocast or fp32"
        )
    if precision == "fp16" and world.device.type != "cuda":
        raise SettingsError("model.precision = 'fp16' needs a CUDA device: on cpu take fp32 or bf16")
    if stage == 0 and DTYPES[precision] is not torch.float32:
        raise SettingsError(
            f"zero_optimization.stage = 0 with model.precision = '{precision}': DeepSpeed cannot sum its gradients in "
            "fp32 there; take stage 1, 2 or 3, or model.precision = 'bf16-autocast' or 'fp32'"
        )


def _check_optimizer(config: Config, precision: str, ds: dict[str, Any] | None) -> None:
    optim, stage = config.optim, 0 if ds is None else zero_stage(ds)
    if optim.name == "adafactor" and stage > 0:
        raise SettingsError(
            f"optim.name = 'adafactor' with zero_optimization.stage = {stage}: Adafactor factors whole matrices, "
            "and ZeRO hands the optimizer flat pieces of them; take one process without --ds_config, or ZeRO "
            "stage 0 with model.precision = 'bf16-autocast' or 'fp32' (configs/ds_zero0.json), or another optimizer"
        )
    special = {"master": "fp32", "accumulate": "fp32", "offload": "none"}
    for key in (key for key, usual in special.items() if getattr(optim, key) != usual):
        found = f"optim.{key} = '{getattr(optim, key)}'"
        if optim.name != ALIGNED:
            raise SettingsError(f"{found} needs optim.name = '{ALIGNED}', and it is '{optim.name}'")
        if ds is not None:
            instead = "; its file can offload: configs/ds_zero3_offload.json" if key == "offload" else ""
            raise SettingsError(f"{found} is for one process without --ds_config: DeepSpeed keeps fp32 sums{instead}")
        if precision != "bf16" and key != "offload":
            raise SettingsError(f"{found} needs model.precision = 'bf16', and it is '{precision}'")
    if optim.offload == "states+gradients" and DTYPES[precision] is torch.float32:
        raise SettingsError(
            f"optim.offload = 'states+gradients' needs model.precision = 'bf16', and it is '{precision}': the "
            "gradients of fp32 weights are summed where the weights are"
        )


def _check_offload(config: Config, precision: str, world: World, ds: dict[str, Any]) -> None:
    stage, half = zero_stage(ds), DTYPES[precision] is not torch.float32
    if _offloads(ds, "optimizer") and stage == 0:
        raise SettingsError("zero_optimization.offload_optimizer needs zero_optimization.stage = 1, 2 or 3")
    if _offloads(ds, "param") and stage < 3:
        raise SettingsError(f"zero_optimization.offload_param needs zero_optimization.stage = 3, and it is {stage}")
    steps = micro_steps(config, world.size)
    if _offloads(ds, "optimizer") and stage < 3 and half and steps > 1:
        raise SettingsError(
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


# --- what both engines do -------------------------------------------------------------------------------------


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _poisoned(loss: Tensor) -> Tensor:
    """``loss`` with its gradients made NaN when it is not finite; bitwise the same when it is. No host sync."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)


def _add_by_chance(total: Tensor, x: Tensor, generator: torch.Generator) -> None:
    """Add to a bf16 sum, rounding up or down with the probability that leaves the mean."""
    exact = total.float() + x.float()
    chance = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    rounded = ((exact.view(torch.int32) + chance) & -65536).view(torch.float32)
    total.copy_(torch.where(exact.isfinite(), rounded, exact))


def _write(folder: Path, rank: int, held: Iterable[Held], optimizer: SlicedOptimizer, module: nn.Module) -> None:
    writer = Writer(folder, rank)
    for one in held:
        writer.add(one.piece, "weight", one.values())
        for word, numbers in optimizer.numbers(one.piece):
            writer.add(one.piece, word, numbers)
    if rank == 0:
        for name, buffer in _persistent_buffers(module).items():
            writer.add(Slice(name, 0, buffer.numel()), "buffer", buffer)
    writer.close()


@torch.no_grad()
def _read(folder: Path, held: Iterable[Held], optimizer: SlicedOptimizer, module: nn.Module) -> None:
    saved = Reader(folder)
    for one in held:
        weights = one.values()
        weights.copy_(saved.elements(one.piece, "weight").view(weights.shape))
        optimizer.restore(one.piece, saved)
    for name, buffer in _persistent_buffers(module).items():
        if buffer.numel():
            buffer.copy_(saved.elements(Slice(name, 0, buffer.numel()), "buffer").view(buffer.shape))


def _whole(parameters: dict[str, Tensor]) -> list[Held]:
    return [Held(Slice(name, 0, p.numel()), p.numel(), p) for name, p in parameters.items()]


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict().keys()
    return {name: b for name, b in module.named_buffers(remove_duplicate=False) if name in kept}


# --- plain PyTorch --------------------------------------------------------------------------------------------


class LocalEngine:
    """One device, no DeepSpeed."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str) -> None:
        self.unet = unet.to(world.device)
        self.dtype = DTYPES[precision]
        self.layout = _layout("local", 0, world, precision, config)
        self._config, self._device = config, world.device
        self._masters: dict[str, Tensor] = {}  # what is stepped, by parameter name: fp32, but for master = "none"
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []  # half parameter, its fp32 master
        self._sums: dict[str, Tensor] = {}  # the step's gradients of half parameters; those of fp32 ones are .grad
        for name, parameter in unet.named_parameters():
            self._adopt(name, parameter)
        self._optimizer = make_optimizer(self._masters.values(), config, world)
        self._held = _whole(self._masters)
        self._optimizer.hold([list(self._masters.values())], self._held)
        self._chance: torch.Generator | None = None
        if config.optim.accumulate == "bf16-sr":
            self._chance = torch.Generator(self._sums_device())
        self._ready = False

    def _adopt(self, name: str, parameter: nn.Parameter) -> None:
        original = parameter.data
        parameter.data = original.to(self.dtype)
        if not parameter.requires_grad:
            return
        if self.dtype is torch.float32:
            self._masters[name] = parameter
            return
        parameter.register_post_accumulate_grad_hook(partial(self._accumulate, name))
        if self._config.optim.master == "none":
            self._masters[name] = parameter
            return
        master = original.to(torch.float32, copy=True).requires_grad_()
        self._masters[name] = master
        self._pairs.append((parameter, master))

    def _sums_device(self) -> torch.device:
        return torch.device("cpu") if self._config.optim.offload == "states+gradients" else self._device

    @torch.no_grad()
    def _accumulate(self, name: str, half: Tensor) -> None:
        assert half.grad is not None
        gradient, half.grad = half.grad.to(self._sums_device()), None
        if (total := self._sums.get(name)) is None:
            dtype = torch.float32 if self._chance is None else torch.bfloat16
            self._sums[name] = gradient.to(dtype, copy=True)
        elif self._chance is None:
            total.add_(gradient)
        else:
            _add_by_chance(total, gradient, self._chance)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._chance is not None and not self._sums:
            self._chance.manual_seed(
                int(rng(self._config.run.seed, "accumulate", self._optimizer.steps()).integers(2**62))
            )
        _poisoned(loss).backward()
        self._ready = last

    def step(self, lr: float) -> StepResult:
        _check_ready(self._ready)
        gradients = [self._gradient(name, master) for name, master in self._masters.items()]
        norm = _norm(gradients)
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            clip = self._config.optim.clip
            scale: Tensor | float = (clip / (norm + 1e-6)).clamp(max=1.0).to(self._device) if clip else 1.0
            _set_lr(self._optimizer, lr)
            self._optimizer.step(scale=scale, gradients=gradients)
            self._refresh()
        self._optimizer.zero_grad(set_to_none=True)
        self._sums.clear()
        self._ready = False
        return result

    def _gradient(self, name: str, master: Tensor) -> Tensor:
        found = master.grad if self.dtype is torch.float32 else self._sums.get(name)
        if found is None:  # unused in the forward pass: it still decays, as it does under ZeRO
            found = torch.zeros_like(master, dtype=torch.float32)
        return found

    @torch.no_grad()
    def _refresh(self) -> None:
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def save(self, folder: Path) -> None:
        _write(folder, 0, self._held, self._optimizer, self.unet)

    def load(self, folder: Path) -> None:
        _read(folder, self._held, self._optimizer, self.unet)
        self._refresh()

    def full_state(self) -> dict[str, Tensor]:
        frozen = {name: p for name, p in self.unet.named_parameters() if not p.requires_grad}
        weights = {name: p.detach().float() for name, p in {**frozen, **self._masters}.items()}
        return {name: t.cpu().clone() for name, t in {**weights, **_persistent_buffers(self.unet)}.items()}


def _norm(gradients: list[Tensor]) -> Tensor:
    """The global norm, in fp32 whatever the gradients are in."""
    if all(g.dtype is torch.float32 for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]))


# --- DeepSpeed ------------------------------------------------------------------------------------------------


class _Network(nn.Module):
    """The policy as its callers see it: the module's own attributes, with forward passes through DeepSpeed.

    DeepSpeed's engine is no stand-in for the module: its ``config`` is DeepSpeed's, and its ``training`` flag
    does not follow ``eval()``.
    """

    def __init__(self, module: nn.Module, deepspeed_engine: nn.Module) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "_deepspeed", deepspeed_engine)  # no child: it holds the module too

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._deepspeed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class DeepSpeedEngine:
    """ZeRO 0 to 3 on all ranks of ``world``."""

    def __init__(self, unet: nn.Module, config: Config, world: World, precision: str, settings: dict[str, Any]) -> None:
        deepspeed = _import_deepspeed(world)
        self.dtype = DTYPES[precision]
        self._stage = zero_stage(settings)
        self.layout = _layout("deepspeed", self._stage, world, precision, config)
        self._module, self._world = unet, world
        named = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
        originals = {name: p.data.cpu() for name, p in named if p.dtype is not self.dtype}
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(self.dtype)
        unet.to(world.device)
        self._optimizer = make_optimizer([p for _, p in named], config, world)
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory tables
            self._engine, *_ = deepspeed.initialize(model=unet, optimizer=self._optimizer, config=settings)
        owners, self._held = self._find_slices()
        self._optimizer.hold(owners, self._held)
        if self.dtype is not torch.float32:
            self._restore_masters(originals)
        self.unet: nn.Module = _Network(unet, self._engine)
        self._ready = False

    def _find_slices(self) -> tuple[list[list[Tensor]], list[Held]]:
        """What DeepSpeed steps at a time, and where in it this rank's slices of the parameters lie."""
        trained = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        zero, groups = self._engine.optimizer, self._optimizer.param_groups
        if self._stage == 0:
            return [list(trained.values())], _whole(cast(dict[str, Tensor], trained))
        held = []
        if self._stage < 3:
            for name, p in trained.items():
                if (mapped := p._hp_mapping) is not None:  # type: ignore[attr-defined]
                    piece = Slice(name, mapped.lp_fragment_address.start, mapped.lp_fragment_address.numel)
                    owner = groups[mapped.param_group_index]["params"][0]
                    held.append(Held(piece, p.numel(), owner, mapped.hp_fragment_address.start))
            return [[group["params"][0]] for group in groups], held
        for name, p in trained.items():
            group, start, share = zero.grad_position[zero.get_param_id(p)]
            offset, total = share * self._world.rank, p.ds_numel  # type: ignore[attr-defined]
            if offset < total:
                piece = Slice(name, offset, min(share, total - offset))
                held.append(Held(piece, total, zero.fp32_partitioned_groups_flat[group], start))
        return [[flat] for flat in zero.fp32_partitioned_groups_flat], held

    @torch.no_grad()
    def _restore_masters(self, originals: dict[str, Tensor]) -> None:
        """DeepSpeed makes the fp32 master weights from the rounded ones: give them back the digits they lost."""
        for one in self._held:
            if (original := originals.get(one.piece.name)) is not None:
                one.values().copy_(original.flatten()[one.piece.offset :][: one.piece.numel])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The loss is a share of the mean already: DeepSpeed would divide by the number of micro-batches again.
        self._engine.backward(_poisoned(loss), scale_wrt_gas=False)
        self._ready = last

    def step(self, lr: float) -> StepResult:
        _check_ready(self._ready)
        self._ready = False
        _set_lr(self._engine.optimizer, lr)
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        return StepResult(applied, float(self._engine.get_global_grad_norm()))

    def _step_unsharded(self) -> StepResult:
        """At stage 0 in fp32 DeepSpeed has no check for non-finite gradients of its own."""
        # The gradients are averaged already, so the norm is the same on every rank.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        result = StepResult(math.isfinite(norm), float(norm))
        if result.applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return result

    def save(self, folder: Path) -> None:
        mine = self._held if self._stage > 0 or self._world.rank == 0 else []
        _write(folder, self._world.rank, mine, self._optimizer, self._module)
        if self.dtype is torch.float16 and self._world.rank == 0:
            (folder / _SCALER).write_text(json.dumps(_numbers_of(self._engine.optimizer.loss_scaler)))

    def load(self, folder: Path) -> None:
        problem: Exception | None = None
        try:
            _read(folder, self._held, self._optimizer, self._module)
            if self.dtype is torch.float16:
                vars(self._engine.optimizer.loss_scaler).update(json.loads((folder / _SCALER).read_text()))
        except Exception as error:
            problem = error
        problems: list[Any] = [None] * self._world.size
        torch.distributed.all_gather_object(problems, problem)
        if found := next((p for p in problems if p is not None), None):
            raise found
        self._spread_masters()

    @torch.no_grad()
    def _spread_masters(self) -> None:
        """Make the weights that compute from the master weights, on all ranks."""
        zero = self._engine.optimizer
        if self._stage in (1, 2):
            zero.update_lp_params()
        elif self._stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero._post_step(set())

    @torch.no_grad()
    def full_state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self._module.named_parameters():
            weights = self._gathered(parameter)
            if self._world.rank == 0:
                state[name] = weights.float().cpu().clone()
        if self._world.rank == 0:
            state |= {name: b.cpu().clone() for name, b in _persistent_buffers(self._module).items()}
        return state

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        import deepspeed

        if parameter.requires_grad and self._stage > 0:
            return cast(Tensor, deepspeed.utils.safe_get_full_fp32_param(parameter))
        if self._stage < 3:
            return parameter.detach()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def shutdown() -> None:
    """Leave the process group, if there is one; called at exit by itself, and harmless to call earlier."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _layout(kind: str, stage: int, world: World, precision: str, config: Config) -> dict[str, str | int]:
    return {
        "engine": kind,
        "zero_stage": stage,
        "world_size": world.size,
        "precision": precision,
        "master": config.optim.master,
        "optimizer": config.optim.name,
    }


def _numbers_of(loss_scaler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(loss_scaler).items() if isinstance(value, (bool, int, float))}


def _check_ready(ready: bool) -> None:
    if not ready:
        raise RuntimeError("step() needs backward(loss, last=True) before it")


@functools.cache
def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, with the process group it needs, also without a launcher."""
    # DeepSpeed picks its device when imported; run.device = "cpu" on a GPU machine must reach it.
    os.environ["DS_ACCELERATOR"] = world.device.type
    if "MASTER_PORT" not in os.environ and world.size == 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch is giving up: hundreds of lines that no user can act on.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU it would compile an operator for inference that training never calls: a minute, and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    atexit.register(shutdown)  # gloo's threads abort a process that ends without it
    return deepspeed
