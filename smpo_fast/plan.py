"""What a run needs before it is started: memory, disk, hours, and the settings that fit a GPU best.

Bytes are counted (smpo_fast.footprint) and, for what DeepSpeed does with them, taken from the table ``ZERO``, whose
rows were measured by following every storage of real runs (tests/test_plan.py does it again). Seconds are either
measured on this device or modelled from the assumptions below, and each figure says which; the two are never added.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from smpo_fast import config as settings
from smpo_fast import data, footprint, inversion
from smpo_fast import engine as engines
from smpo_fast.batch import Conditioning
from smpo_fast.config import Config, SettingsError
from smpo_fast.footprint import Network, network_of
from smpo_fast.model import Denoiser, Source, find, schedule_of
from smpo_fast.objective import OBJECTIVES
from smpo_fast.optimizers import ALIGNED, STATE_BYTES
from smpo_fast.reference import resolve as resolve_reference
from smpo_fast.runtime import COMPUTE_DTYPES, World, print0
from smpo_fast.schedule import NoiseSchedule

# --- assumptions ----------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A device to plan for. Speeds are the vendor's; 0 where the table does not know them."""

    name: str
    bytes: float  # as torch reports the total
    tflops: float = 0.0  # dense bfloat16 with fp32 sums
    link_gb: float = 0.0  # GB/s a GPU sends to others of its node
    host_gb: float = 25.0  # GB/s between host and device: what pinned copies reach on PCIe 4 x16


# From NVIDIA's datasheets: dense figures (half of those "with sparsity"), for GeForce those with fp32 accumulation.
# Links: half of the NVLink total, which counts both directions; PCIe where there is no NVLink.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("B200", 191.5e9, 2250, 900, 50),
        Gpu("H200", 150.1e9, 989, 450, 50),
        Gpu("H100", 85.0e9, 989, 450, 50),
        Gpu("H100-PCIe", 85.0e9, 756, 50, 50),
        Gpu("A100-80GB", 85.1e9, 312, 300),
        Gpu("A800-80GB", 85.1e9, 312, 200),
        Gpu("A100-40GB", 42.3e9, 312, 300),
        Gpu("L40S", 47.7e9, 362, 20),
        Gpu("RTX-6000-Ada", 50.9e9, 364, 20),
        Gpu("A6000", 50.9e9, 155, 20),
        Gpu("RTX-5090", 33.7e9, 209, 50, 50),
        Gpu("RTX-4090", 25.3e9, 165, 20),
        Gpu("RTX-3090", 25.3e9, 71, 20),
        Gpu("RTX-4080", 16.9e9, 97, 20),
        Gpu("L4", 23.6e9, 121, 20),
    )
}
CPU = "this CPU"
UTILISATION = 0.35  # share of the dense peak that a UNet reaches; assumed until --measure has measured it
CALL_SECONDS = 0.005  # of a network call whatever its size: launches and small kernels; assumed
NODE_GB = 25.0  # GB/s a GPU sends to other nodes (200 Gbit/s); assumed
CONTEXT_BYTES = 0.6e9  # the CUDA context, outside the allocator; assumed
LIBRARY_BYTES = 0.15e9  # workspaces of cuBLAS and cuDNN, inside the allocator; assumed
ALLOCATOR_SHARE = 0.05  # of the peak, lost to rounding and fragments; assumed
PROCESS_BYTES = 3e9  # host memory of a rank before anything of its own: Python, torch, CUDA; assumed
FILE_BYTES = 2  # a number in the cache and in the trajectories: float16

# --- bytes a parameter ----------------------------------------------------------------------------------------

# fp32 weights beside those that compute; none with optim.master = "none"
MASTER_BYTES = {"fp32": 0, "bf16-autocast": 0, "bf16": 4, "fp16": 4}
GRADIENT_BYTES = {"fp32": 4, "bf16-sr": 2}  # sums over the micro-batches, by optim.accumulate
PAGED = "paged_adamw8bit"  # its states lie where the driver likes, outside torch's allocator


@lru_cache(maxsize=64)
def state_bytes(optimizer: str, network: Network) -> float:
    """Bytes of an optimizer's states: so many a parameter, or Adafactor's means over rows and over columns."""
    shapes = footprint.parameters(network).trained
    if optimizer != "adafactor":
        return STATE_BYTES[optimizer] * footprint.count(shapes)
    return 4 * sum(s.numel() / s[-1] + s.numel() / s[-2] if len(s) > 1 else s.numel() for s in shapes)


