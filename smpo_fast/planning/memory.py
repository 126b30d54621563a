"""Memory that a run needs on a GPU and on a node, counted from shapes before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from smpo_fast.common.runtime import COMPUTE_DTYPES
from smpo_fast.engine import ds_config
from smpo_fast.engine.ema import DTYPES as AVERAGE_DTYPES
from smpo_fast.engine.optimizer_states import STATE_BYTES
from smpo_fast.models import footprint
from smpo_fast.models.network_spec import IMAGES_PER_PAIR, NetworkSpec
from smpo_fast.planning.planned_run import PlannedRun, RunVariant
from smpo_fast.training.examples import prepared_together

CONTEXT_BYTES = 0.6e9  # the CUDA context, outside the allocator; assumed
LIBRARY_BYTES = 0.15e9  # workspaces of cuBLAS and cuDNN, inside the allocator; assumed
ALLOCATOR_SHARE = 0.05  # of the peak, lost to rounding and fragments; assumed
PROCESS_BYTES = 3e9  # host memory of an idle rank: Python, torch, CUDA; assumed

# fp32 master weights next to half-precision ones; none with optim.master = "none"
MASTER_BYTES = {"fp32": 0, "bf16-autocast": 0, "bf16": 4, "fp16": 4}
GRADIENT_BYTES = {"fp32": 4, "bf16-sr": 2}  # sums over the micro-batches, by optim.accumulate


@lru_cache(maxsize=64)
def state_bytes(optimizer: str, network: NetworkSpec) -> float:
    """Bytes of an optimizer's states: a number per parameter, or Adafactor's means over rows and over columns."""
    shapes = footprint.parameter_shapes(network).trained
    if optimizer != "adafactor":
        return STATE_BYTES[optimizer] * footprint.numel(shapes)
    means = (s.numel() / s[-1] + s.numel() / s[-2] if len(s) > 1 else s.numel() for s in shapes)
    return 4 * sum(means)


def average_bytes(run: PlannedRun) -> float:
    """Bytes of the moving average of the trained weights; 0 without one."""
    optim = run.config.optim
    return AVERAGE_DTYPES[optim.ema_dtype].itemsize * run.counts[0] if optim.ema else 0.0


class ZeroLayout(NamedTuple):
    """Where a ZeRO stage keeps what belongs to a trained parameter: whole on every rank, or a shard on each."""

    weights_sharded: bool = False
    states_sharded: bool = False  # masters, optimizer states, and the average of the weights
    gradients_sharded: bool = False
    gradients_stay: bool = False  # between steps too
    masters_always: bool = False  # a second fp32 copy also where the weights are fp32
    halves_stay: bool = False  # half-precision gradients stay, next to their sums, until the step is done
    step_bytes: int = 0  # per sharded parameter, only during the optimizer step


ONE_PROCESS = ZeroLayout()
ZERO_LAYOUTS = {  # by stage and whether the weights are half precision; DeepSpeed 0.19
    (0, False): ONE_PROCESS,
    (1, False): ZeroLayout(states_sharded=True, masters_always=True, step_bytes=4),
    (1, True): ZeroLayout(states_sharded=True, gradients_stay=True, halves_stay=True),
    (2, False): ZeroLayout(states_sharded=True, masters_always=True, gradients_sharded=True),
    (2, True): ZeroLayout(states_sharded=True, gradients_sharded=True),
    (3, False): ZeroLayout(True, True, True, True, True, step_bytes=4),
    (3, True): ZeroLayout(True, True, True, True, step_bytes=4),
}


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, by purpose and at the peak of each phase, and host memory of a node."""

    parts: dict[str, float]
    phases: dict[str, float]
    host: dict[str, float]

    @property
    def allocated(self) -> float:
        """The peak, as torch.cuda.max_memory_allocated reports it."""
        return max(self.phases.values())

    @property
    def needed(self) -> float:
        """What the GPU must have: the peak, the allocator's losses and the CUDA context.

        Captured calls keep their memory between steps, free but of no use to the other phases.
        """
        graphs = self.parts["CUDA graphs"]
        peak = max(used + graphs * (phase != "inversion") for phase, used in self.phases.items())
        return peak * (1 + ALLOCATOR_SHARE) + CONTEXT_BYTES


