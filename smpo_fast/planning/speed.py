"""Seconds of a step, modelled from assumptions or measured on this device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import COMPUTE_DTYPES, World
from smpo_fast.config.schema import Config, Inversion
from smpo_fast.engine import create
from smpo_fast.method import inversion
from smpo_fast.method.batch import Conditioning
from smpo_fast.method.objective import OBJECTIVES
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.models import footprint
from smpo_fast.models.denoiser import Denoiser
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.planning.gpus import Gpu, link_gb
from smpo_fast.planning.memory import Choice, Subject, _zero, state_bytes

UTILISATION = 0.35  # share of the dense peak that a UNet reaches; assumed until --measure has measured it
CALL_SECONDS = 0.005  # of a network call whatever its size: launches and small kernels; assumed


@dataclass(frozen=True)
class Workload:
    """Network calls and FLOPs of a trained pair, by phase."""

    calls: dict[str, float]  # of a picture
    flops: dict[str, float]  # of a pair


@lru_cache(maxsize=64)
def _calls(schedule: NoiseSchedule, how: Inversion, pairs: int) -> float:
    """Inversion calls of a picture for each pair that is trained, over the whole of a step."""
    if how.source != "inversion":
        return 0.0
    return sum(inversion.network_calls(path.depth, how) for path in schedule.paths(pairs, how, 0, 0)) / pairs


def work(s: Subject, schedule: NoiseSchedule, checkpointing: bool) -> Workload:
    """What the method asks for."""
    calls = {
        "inversion": _calls(schedule, s.config.inversion, s.config.batch.pairs_per_step),
        "reference": float(_asks_reference(s.config)),
        "policy": 1.0,
    }
    forward = IMAGES_PER_PAIR * footprint.inference_cost(s.network, s.precision).flops
    both = IMAGES_PER_PAIR * footprint.training_cost(s.network, s.precision, checkpointing).flops
    each = {"inversion": forward, "reference": forward, "policy": both}
    return Workload(calls, {phase: calls[phase] * each[phase] for phase in calls})


def _asks_reference(c: Config) -> bool:
    return OBJECTIVES[c.objective.name].needs_reference


def modelled_seconds(s: Subject, choice: Choice, schedule: NoiseSchedule, gpu: Gpu) -> dict[str, float] | None:
    """Seconds of a step by phase, from the assumptions; None where the table has no speed for it."""
    if not gpu.tflops or choice.precision == "fp32":
        return None
    done = work(s, schedule, choice.checkpointing)
    rate, n = gpu.tflops * 1e12 * UTILISATION, s.examples_of_rank
    size = {"inversion": choice.inversion_pairs, "reference": choice.micro_pairs, "policy": choice.micro_pairs}
    calls = {phase: math.ceil(n * done.calls[phase] / size[phase]) for phase in size}
    seconds = {phase: n * done.flops[phase] / rate + calls[phase] * CALL_SECONDS for phase in size}
    link = link_gb(s, gpu)
    seconds |= {"exchange": _exchanged_gb(s, choice, calls) / link, "host": _host_gb(s, choice) / gpu.host_gb}
    return seconds


def _exchanged_gb(s: Subject, choice: Choice, calls: Mapping[str, int]) -> float:
    """GB that a rank sends to the others in a step, none of it hidden behind computing."""
    if s.ranks == 1:
        return 0.0
    zero, (p, frozen), others = _zero(choice), s.counts, 1 - 1 / s.ranks
    size = COMPUTE_DTYPES[choice.precision].itemsize
    reductions = calls["policy"] if zero.gradients_shared else 2  # scattered each time, or all-reduced once
    gathers = (sum(calls.values()) + calls["policy"]) * zero.weights_shared + (choice.reference == "sharded")
    updated = p * size * (zero.states_shared and not zero.weights_shared)
    return others * (4 * p * reductions + (p + frozen) * size * gathers + updated) / 1e9


def _host_gb(s: Subject, choice: Choice) -> float:
    """GB between the host and a GPU in a step."""
    (p, frozen), size = s.counts, COMPUTE_DTYPES[choice.precision].itemsize
    micro_steps = math.ceil(s.examples_of_rank / choice.micro_pairs)
    share = 1 / s.ranks if _zero(choice).states_shared else 1.0
    gradients = (size * p * micro_steps + size * p) * share * choice.gradients_on_host
    gradients += 2 * state_bytes(choice.optimizer, s.network) * (choice.offload != "none")
    inverted = math.ceil(s.pairs_of_rank / choice.inversion_pairs) if s.config.inversion.source == "inversion" else 0
    weights = (p + frozen) * size / s.ranks * (3 * micro_steps + inverted) * choice.offload_weights
    streams = 1 + (s.config.inversion.source == "inversion" and s.config.inversion.network == "reference")
    return (gradients + weights + (p + frozen) * size * streams * (choice.reference == "streamed")) / 1e9


def measure(s: Subject, source: ModelSource, schedule: NoiseSchedule, device: torch.device) -> dict[str, float]:
    """Seconds of a step by phase on this device, from one call of each at the settings' batch sizes.

    Networks have random weights, which time does not depend on; the step is that of one process without DeepSpeed.
    Raises SettingsError where the device's memory does not hold it.
    """
    choice, c = s.choice(), s.config
    world, done = World(device=device), work(s, schedule, s.config.model.gradient_checkpointing)
    try:
        policy = _random(s.network, torch.float32, device)
        if c.model.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        engine = create.make_engine(policy, c, world, choice.precision, None)
        denoiser = Denoiser(engine.unet, source, schedule, choice.precision, device)
        inverted = _clock(lambda: denoiser(*_inputs(s, choice.inversion_pairs, device)), device, no_grad=True)
        frozen = _clock(lambda: denoiser(*_inputs(s, choice.micro_pairs, device)), device, no_grad=True)

        def train() -> None:
            engine.backward(denoiser(*_inputs(s, choice.micro_pairs, device)).square().mean(), last=True)

        trained = _clock(train, device)
        stepped = _clock(lambda: engine.step(0.0), device, warm=False)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--measure: {error}".partition(". ")[0] + ": take the choice that fits, or no --measure"
        ) from error
    n = s.examples_of_rank
    return {
        "inversion": n * done.calls["inversion"] * inverted / choice.inversion_pairs,
        "reference": n * done.calls["reference"] * frozen / choice.micro_pairs,
        "policy": n * trained / choice.micro_pairs,
        "optimizer": stepped,
    }


def _random(network: NetworkSpec, dtype: torch.dtype, device: torch.device) -> Any:
    unet = network.build(dtype, device)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


def _inputs(s: Subject, pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x = torch.randn(pairs, IMAGES_PER_PAIR, *s.network.latent, device=device)
    prompt, sdxl = torch.randn(pairs, *s.network.prompt, device=device), s.network.kind == "sdxl"
    pooled = torch.randn(pairs, s.network.pooled, device=device) if sdxl else None
    sizes = torch.full((pairs, 6), float(s.config.data.resolution), device=device) if sdxl else None
    return x, torch.full((pairs,), 500, device=device), Conditioning(prompt, pooled, sizes)


def _clock(call: Callable[[], Any], device: torch.device, *, no_grad: bool = False, warm: bool = True) -> float:
    """Seconds of a call; on a GPU the one before it chooses kernels and is not counted."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.set_grad_enabled(not no_grad):
        if warm and device.type == "cuda":
            call()
        wait()
        began = time.perf_counter()
        call()
        wait()
    return time.perf_counter() - began