class Zero(NamedTuple):
    """Where a way of sharding keeps what belongs to a trained parameter: whole on every rank, or a share of it."""

    weights_shared: bool = False
    states_shared: bool = False  # masters and optimizer states
    gradients_shared: bool = False
    gradients_stay: bool = False  # between steps too
    masters_always: bool = False  # a second fp32 copy also where the weights are fp32
    halves_stay: bool = False  # half-precision gradients, beside their sums, until the step is done
    step_share: int = 0  # bytes a parameter of the share for the moment of the optimizer's step


LOCAL = Zero()
ZERO = {  # by stage and whether the weights are half precision; DeepSpeed 0.19
    (0, False): LOCAL,
    (1, False): Zero(states_shared=True, masters_always=True, step_share=4),
    (1, True): Zero(states_shared=True, gradients_stay=True, halves_stay=True),
    (2, False): Zero(states_shared=True, masters_always=True, gradients_shared=True),
    (2, True): Zero(states_shared=True, gradients_shared=True),
    (3, False): Zero(True, True, True, True, True, step_share=4),
    (3, True): Zero(True, True, True, True, step_share=4),
}
# DeepSpeed's own values where its file says nothing.
_DS_DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}


# --- what is planned ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What may be chosen to make a run fit."""

    micro_pairs: int
    inversion_pairs: int
    checkpointing: bool
    reference: str  # a word of smpo_fast.reference.resolve
    optimizer: str
    precision: str
    master: str
    accumulate: str
    stage: int | None  # None: no DeepSpeed
    offload: str = "none"  # of one process: a word of optim.offload
    offload_optimizer: bool = False  # of the DeepSpeed file
    offload_weights: bool = False

    @property
    def states_on_host(self) -> bool:
        """Whether masters and states (those that there are) live in host memory."""
        return self.offload_optimizer or self.offload != "none" or self.optimizer == PAGED

    @property
    def gradients_on_host(self) -> bool:
        """Whether the step's sums do."""
        return self.offload_optimizer or self.offload == "states+gradients"


@dataclass(frozen=True)
class Subject:
    """A run on ``ranks`` equal GPUs, ``per_node`` of them in a host."""

    config: Config
    network: Network
    precision: str
    ranks: int = 1
    per_node: int = 8
    ds: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def pairs_of_rank(self) -> int:
        """Pairs that a rank draws in a step."""
        return math.ceil(self.config.drawn_per_step / self.ranks)

    @property
    def examples_of_rank(self) -> int:
        """Pairs times timesteps that a rank trains in a step."""
        return math.ceil(self.config.batch.pairs_per_step / self.ranks)

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Trained and frozen parameters of the policy."""
        found = footprint.parameters(self.network)
        return footprint.count(found.trained), footprint.count(found.frozen)

    def choice(self) -> Choice:
        """What the settings say."""
        c, ds = self.config, self.ds or {}
        wanted = c.batch.inversion_pairs or footprint.pairs_within(
            c.batch.inversion_gb * 1e9, self.network, self.precision
        )
        return Choice(
            micro_pairs=c.batch.micro_pairs,
            inversion_pairs=min(wanted, self.pairs_of_rank),
            checkpointing=c.model.gradient_checkpointing,
            reference=resolve_reference(c, self.ds),
            optimizer=c.optim.name,
            precision=self.precision,
            master=c.optim.master,
            accumulate=c.optim.accumulate,
            stage=None if self.ds is None else engines.zero_stage(dict(ds)),
            offload=c.optim.offload,
            offload_optimizer=_offloaded(ds, "offload_optimizer"),
            offload_weights=_offloaded(ds, "offload_param"),
        )

    def ds_number(self, key: str) -> float:
        """A number of the DeepSpeed file's zero_optimization, or DeepSpeed's default."""
        value = (self.ds or {}).get("zero_optimization", {}).get(key)
        return float(value) if isinstance(value, (int, float)) else _DS_DEFAULTS[key]


def _offloaded(ds: Mapping[str, Any], key: str) -> bool:
    return (ds.get("zero_optimization", {}).get(key) or {}).get("device", "none") != "none"


# --- memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on the worst rank: what there is, and how much of it at once in each phase; of a node's host."""

    parts: dict[str, float]
    phases: dict[str, float]
    host: dict[str, float]

    @property
    def allocated(self) -> float:
        """The peak, as torch.cuda.max_memory_allocated tells it."""
        return max(self.phases.values())

    @property
    def needed(self) -> float:
        """What the GPU must have: the peak, the allocator's losses and the CUDA context."""
        return self.allocated * (1 + ALLOCATOR_SHARE) + CONTEXT_BYTES