def memory(run: PlannedRun, variant: RunVariant) -> Memory:
    """The memory plan of a run; counts by shape, so nothing is allocated."""
    parts, zero, phases = _parts(run, variant), zero_layout(variant), {}
    trained = run.counts[0]
    stays = parts["weights"] + parts["masters"] + parts["optimizer states"] + parts["window"] + LIBRARY_BYTES
    stays += parts["average of the weights"] + parts["weights for the inversion"]
    if zero.gradients_stay:
        stays += parts["gradients"]
    resident = variant.reference in ("replicated", "sharded")
    frozen, gradients = parts["reference"], 0.0 if zero.gradients_stay else parts["gradients"]
    gradients += trained * COMPUTE_DTYPES[variant.precision].itemsize * zero.halves_stay
    inverts = run.config.inversion.source == "inversion"
    for phase, works, held in (
        ("inversion", inverts, 0.0 if run.config.inversion.network == "policy" and not resident else frozen),
        ("reference", variant.reference != "none", frozen),
        ("policy", True, frozen if resident else 0.0),
    ):
        if works:
            phases[phase] = stays + held + parts[f"activations, {phase}"] + parts["gathered weights"]
    phases["policy"] += gradients + parts["buckets"]
    step = _step_elements(run, variant) * zero.step_bytes * (not variant.offload_optimizer)
    phases["optimizer"] = stays + gradients + step + (frozen if resident else 0.0)
    return Memory(parts, phases, _host(run, variant))


def zero_layout(variant: RunVariant) -> ZeroLayout:
    """What the ranks keep under a variant's ZeRO stage."""
    if variant.stage is None:
        return ONE_PROCESS
    # stage 0 in half precision is refused by the engine; its bytes are those of one process
    return ZERO_LAYOUTS.get((variant.stage, MASTER_BYTES[variant.precision] > 0), ONE_PROCESS)


def _parts(run: PlannedRun, variant: RunVariant) -> dict[str, float]:
    zero, (trained, frozen), share = zero_layout(variant), run.counts, 1 / run.ranks
    size = COMPUTE_DTYPES[variant.precision].itemsize
    whole = trained + frozen
    masters = _master_bytes(variant) * trained * (share if zero.states_sharded else 1.0)
    states = state_bytes(variant.optimizer, run.network) * (share if zero.states_sharded else 1.0)
    average = average_bytes(run) * (share if zero.states_sharded else 1.0)
    gradients = GRADIENT_BYTES[variant.accumulate] * trained * (share if zero.gradients_sharded else 1.0)
    spread = {"sharded": share, "replicated": 1.0, "streamed": 1.0}
    backward = footprint.training_cost(run.network, variant.precision, variant.checkpointing).peak
    inverted = min(variant.inversion_pairs, run.pairs_of_rank)
    prompts = footprint.prompt_bytes(run.network, variant.precision) * inverted
    call = footprint.inference_cost(run.network, variant.precision).peak.at(inverted)
    graphs = run.config.model.cuda_graphs
    frozen_call = footprint.inference_cost(run.network, variant.precision, trained=False).peak
    gathers = variant.offload_weights or (run.ranks > 1 and (zero.weights_sharded or variant.reference == "sharded"))
    # DeepSpeed keeps what is used again within the second of these, even beyond the first
    live = max(run.ds_number("stage3_max_live_parameters"), run.ds_number("stage3_max_reuse_distance"))
    return {
        "weights": 0.0 if variant.offload_weights else whole * size * (share if zero.weights_sharded else 1.0),
        "masters": masters * (not variant.offload_optimizer),
        "optimizer states": states * (not variant.states_on_host),
        "average of the weights": average * (not variant.average_on_host),
        "gradients": gradients * (not variant.gradients_on_host),
        "reference": whole * size * spread.get(variant.reference, 0.0),
        "window": _step_batch_bytes(run),
        "weights for the inversion": _copies_bytes(run, variant),
        "activations, inversion": call + prompts * (1 + graphs),  # graphs read copies of them
        "CUDA graphs": (call + prompts) * graphs,
        "activations, reference": frozen_call.at(variant.micro_pairs) + _prepared_bytes(run, variant),
        "activations, policy": backward.at(variant.micro_pairs) + _prepared_bytes(run, variant),
        "gathered weights": min(whole, live) * size * gathers,
        "buckets": _bucket_bytes(run, variant),
    }


