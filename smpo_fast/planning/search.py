"""The settings that fit a GPU best."""

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
from smpo_fast.planning.memory import Choice, Memory, Subject, memory
from smpo_fast.planning.speed import modelled_seconds


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