def memory(s: Subject, choice: Choice) -> Memory:
    """The memory plan of a run; counts by shape, so nothing is allocated."""
    parts, zero, phases = _parts(s, choice), _zero(choice), {}
    p, share = s.counts[0], 1 / s.ranks
    stays = parts["weights"] + parts["masters"] + parts["optimizer states"] + parts["window"] + LIBRARY_BYTES
    if zero.gradients_stay:
        stays += parts["gradients"]
    resident = choice.reference in ("replicated", "sharded")
    frozen, gradients = parts["reference"], 0.0 if zero.gradients_stay else parts["gradients"]
    gradients += p * COMPUTE_DTYPES[choice.precision].itemsize * zero.halves_stay
    inverts = s.config.inversion.source == "inversion"
    for phase, works, held in (
        ("inversion", inverts, 0.0 if s.config.inversion.network == "policy" and not resident else frozen),
        ("reference", choice.reference != "none", frozen),
        ("policy", True, frozen if resident else 0.0),
    ):
        if works:
            phases[phase] = stays + held + parts[f"activations, {phase}"] + parts["gathered weights"]
    phases["policy"] += gradients + parts["buckets"]
    step = p * zero.step_share * share * (not choice.offload_optimizer)
    phases["optimizer"] = stays + gradients + step + (frozen if resident else 0.0)
    return Memory(parts, phases, _host(s, choice))


def _zero(choice: Choice) -> Zero:
    if choice.stage is None:
        return LOCAL
    # stage 0 in half precision is refused by the engine; its bytes are those of one process
    return ZERO.get((choice.stage, MASTER_BYTES[choice.precision] > 0), LOCAL)


def _parts(s: Subject, choice: Choice) -> dict[str, float]:
    zero, (p, frozen), share = _zero(choice), s.counts, 1 / s.ranks
    size = COMPUTE_DTYPES[choice.precision].itemsize
    whole = p + frozen
    masters = _master_bytes(choice) * p * (share if zero.states_shared else 1.0)
    states = state_bytes(choice.optimizer, s.network) * (share if zero.states_shared else 1.0)
    gradients = GRADIENT_BYTES[choice.accumulate] * p * (share if zero.gradients_shared else 1.0)
    spread = {"sharded": share, "replicated": 1.0, "streamed": 1.0}
    backward = max(
        footprint.training(s.network, choice.precision, choice.checkpointing).peak.at(choice.micro_pairs),
        p * size * (share if zero.gradients_shared else 0.0),  # what a micro-batch leaves before it is added
    )
    call = footprint.call(s.network, choice.precision).peak
    frozen_call = footprint.call(s.network, choice.precision, trained=False).peak
    gathers = choice.offload_weights or (s.ranks > 1 and (zero.weights_shared or choice.reference == "sharded"))
    # DeepSpeed releases nothing that is used again within the second of these, however much is live
    live = max(s.ds_number("stage3_max_live_parameters"), s.ds_number("stage3_max_reuse_distance"))
    return {
        "weights": 0.0 if choice.offload_weights else whole * size * (share if zero.weights_shared else 1.0),
        "masters": masters * (not choice.offload_optimizer),
        "optimizer states": states * (not choice.states_on_host),
        "gradients": gradients * (not choice.gradients_on_host),
        "reference": whole * size * spread.get(choice.reference, 0.0),
        "window": _window_bytes(s),
        "activations, inversion": call.at(min(choice.inversion_pairs, s.pairs_of_rank)),
        "activations, reference": frozen_call.at(choice.micro_pairs),
        "activations, policy": backward,
        "gathered weights": min(whole, live) * size * gathers,
        "buckets": _bucket_bytes(s, choice),
    }


def _master_bytes(choice: Choice) -> int:
    """Of a trained parameter: fp32 weights beside those that compute."""
    return max(MASTER_BYTES[choice.precision] * (choice.master == "fp32"), 4 * _zero(choice).masters_always)


def _bucket_bytes(s: Subject, choice: Choice) -> float:
    """Gradients on their way to the other ranks: a bucket as it was computed, and in the fp32 it is sent in."""
    if not choice.stage:
        return 0.0
    size = COMPUTE_DTYPES[choice.precision].itemsize
    overlap = (s.ds or {}).get("zero_optimization", {}).get("overlap_comm") is True
    return min(s.ds_number("reduce_bucket_size"), s.counts[0]) * (size + 4) * (1 + overlap)


