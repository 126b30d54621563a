"""Seconds of an optimizer step, modelled from assumptions or measured on this device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from smpo_fast.common.errors import EnvironmentProblem
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
from smpo_fast.planning.memory import average_bytes, state_bytes, zero_layout
from smpo_fast.planning.planned_run import PlannedRun, RunVariant
from smpo_fast.planning.profiles import Profile

UTILISATION = 0.35  # share of the dense peak that a UNet reaches; assumed, --measure replaces it
CALL_SECONDS = 0.005  # per network call regardless of its size: launches and small kernels; assumed


@dataclass(frozen=True)
class Workload:
    """Network calls and FLOPs per trained pair, by phase."""

    calls: dict[str, float]  # per image
    flops: dict[str, float]  # per pair


@lru_cache(maxsize=64)
def _calls(schedule: NoiseSchedule, how: Inversion, pairs: int) -> float:
    """Inversion calls per image and trained pair, averaged over a step."""
    if how.source != "inversion":
        return 0.0
    return sum(inversion.network_calls(path.depth, how) for path in schedule.paths(pairs, how, 0, 0)) / pairs


def work(run: PlannedRun, schedule: NoiseSchedule, checkpointing: bool) -> Workload:
    """The network calls that the method needs, and their FLOPs."""
    calls = {
        "inversion": _calls(schedule, run.config.inversion, run.config.batch.pairs_per_step),
        "reference": float(_needs_reference(run.config)),
        "policy": 1.0,
    }
    forward = IMAGES_PER_PAIR * footprint.inference_cost(run.network, run.precision).flops
    both = IMAGES_PER_PAIR * footprint.training_cost(run.network, run.precision, checkpointing).flops
    each = {"inversion": forward, "reference": forward, "policy": both}
    return Workload(calls, {phase: calls[phase] * each[phase] for phase in calls})


def _needs_reference(settings: Config) -> bool:
    return OBJECTIVES[settings.objective.name].needs_reference


class Rates(NamedTuple):
    """What a device is taken to do: FLOP/s by phase, seconds that each call takes besides, seconds of the optimizer."""

    flops: Mapping[str, float]
    call: float
    optimizer: float


def assumed_rates(gpu: Gpu, precision: str) -> Rates | None:
    """``UTILISATION`` of a GPU's peak; None if that is unknown."""
    if not gpu.tflops or precision == "fp32":
        return None
    rate = gpu.tflops * 1e12 * UTILISATION
    return Rates(dict.fromkeys(("inversion", "reference", "policy"), rate), CALL_SECONDS, 0.0)


def measured_rates(profile: Profile) -> Rates:
    """Those that ``smpo tune`` measured, in which launches are contained."""
    return Rates(profile.rates, 0.0, profile.seconds["optimizer"])


def modelled_seconds(
    run: PlannedRun, variant: RunVariant, schedule: NoiseSchedule, gpu: Gpu, rates: Rates | None = None
) -> dict[str, float] | None:
    """Modelled seconds of a step by phase; None without rates, if the GPU's speed is unknown."""
    rates = rates or assumed_rates(gpu, variant.precision)
    if rates is None:
        return None
    done, examples = work(run, schedule, variant.checkpointing), run.examples_of_rank
    size = {"inversion": variant.inversion_pairs, "reference": variant.micro_pairs, "policy": variant.micro_pairs}
    calls = {phase: math.ceil(examples * done.calls[phase] / size[phase]) for phase in size}
    seconds = {
        phase: examples * done.flops[phase] / rates.flops[phase] + calls[phase] * rates.call
        for phase in size
        if done.flops[phase]
    }
    link = link_gb(run, gpu)
    exchange = _exchanged_gb(run, variant, calls) / link if link else 0.0
    host = _host_gb(run, variant) / gpu.host_gb
    return {**seconds, "optimizer": rates.optimizer, "exchange": exchange, "host": host}


