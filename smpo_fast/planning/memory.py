"""Memory and disk of a run, counted before it is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from smpo_fast.common.errors import UserError
from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.config.schema import Config
from smpo_fast.data.pairs import reader
from smpo_fast.engine import ds_config
from smpo_fast.engine.optimizer_states import STATE_BYTES
from smpo_fast.models import footprint
from smpo_fast.models.locate import ModelSource
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.training.reference import resolve as resolve_reference

CONTEXT_BYTES = 0.6e9  # the CUDA context, outside the allocator; assumed
LIBRARY_BYTES = 0.15e9  # workspaces of cuBLAS and cuDNN, inside the allocator; assumed
ALLOCATOR_SHARE = 0.05  # of the peak, lost to rounding and fragments; assumed
PROCESS_BYTES = 3e9  # host memory of a rank before anything of its own: Python, torch, CUDA; assumed
FILE_BYTES = 2  # a number in the cache and in the trajectories: float16

# fp32 weights beside those that compute; none with optim.master = "none"
MASTER_BYTES = {"fp32": 0, "bf16-autocast": 0, "bf16": 4, "fp16": 4}
GRADIENT_BYTES = {"fp32": 4, "bf16-sr": 2}  # sums over the micro-batches, by optim.accumulate
PAGED = "paged_adamw8bit"  # its states lie where the driver likes, outside torch's allocator


@lru_cache(maxsize=64)
def state_bytes(optimizer: str, network: NetworkSpec) -> float:
    """Bytes of an optimizer's states: so many a parameter, or Adafactor's means over rows and over columns."""
    shapes = footprint.parameter_shapes(network).trained
    if optimizer != "adafactor":
        return STATE_BYTES[optimizer] * footprint.numel(shapes)
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
    network: NetworkSpec
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
        found = footprint.parameter_shapes(self.network)
        return footprint.numel(found.trained), footprint.numel(found.frozen)

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
            stage=None if self.ds is None else ds_config.zero_stage(dict(ds)),
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
        footprint.training_cost(s.network, choice.precision, choice.checkpointing).peak.at(choice.micro_pairs),
        p * size * (share if zero.gradients_shared else 0.0),  # what a micro-batch leaves before it is added
    )
    call = footprint.inference_cost(s.network, choice.precision).peak
    frozen_call = footprint.inference_cost(s.network, choice.precision, trained=False).peak
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
    latent = IMAGES_PER_PAIR * math.prod(s.network.latent)
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


def disk(s: Subject, source: ModelSource) -> dict[str, float]:
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
    example = FILE_BYTES * IMAGES_PER_PAIR * latent
    return {
        "cache": pairs * FILE_BYTES * (IMAGES_PER_PAIR * flips * moments * latent + prompt + pooled),
        "checkpoints": (c.run.keep + 1) * checkpoint,  # one more while the next is written
        "export": (p + frozen) * getattr(torch, c.model.export_dtype).itemsize + others,
        "trajectories": c.run.steps * c.batch.pairs_per_step * example if c.inversion.store else 0.0,
    }


def pairs_in(c: Config) -> tuple[int, str]:
    """How many pairs a cache will have, and how that is known."""
    try:
        return reader.count_rows(reader.source_path(c.data.pairs), max_pairs=c.data.max_pairs), "rows of data.pairs"
    except UserError:
        visited = c.run.steps * c.drawn_per_step
        return min(visited, c.data.max_pairs or visited), "pairs that the run visits: data.pairs is not here"