def _window_bytes(s: Subject) -> float:
    """The step's pairs: latents and prompts of this step and the next, x_t and tau at every timestep of a pair."""
    latent = footprint.PICTURES * math.prod(s.network.latent)
    prompt = math.prod(s.network.prompt)
    return 4 * s.pairs_of_rank * (2 * (latent + prompt) + 2 * latent * s.config.inversion.per_trajectory)


def _host(s: Subject, choice: Choice) -> dict[str, float]:
    """Host memory of the fullest node, which has rank 0."""
    zero, (p, frozen), here = _zero(choice), s.counts, min(s.ranks, s.per_node)
    size = COMPUTE_DTYPES[choice.precision].itemsize
    share = 1 / s.ranks if zero.states_shared else 1.0
    states = state_bytes(choice.optimizer, s.network) * choice.states_on_host
    sums = GRADIENT_BYTES[choice.accumulate] * p * choice.gradients_on_host
    masters = max(_master_bytes(choice), 4) * p * choice.offload_optimizer
    return {
        "processes": PROCESS_BYTES * here,
        "offloaded states": (states + masters + sums) * share * here,
        "offloaded weights": (p + frozen) * size * here / s.ranks * choice.offload_weights,
        "streamed reference": (p + frozen) * size * here * (choice.reference == "streamed"),
        "prefetched pairs": _window_bytes(s) / 2 * here,
        # read from files by every rank at the start; gathered in fp32 on rank 0 for the export
        "loading or export": max((p + frozen) * 4.0 * here, (p + frozen) * 8.0),
    }


# --- disk -----------------------------------------------------------------------------------------------------


def disk(s: Subject, source: Source) -> dict[str, float]:
    """Bytes of the files that a run leaves; each distinct prompt is counted as if every pair had its own."""
    c, (p, frozen), choice = s.config, s.counts, s.choice()
    latent, prompt = math.prod(s.network.latent), math.prod(s.network.prompt)
    pooled = s.network.pooled if s.network.kind == "sdxl" else 0
    pairs, _ = pairs_in(c)
    flips, moments = 1 + c.data.flip, 2
    stepped = 4 if choice.master == "fp32" else COMPUTE_DTYPES[choice.precision].itemsize
    checkpoint = stepped * p + state_bytes(choice.optimizer, s.network)
    others = sum(f.stat().st_size for part in ("vae", "text_encoder", "text_encoder_2")
                 for f in (source.folder / part).glob("*.safetensors"))  # fmt: skip
    example = FILE_BYTES * footprint.PICTURES * latent
    return {
        "cache": pairs * FILE_BYTES * (footprint.PICTURES * flips * moments * latent + prompt + pooled),
        "checkpoints": (c.run.keep + 1) * checkpoint,  # one more while the next is written
        "export": (p + frozen) * getattr(torch, c.model.export_dtype).itemsize + others,
        "trajectories": c.run.steps * c.batch.pairs_per_step * example if c.inversion.store else 0.0,
    }


def pairs_in(c: Config) -> tuple[int, str]:
    """How many pairs a cache will have, and how that is known."""
    try:
        return data.count_rows(data.source_path(c.data.pairs), max_pairs=c.data.max_pairs), "rows of data.pairs"
    except SettingsError:
        visited = c.run.steps * c.drawn_per_step
        return min(visited, c.data.max_pairs or visited), "pairs that the run visits: data.pairs is not here"


# --- seconds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Network calls and FLOPs of a trained pair, by phase."""

    calls: dict[str, float]  # of a picture
    flops: dict[str, float]  # of a pair


@lru_cache(maxsize=64)
def _calls(schedule: NoiseSchedule, how: settings.Inversion, pairs: int) -> float:
    """Inversion calls of a picture for each pair that is trained, over the whole of a step."""
    if how.source != "inversion":
        return 0.0
    return sum(inversion.evaluations(path.depth, how) for path in schedule.paths(pairs, how, 0, 0)) / pairs


def work(s: Subject, schedule: NoiseSchedule, checkpointing: bool) -> Work:
    """What the method asks for."""
    calls = {
        "inversion": _calls(schedule, s.config.inversion, s.config.batch.pairs_per_step),
        "reference": float(_asks_reference(s.config)),
        "policy": 1.0,
    }
    forward = footprint.PICTURES * footprint.call(s.network, s.precision).flops
    both = footprint.PICTURES * footprint.training(s.network, s.precision, checkpointing).flops
    each = {"inversion": forward, "reference": forward, "policy": both}
    return Work(calls, {phase: calls[phase] * each[phase] for phase in calls})


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