def _exchanged_gb(run: PlannedRun, variant: RunVariant, calls: Mapping[str, int]) -> float:
    """GB that a rank sends to the others in a step, assuming that none of it overlaps with computing."""
    if run.ranks == 1:
        return 0.0
    zero, (trained, frozen), others = zero_layout(variant), run.counts, 1 - 1 / run.ranks
    size = COMPUTE_DTYPES[variant.precision].itemsize
    reductions = calls["policy"] if zero.gradients_sharded else 2  # scattered each time, or all-reduced once
    gathers = (sum(calls.values()) + calls["policy"]) * zero.weights_sharded + (variant.reference == "sharded")
    updated = trained * size * (zero.states_sharded and not zero.weights_sharded)
    return others * (4 * trained * reductions + (trained + frozen) * size * gathers + updated) / 1e9


def _host_gb(run: PlannedRun, variant: RunVariant) -> float:
    """GB between the host and a GPU in a step."""
    (trained, frozen), size = run.counts, COMPUTE_DTYPES[variant.precision].itemsize
    micro_steps = math.ceil(run.examples_of_rank / variant.micro_pairs)
    share = 1 / run.ranks if zero_layout(variant).states_sharded else 1.0
    gradients = (size * trained * micro_steps + size * trained) * share * variant.gradients_on_host
    gradients += 2 * (state_bytes(variant.optimizer, run.network) + average_bytes(run)) * (variant.offload != "none")
    inverted = (
        math.ceil(run.pairs_of_rank / variant.inversion_pairs) if run.config.inversion.source == "inversion" else 0
    )
    weights = (trained + frozen) * size / run.ranks * (3 * micro_steps + inverted) * variant.offload_weights
    streams = 1 + (run.config.inversion.source == "inversion" and run.config.inversion.network == "reference")
    return (gradients + weights + (trained + frozen) * size * streams * (variant.reference == "streamed")) / 1e9


def measure(run: PlannedRun, source: ModelSource, schedule: NoiseSchedule, device: torch.device) -> dict[str, float]:
    """Seconds of a step by phase on this device, from one call of each at the settings' batch sizes.

    The weights are random, which does not change the time; the optimizer step is that of one process without DeepSpeed.
    Raises EnvironmentProblem if the device has too little memory.
    """
    variant, settings = run.variant(), run.config
    world, done = World(device=device), work(run, schedule, run.config.model.gradient_checkpointing)
    try:
        policy = _random(run.network, torch.float32, device)
        if settings.model.gradient_checkpointing:
            policy.enable_gradient_checkpointing()
        engine = create.make_engine(policy, settings, world, variant.precision, None)
        denoiser = Denoiser(engine.unet, source, schedule, variant.precision, device)
        inverted = _clock(lambda: denoiser(*_inputs(run, variant.inversion_pairs, device)), device, no_grad=True)
        frozen = _clock(lambda: denoiser(*_inputs(run, variant.micro_pairs, device)), device, no_grad=True)

        def train() -> None:
            engine.backward(denoiser(*_inputs(run, variant.micro_pairs, device)).square().mean(), last=True)

        trained = _clock(train, device)
        stepped = _clock(lambda: engine.step(0.0), device, warm=False)
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"--measure: {error}".partition(". ")[0] + ": use the settings that fit, or leave out --measure"
        ) from error
    examples = run.examples_of_rank
    return {
        "inversion": examples * done.calls["inversion"] * inverted / variant.inversion_pairs,
        "reference": examples * done.calls["reference"] * frozen / variant.micro_pairs,
        "policy": examples * trained / variant.micro_pairs,
        "optimizer": stepped,
    }


def _random(network: NetworkSpec, dtype: torch.dtype, device: torch.device) -> Any:
    unet = network.build(dtype, device)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


def _inputs(run: PlannedRun, pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x = torch.randn(pairs, IMAGES_PER_PAIR, *run.network.latent, device=device)
    prompt, sdxl = torch.randn(pairs, *run.network.prompt, device=device), run.network.kind == "sdxl"
    pooled = torch.randn(pairs, run.network.pooled, device=device) if sdxl else None
    sizes = torch.full((pairs, 6), float(run.config.data.resolution), device=device) if sdxl else None
    return x, torch.full((pairs,), 500, device=device), Conditioning(prompt, pooled, sizes)


def _clock(call: Callable[[], Any], device: torch.device, *, no_grad: bool = False, warm: bool = True) -> float:
    """Seconds of a call. On a GPU, a first call that selects kernels is not counted."""

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
