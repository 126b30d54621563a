"""The variants of a run that fit a GPU, the fastest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from smpo_fast.engine.aligned_adamw8bit import ALIGNED
from smpo_fast.engine.optimizer_states import STATE_BYTES
from smpo_fast.method.schedule import NoiseSchedule
from smpo_fast.planning.gpus import GPUS, Gpu
from smpo_fast.planning.memory import Memory, memory
from smpo_fast.planning.planned_run import PlannedRun, RunVariant
from smpo_fast.planning.speed import modelled_seconds


def _shipped(stage: int, **offload: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5e7, "stage3_max_live_parameters": 1e9, **offload}
    }


_TO_HOST = {"device": "cpu"}
SHIPPED = {  # the files of configs/ that a variant may use
    "configs/ds_zero1.json": _shipped(1),
    "configs/ds_zero2.json": _shipped(2),
    "configs/ds_zero3.json": _shipped(3),
    "configs/ds_zero3_offload.json": _shipped(3, offload_optimizer=_TO_HOST, offload_param=_TO_HOST),
}
ALONE: tuple[dict[str, str], ...] = (  # how one process without DeepSpeed saves memory; the last saves most
    {"offload": "states"},
    {"offload": "states+gradients"},
    {"master": "none"},
    {"master": "none", "offload": "states"},
    {"master": "none", "accumulate": "bf16-sr"},
    {"master": "none", "offload": "states+gradients"},
    {"master": "none", "accumulate": "bf16-sr", "offload": "states"},
    {"master": "none", "accumulate": "bf16-sr", "offload": "states+gradients"},
)
KEYS = {  # the settings of a variant's fields
    "micro_pairs": "batch.micro_pairs", "inversion_pairs": "batch.inversion_pairs",
    "checkpointing": "model.gradient_checkpointing", "reference": "model.reference", "optimizer": "optim.name",
    "precision": "model.precision", "master": "optim.master", "accumulate": "optim.accumulate",
    "offload": "optim.offload",
}  # fmt: skip
_LOG_2_PERCENT = math.log(1.02)


@dataclass(frozen=True)
class FittingVariant:
    """A variant with its memory and its time."""

    variant: RunVariant
    file: str  # its DeepSpeed file; empty: none
    memory: Memory
    seconds: float  # modelled, used only to order the variants


def fitting_variants(run: PlannedRun, schedule: NoiseSchedule, gpu: Gpu, ds_file: str) -> list[FittingVariant]:
    """All variants that fit the GPU, the fastest first; within 2 % of time, the one that changes fewest settings."""
    current, speed = run.variant(), gpu if gpu.tflops else GPUS["A100-80GB"]
    found = []
    for file, ds in _ds_files(run, ds_file).items():
        sharded = replace(run, ds=ds)
        start = replace(sharded.variant(), reference=current.reference)
        for variant in _variants(sharded, start):
            plan = memory(sharded, variant)
            if plan.needed <= gpu.bytes:
                timed = (
                    modelled_seconds(sharded, replace(variant, precision=_timed_precision(variant)), schedule, speed)
                    or {}
                )
                found.append(FittingVariant(variant, file, plan, sum(timed.values())))
    return sorted(
        found, key=lambda o: (int(math.log(o.seconds) / _LOG_2_PERCENT), _changes(o, current, ds_file), o.seconds)
    )


def _timed_precision(variant: RunVariant) -> str:
    return "bf16" if variant.precision == "fp32" else variant.precision


def _ds_files(run: PlannedRun, ds_file: str) -> dict[str, Mapping[str, Any] | None]:
    files: dict[str, Mapping[str, Any] | None] = {ds_file: run.ds}
    if run.ranks > 1:
        files |= {name: ds for name, ds in SHIPPED.items() if name != ds_file}
        files.pop("", None)  # several processes need DeepSpeed
    return files


def _variants(run: PlannedRun, current: RunVariant) -> Iterator[RunVariant]:
    sizes = {n for n in (1, 2, 4, 8, 16) if n <= run.examples_of_rank} | {current.micro_pairs}
    calls = {n for n in (1, 2, 4, 8, 16, 32, 64) if n <= run.pairs_of_rank} | {current.inversion_pairs}
    places = {current.reference} | ({"streamed"} if current.reference in ("replicated", "sharded") else set())
    for size, call, recompute, place, numbers in itertools.product(
        sorted(sizes), sorted(calls), (False, True), sorted(places), _numerics(current)
    ):
        yield replace(
            current, micro_pairs=size, inversion_pairs=call, checkpointing=recompute, reference=place, **numbers
        )


def _numerics(current: RunVariant) -> list[dict[str, Any]]:
    """Optimizers and precisions that are possible with the sharding of ``current``, its own first."""
    found: list[dict[str, Any]] = [{}]
    precisions = {current.precision} | ({"bf16"} if current.precision != "fp32" and current.stage != 0 else set())
    plain = {"master": "fp32", "accumulate": "fp32", "offload": "none"}
    for name, precision in itertools.product(STATE_BYTES, sorted(precisions)):
        if name != "adafactor" or not current.stage:  # it needs whole matrices, which sharding splits
            found.append({"optimizer": name, "precision": precision, **plain})
    if current.stage is None and "bf16" in precisions:
        found += [{"optimizer": ALIGNED, "precision": "bf16", **plain, **saved} for saved in ALONE]
    return found


def _changes(option: FittingVariant, current: RunVariant, ds_file: str) -> int:
    """How far a variant is from the settings; what changes the arithmetic counts more."""
    variant = option.variant
    heavy = sum(getattr(variant, name) != getattr(current, name)
                for name in ("optimizer", "precision", "master", "accumulate"))  # fmt: skip
    light = sum(getattr(variant, name) != getattr(current, name)
                for name in ("micro_pairs", "inversion_pairs", "checkpointing", "reference", "offload"))  # fmt: skip
    return 10 * heavy + 2 * (option.file != ds_file) + light


def changed_settings(option: FittingVariant, run: PlannedRun, ds_file: str) -> list[str]:
    """The words to add to the command line for a variant."""
    current, variant, found = run.variant(), option.variant, []
    for name, key in KEYS.items():
        value = getattr(variant, name)
        if value != getattr(current, name):
            found.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return found + ([f"--ds_config {option.file}"] if option.file != ds_file else [])