def link_gb(s: Subject, gpu: Gpu) -> float:
    """GB/s that a GPU sends to the others, some of which may be in other nodes."""
    return min(gpu.link_gb, NODE_GB) if s.ranks > s.per_node else gpu.link_gb


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


# --- measured -------------------------------------------------------------------------------------------------


def measure(s: Subject, source: Source, schedule: NoiseSchedule, device: torch.device) -> dict[str, float]:
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
        engine = engines.make_engine(policy, c, world, choice.precision, None)
        denoiser = Denoiser(engine.unet, source, schedule, choice.precision, device)
        inverted = _clock(lambda: denoiser(*_inputs(s, choice.inversion_pairs, device)), device, no_grad=True)
        frozen = _clock(lambda: denoiser(*_inputs(s, choice.micro_pairs, device)), device, no_grad=True)

        def train() -> None:
            engine.backward(denoiser(*_inputs(s, choice.micro_pairs, device)).square().mean(), last=True)

        trained = _clock(train, device)
        stepped = _clock(lambda: engine.step(0.0), device, warm=False)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"--measure: {error}".partition(". ")[0] + ": take the choice that fits, or no --measure"
        ) from error
    n = s.examples_of_rank
    return {
        "inversion": n * done.calls["inversion"] * inverted / choice.inversion_pairs,
        "reference": n * done.calls["reference"] * frozen / choice.micro_pairs,
        "policy": n * trained / choice.micro_pairs,
        "optimizer": stepped,
    }


def _random(network: Network, dtype: torch.dtype, device: torch.device) -> Any:
    unet = network.build(dtype, device)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet


def _inputs(s: Subject, pairs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    x = torch.randn(pairs, footprint.PICTURES, *s.network.latent, device=device)
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


# --- what to look at ------------------------------------------------------------------------------------------


def look(model: settings.Model) -> Source:
    """Where the networks are; of a hub id only the configurations are fetched. Raises SettingsError like ``find``."""

    def small(where: str) -> str:
        if not where or where == settings.EMBEDDED or Path(where).is_dir() or where.count("/") != 1:
            return where
        try:
            return snapshot_download(where, revision=model.revision or None, allow_patterns=["*.json", "*/*.json"])
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise SettingsError(f"model.path: '{where}' is no folder here, and the hub gave: {error}") from error

    return find(model.model_copy(update={key: small(getattr(model, key)) for key in ("path", "vae", "unet")}))


def gpu_of(name: str, gigabytes: float) -> Gpu:
    """The GPU that the command line names, or the device that is here. Raises SettingsError for an unknown name."""
    if name:
        found = next((gpu for key, gpu in GPUS.items() if key.lower() == name.lower().replace(" ", "-")), None)
        if found is None:
            raise SettingsError(f"--gpu {name}: known are {', '.join(GPUS)}; for another one give --gpu-memory GB")
    elif gigabytes:
        found = Gpu("GPU", 0)
    elif torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        speed = known_as(here.name) or Gpu("", 0)
        found = speed._replace(name=here.name, bytes=here.total_memory)
    else:
        found = Gpu(CPU, _host_bytes())
    return found._replace(bytes=gigabytes * 1e9) if gigabytes else found


def known_as(device: str) -> Gpu | None:
    """The entry of the table for a device as torch names it: all words of its key, the longest key that has them."""
    words = set(device.replace("-", " ").split())
    fitting = [gpu for key, gpu in GPUS.items() if set(key.split("-")) <= words]
    return max(fitting, key=lambda gpu: len(gpu.name), default=None)


def _host_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def precision_of(c: Config, ds: Mapping[str, Any] | None, gpu: Gpu) -> str:
    """``model.precision`` on the device that is planned for, which may be another than the one here.

    'auto' is what ``engine.resolve_precision`` makes of it on a GPU that has bfloat16.
    """
    raw = dict(ds or {})
    here = engines.resolve_precision(c, None if ds is None else raw, torch.device("cpu"))
    off = any(raw.get(name, {}).get("enabled") is False for name in ("bf16", "bfloat16"))
    if here != "fp32" or c.model.precision == "fp32" or gpu.name == CPU or off:
        return here
    stage = engines.zero_stage(raw)
    half_sums = ds is not None and (stage == 0 or (stage < 3 and _offloaded(raw, "offload_optimizer")))
    return "bf16-autocast" if half_sums else "bf16"


# --- the best choice ------------------------------------------------------------------------------------------


def _shipped(stage: int, **offload: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5e7, "stage3_max_live_parameters": 1e9, **offload}
    }