def _copies_bytes(run: PlannedRun, variant: RunVariant) -> float:
    """Second copies of weights for the inversion's calls: float8, channels-last, merged, half-precision adapters."""
    c, size = run.config, COMPUTE_DTYPES[variant.precision].itemsize
    turned = c.model.channels_last and variant.stage is not None
    rounded = bool(c.lora.rank) and not c.lora.use_dora and size < 4 and c.inversion.source == "inversion"
    return (
        footprint.float8_bytes(run.network) * c.inversion.fp8
        + footprint.convolution_elements(run.network) * size * turned
        + (footprint.merged_elements(run.network) * size if c.model.merge_qkv else 0)
        + run.counts[0] * size * rounded
    )


def _master_bytes(variant: RunVariant) -> int:
    """Bytes per trained parameter of fp32 master weights."""
    return max(MASTER_BYTES[variant.precision] * (variant.master == "fp32"), 4 * zero_layout(variant).masters_always)


def _step_elements(run: PlannedRun, variant: RunVariant) -> float:
    """Parameters whose gradients have a second copy at a time in the optimizer step: ZeRO 3 goes group by group."""
    mine = run.counts[0] / run.ranks
    return min(run.ds_number("sub_group_size"), mine) if variant.stage == 3 else mine


def _bucket_bytes(run: PlannedRun, variant: RunVariant) -> float:
    """Buffers of gradients that are sent to other ranks: as they were computed, and in fp32 as they are sent."""
    if not variant.stage:
        return 0.0
    size = COMPUTE_DTYPES[variant.precision].itemsize
    overlap = ds_config.get_key(dict(run.ds or {}), "zero_optimization.overlap_comm") is True
    return min(run.ds_number("reduce_bucket_size"), run.counts[0]) * (size + 4) * (1 + overlap)


def _step_batch_bytes(run: PlannedRun) -> float:
    """The step batch: latents and prompts of this step and the next, x_t and tau at every timestep of a pair."""
    latent = IMAGES_PER_PAIR * math.prod(run.network.latent)
    prompt = math.prod(run.network.prompt)
    return 4 * run.pairs_of_rank * (2 * (latent + prompt) + 2 * latent * run.config.inversion.per_trajectory)


def _prepared_bytes(run: PlannedRun, variant: RunVariant) -> float:
    """The networks' inputs of the examples whose micro-batches are prepared together."""
    together = prepared_together(run.pairs_of_rank, variant.micro_pairs)
    image = math.prod(run.network.prompt) + math.prod(run.network.latent)
    return together * IMAGES_PER_PAIR * image * COMPUTE_DTYPES[variant.precision].itemsize


def _host(run: PlannedRun, variant: RunVariant) -> dict[str, float]:
    """Host memory of the fullest node, the one of rank 0."""
    zero, (trained, frozen), here = zero_layout(variant), run.counts, min(run.ranks, run.per_node)
    size = COMPUTE_DTYPES[variant.precision].itemsize
    share = 1 / run.ranks if zero.states_sharded else 1.0
    states = state_bytes(variant.optimizer, run.network) * variant.states_on_host
    sums = GRADIENT_BYTES[variant.accumulate] * trained * variant.gradients_on_host
    masters = max(_master_bytes(variant), 4) * trained * variant.offload_optimizer
    average = average_bytes(run) * variant.average_on_host
    return {
        "processes": PROCESS_BYTES * here,
        "offloaded states": (states + masters + sums + average) * share * here,
        "offloaded weights": (trained + frozen) * size * here / run.ranks * variant.offload_weights,
        "streamed reference": (trained + frozen) * size * here * (variant.reference == "streamed"),
        "prefetched pairs": _step_batch_bytes(run) / 2 * here,
        # every rank reads the weights at the start; rank 0 gathers them, and their average, in fp32 for the export
        "loading or export": max(
            (trained + frozen) * 4.0 * here, (trained + frozen) * 8.0 + trained * 4.0 * ("ema" in run.config.exported)
        ),
    }