_TO_HOST = {"device": "cpu"}
SHIPPED = {  # the files of configs/ that a choice may name
    "configs/ds_zero1.json": _shipped(1),
    "configs/ds_zero2.json": _shipped(2),
    "configs/ds_zero3.json": _shipped(3),
    "configs/ds_zero3_offload.json": _shipped(3, offload_optimizer=_TO_HOST, offload_param=_TO_HOST),
}
ALONE: tuple[dict[str, str], ...] = (  # what saves memory in one process without DeepSpeed; the last saves most
    {"offload": "states"},
    {"offload": "states+gradients"},
    {"master": "none"},
    {"master": "none", "offload": "states"},
    {"master": "none", "accumulate": "bf16-sr"},
    {"master": "none", "offload": "states+gradients"},
    {"master": "none", "accumulate": "bf16-sr", "offload": "states"},
    {"master": "none", "accumulate": "bf16-sr", "offload": "states+gradients"},
)
KEYS = {  # of a choice: the settings that say it
    "micro_pairs": "batch.micro_pairs", "inversion_pairs": "batch.inversion_pairs",
    "checkpointing": "model.gradient_checkpointing", "reference": "model.reference", "optimizer": "optim.name",
    "precision": "model.precision", "master": "optim.master", "accumulate": "optim.accumulate",
    "offload": "optim.offload",
}  # fmt: skip
_SAME_2_PERCENT = math.log(1.02)


@dataclass(frozen=True)
class Option:
    """A choice with what it needs and takes."""

    choice: Choice
    file: str  # its DeepSpeed file; empty: none
    memory: Memory
    seconds: float  # modelled, for the order alone


def options(s: Subject, schedule: NoiseSchedule, gpu: Gpu, ds_file: str) -> list[Option]:
    """All choices that fit the GPU, the fastest first; within 2 % the one that changes least of the settings."""
    own, speed = s.choice(), gpu if gpu.tflops else GPUS["A100-80GB"]
    found = []
    for file, ds in _files(s, ds_file).items():
        subject = replace(s, ds=ds)
        at = subject.choice()
        for choice in _variants(subject, replace(at, reference=own.reference)):
            plan = memory(subject, choice)
            if plan.needed <= gpu.bytes:
                timed = modelled_seconds(subject, replace(choice, precision=_timed(choice)), schedule, speed) or {}
                found.append(Option(choice, file, plan, sum(timed.values())))
    return sorted(
        found, key=lambda o: (int(math.log(o.seconds) / _SAME_2_PERCENT), _changes(o, own, ds_file), o.seconds)
    )


def _timed(choice: Choice) -> str:
    return "bf16" if choice.precision == "fp32" else choice.precision


def _files(s: Subject, ds_file: str) -> dict[str, Mapping[str, Any] | None]:
    files: dict[str, Mapping[str, Any] | None] = {ds_file: s.ds}
    if s.ranks > 1:
        files |= {name: ds for name, ds in SHIPPED.items() if name != ds_file}
        files.pop("", None)  # several processes need DeepSpeed
    return files


def _variants(s: Subject, own: Choice) -> Iterator[Choice]:
    sizes = {n for n in (1, 2, 4, 8, 16) if n <= s.examples_of_rank} | {own.micro_pairs}
    calls = {n for n in (1, 2, 4, 8, 16, 32, 64) if n <= s.pairs_of_rank} | {own.inversion_pairs}
    places = {own.reference} | ({"streamed"} if own.reference in ("replicated", "sharded") else set())
    for size, call, recompute, place, numbers in itertools.product(
        sorted(sizes), sorted(calls), (False, True), sorted(places), _arithmetics(own)
    ):
        yield replace(own, micro_pairs=size, inversion_pairs=call, checkpointing=recompute, reference=place, **numbers)


def _arithmetics(own: Choice) -> list[dict[str, Any]]:
    """Optimizers and precisions that go with a choice's sharding; the ones that it has come first."""
    found: list[dict[str, Any]] = [{}]
    precisions = {own.precision} | ({"bf16"} if own.precision != "fp32" and own.stage != 0 else set())
    plain = {"master": "fp32", "accumulate": "fp32", "offload": "none"}
    for name, precision in itertools.product(STATE_BYTES, sorted(precisions)):
        if name != "adafactor" or not own.stage:  # it must see whole matrices, which sharding cuts up
            found.append({"optimizer": name, "precision": precision, **plain})
    if own.stage is None and "bf16" in precisions:
        found += [{"optimizer": ALIGNED, "precision": "bf16", **plain, **saved} for saved in ALONE]
    return found


def _changes(option: Option, own: Choice, ds_file: str) -> int:
    """How far a choice is from the settings; what alters the arithmetic counts more."""
    there = option.choice
    heavy = sum(getattr(there, name) != getattr(own, name)
                for name in ("optimizer", "precision", "master", "accumulate"))  # fmt: skip
    light = sum(getattr(there, name) != getattr(own, name)
                for name in ("micro_pairs", "inversion_pairs", "checkpointing", "reference", "offload"))  # fmt: skip
    return 10 * heavy + 2 * (option.file != ds_file) + light


def words(option: Option, s: Subject, ds_file: str) -> list[str]:
    """What to write on the command line to get from the settings to a choice."""
    own, there, found = s.choice(), option.choice, []
    for name, key in KEYS.items():
        value = getattr(there, name)
        if value != getattr(own, name):
            found.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return found + ([f"--ds_config {option.file}"] if option.file != ds_file else [])


# --- the report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    gpus: int = 1
    gpu: str = ""
    gpu_memory: float = 0.0
    per_node: int = 8
    ds_file: Path | None = None
    measure: bool = False


def plan(c: Config, request: Request) -> dict[str, Any]:
    """Everything that ``smpo plan`` says, as plain values; bytes, seconds, and words."""
    if request.measure and (request.gpu or request.gpu_memory):
        raise SettingsError("--measure times the device that is here: leave --gpu and --gpu-memory out")
    gpu, source = gpu_of(request.gpu, request.gpu_memory), look(c.model)
    ds = None if request.ds_file is None else engines.read_ds_file(request.ds_file)
    ds_file = "" if request.ds_file is None else str(request.ds_file)
    network = network_of(source, c.data.resolution, c.model.attention, c.lora)
    s = Subject(c, network, precision_of(c, ds, gpu), request.gpus, request.per_node, ds)
    engines.pairs_per_rank(c, s.ranks)
    schedule, choice = schedule_of(source, c.inversion), s.choice()
    own, done = memory(s, choice), work(s, schedule, choice.checkpointing)
    fitting = options(s, schedule, gpu, ds_file)
    best = next((o for o in fitting if _valid(s, o)), None)
    pairs, known = pairs_in(c)
    return {
        "run": f"{source.kind} at {c.data.resolution} px on {s.ranks} x {gpu.name} ({gpu.bytes / 1e9:.1f} GB each)",
        "choice": asdict(choice),
        "parameters": {"trained": s.counts[0], "frozen": s.counts[1]},
        "memory": own.parts,
        "phases": own.phases,
        "needed": own.needed,
        "fits": own.needed <= gpu.bytes,
        "host": own.host,
        "disk": disk(s, source),
        "pairs": {"count": pairs, "basis": known},
        "work": {"calls": done.calls, "flops": done.flops},
        "time": _time(s, choice, schedule, gpu, source if request.measure else None),
        "best": None if best is None else {
            "words": words(best, s, ds_file), "needed": best.memory.needed, **_hours(
                modelled_seconds(s_of(s, best), best.choice, schedule, gpu), c)},
    }  # fmt: skip


def s_of(s: Subject, option: Option) -> Subject:
    """The subject under a choice's DeepSpeed file."""
    return replace(s, ds=SHIPPED.get(option.file, s.ds))


def _valid(s: Subject, option: Option) -> bool:
    """Whether the engine takes a choice."""
    there, values = option.choice, s.config.model_dump()
    for name, key in KEYS.items():
        section, _, setting = key.partition(".")
        if getattr(there, name) != getattr(s.choice(), name):
            values[section][setting] = getattr(there, name)
    ds = s_of(s, option).ds
    try:
        c = settings.from_dict(values)
        engines.check_combination(c, there.precision, World(size=s.ranks), None if ds is None else dict(ds))
    except SettingsError:
        return False
    return True


def _time(s: Subject, choice: Choice, schedule: NoiseSchedule, gpu: Gpu, source: Source | None) -> dict[str, Any]:
    if source is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        seconds = measure(s, source, schedule, device)
        alone = "" if s.ranks == 1 else "; exchange between the ranks is not in it"
        return {"basis": f"measured on {gpu.name} by one call of each phase{alone}", **_hours(seconds, s.config)}
    found = modelled_seconds(s, choice, schedule, gpu)
    if found is None:
        return {
            "basis": "no figure: no speed is known here; give --gpu NAME for a model, or --measure",
            **_hours(None, s.config),
        }
    rate = gpu.tflops * UTILISATION
    basis = (
        f"modelled: {rate:.0f} TFLOP/s assumed ({UTILISATION:.0%} of {gpu.tflops:g}), {CALL_SECONDS * 1e3:g} ms "
        f"a call, {link_gb(s, gpu):g} GB/s between GPUs, {gpu.host_gb:g} GB/s to the host"
    )
    return {"basis": basis, **_hours(found, s.config)}


def _hours(seconds: Mapping[str, float] | None, c: Config) -> dict[str, Any]:
    if seconds is None:
        return {"seconds": {}, "step_seconds": None, "hours": None}
    step = sum(seconds.values())
    return {"seconds": dict(seconds), "step_seconds": step, "hours": step * c.run.steps / 3600}


def run(c: Config, request: Request, as_json: bool) -> int:
    """Program ``smpo plan``; returns the exit status: 0 when the settings fit the GPU, else 1."""
    found = plan(c, request)
    print0(json.dumps(found, indent=1) if as_json else render(found))
    return 0 if found["fits"] else 1


def render(found: Mapping[str, Any]) -> str:
    """The plan as text."""
    choice, count = found["choice"], found["parameters"]
    frozen = f" of {(count['trained'] + count['frozen']) / 1e6:,.1f}" if count["frozen"] else ""
    sharding = "no DeepSpeed" if choice["stage"] is None else f"ZeRO {choice['stage']}"
    sharding += (
        ", optimizer in host memory" * choice["offload_optimizer"]
        + ", weights in host memory" * choice["offload_weights"]
    )
    lines = [
        found["run"],
        f"{count['trained'] / 1e6:,.1f}{frozen} million parameters trained; {choice['precision']}, "
        f"{choice['optimizer']}, {sharding}; reference {choice['reference']}",
        f"micro_pairs {choice['micro_pairs']}, inversion_pairs {choice['inversion_pairs']}, gradient checkpointing "
        + ("on" if choice["checkpointing"] else "off"),
        "",
        *_table("memory of a GPU, GB", found["memory"]),
        *_table("at once, by phase, GB", found["phases"]),
        f"  needed with the CUDA context and the allocator's losses (assumed): {found['needed'] / 1e9:.2f} GB: "
        + ("it fits" if found["fits"] else "IT DOES NOT FIT"),
        "",
        *_table("host memory of a node, GB", found["host"]),
        *_table(f"disk, GB ({found['pairs']['count']:,} pairs: {found['pairs']['basis']})", found["disk"]),
        *_work_lines(found["work"]),
        *_time_lines(found["time"]),
        "",
        *_best_lines(found["best"]),
    ]
    return "\n".join(lines)


def _table(title: str, values: Mapping[str, float]) -> list[str]:
    rows = [f"  {name:<28}{value / 1e9:>9.2f}" for name, value in values.items() if value >= 5e6]
    return [title, *(rows or ["  less than 0.01 each"]), ""]


def _work_lines(found: Mapping[str, Any]) -> list[str]:
    rows = [f"  {phase:<12}{calls:>8.2f} calls a picture{found['flops'][phase] / 1e12:>10.2f} TFLOP a pair"
            for phase, calls in found["calls"].items()]  # fmt: skip
    return ["work of a pair", *rows, f"  {'all':<12}{sum(found['flops'].values()) / 1e12:>34.2f} TFLOP a pair", ""]


def _time_lines(found: Mapping[str, Any]) -> list[str]:
    if found["step_seconds"] is None:
        return [f"time  {found['basis']}"]
    each = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in found["seconds"].items() if seconds)
    return [
        f"time of a step {found['step_seconds']:.3g} s, of the run {found['hours']:.3g} h",
        f"  {each}",
        f"  {found['basis']}",
    ]


def _best_lines(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [
            "nothing tried fits this GPU: train adapters (lora.rank=64), take a smaller data.resolution or more GPUs"
        ]
    speed = (
        "" if found["hours"] is None else f", {found['step_seconds']:.3g} s a step, {found['hours']:.3g} h (modelled)"
    )
    if not found["words"]:
        return [f"best choice that fits: these settings{speed}"]
    return [
        f"best choice that fits: {found['needed'] / 1e9:.1f} GB{speed}; add to the command:",
        "  " + " ".join(found["words"]),
    ]
