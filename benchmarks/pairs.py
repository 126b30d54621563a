"""The whole pair by phase: the same pairs and timesteps through the reference, best_eager, and this project.

All three follow the ``release`` fidelity and get timesteps spread evenly over the schedule, so each inverts the same
number of steps, and a ratio compares two times for the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import harness
import ours
import torch
from architectures import Architecture
from reference_trainer import (
    BestEager,
    CachedPair,
    Condition,
    Recipe,
    ReferenceTrainer,
    make_cached_pairs,
    make_raw_pairs,
)

from smpo_fast.common.runtime import World
from smpo_fast.method.batch import Conditioning, Pairs
from smpo_fast.training.step_paths import StepPaths

PHASES = ("load", "encode", "inversion", "reference", "policy", "log", "optimizer")
# allowed relative error of x_t between two correct contenders: bf16 gives 0.01, another fidelity 0.2
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
REFERENCE, BEST_EAGER, OURS = "reference", "best_eager", "ours"


@dataclass(frozen=True)
class Contender:
    """A trainer that does an optimizer step over ``pairs`` pairs and reports the time of its phases."""

    name: str
    pairs: int
    step: Callable[[], Mapping[str, float]]  # seconds of each phase of a whole step
    invert: Callable[[CachedPair], torch.Tensor]  # x_t of a pair, for comparison
    dtype: torch.dtype
    warm: Callable[[], Any]  # an untimed step to warm up, shorter if possible


def even_times(pairs: int) -> list[int]:
    """Timesteps in the middle of ``pairs`` equal parts of the schedule, highest first."""
    return [int((i + 0.5) / pairs * 1000) for i in reversed(range(pairs))]


def make_reference(architecture: Architecture, device: torch.device, pairs: int) -> Contender:
    """The reference baseline: with the released script's fp16 autocast on a GPU, in fp32 on a CPU."""
    compute = torch.float16 if device.type == "cuda" else torch.float32
    trainer = ReferenceTrainer.build(architecture, device, compute)
    clock = trainer.phase = harness.PhaseClock(device)
    data = make_raw_pairs(architecture, even_times(pairs))

    def step() -> Mapping[str, float]:
        trainer.step(data)
        return clock.seconds()

    def warm() -> None:
        trainer.step(data[-2:])
        clock.seconds()

    @torch.no_grad()
    def invert(pair: CachedPair) -> torch.Tensor:
        time = torch.full((2,), pair.time, device=device)
        return trainer.invert(pair.mean.to(compute), _cast(pair.condition, compute), time)[0]

    return Contender(REFERENCE, pairs, step, invert, compute, warm)


def make_best_eager(architecture: Architecture, device: torch.device, pairs: int) -> Contender:
    """Careful eager code, in bf16 on a GPU; without gradient checkpointing, since it fits without."""
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    trainer = BestEager.build(architecture, device, compute, Recipe.of(architecture, checkpointing=False))
    clock = trainer.phase = harness.PhaseClock(device)
    data = make_cached_pairs(architecture, even_times(pairs), device, compute)

    def step() -> Mapping[str, float]:
        trainer.step(data)
        return clock.seconds()

    def warm() -> None:
        trainer.step(data[-2:])
        clock.seconds()

    @torch.no_grad()
    def invert(pair: CachedPair) -> torch.Tensor:
        return trainer.invert(pair.mean, _cast(pair.condition, compute), pair.time)[0]

    return Contender(BEST_EAGER, pairs, step, invert, compute, warm)


def make_ours(
    architecture: Architecture, device: torch.device, pairs: int, overrides: ours.Overrides | None = None,
    name: str = OURS,
) -> Contender:  # fmt: skip
    """This project's trainer with the ``release`` fidelity (unless overridden) at the timesteps of the other two."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    values: dict[str, dict[str, Any]] = {
        "model": {"precision": precision},
        "batch": {"pairs_per_step": pairs, "micro_pairs": min(2, pairs), "inversion_pairs": pairs},
    }
    for section, given in (overrides or {}).items():
        values[section] = {**values.get(section, {}), **given}
    trainer: Any = ours.make_trainer(architecture, device, values)
    paths = [trainer.schedule.path(t, trainer.config.inversion) for t in even_times(pairs)]
    trainer.noise_paths = lambda step: StepPaths(paths, World())
    number = iter(range(1 << 30))

    def step() -> Mapping[str, float]:
        *_, seconds = trainer.step(next(number))
        return seconds

    @torch.no_grad()
    def invert(pair: CachedPair) -> torch.Tensor:
        added = pair.condition.added or {}
        cond = Conditioning(
            pair.condition.prompt[:1].float(),
            *(added[k][:1].float() for k in ("text_embeds", "time_ids") if k in added),
        )
        window = Pairs((0,), pair.mean[None], cond, torch.ones(1, device=device), (0,))
        path = StepPaths([trainer.schedule.path(pair.time, trainer.config.inversion)], World())
        return trainer.noiser(window, path, 0)[0][0, 0]

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Contender(name, pairs, step, invert, dtype, step)


MAKERS: dict[str, Callable[[Architecture, torch.device, int], Contender]] = {
    REFERENCE: make_reference,
    BEST_EAGER: make_best_eager,
    OURS: make_ours,
}


def check_agrees(contender: Contender, architecture: Architecture, device: torch.device, wanted: torch.Tensor) -> float:
    """Error of the contender's inversion of one pair against ``wanted``; raises WrongResult if it is too large."""
    pair = check_pair(architecture, device)
    return harness.agree(f"x_t of {contender.name}", contender.invert(pair), wanted, TOLERANCE[contender.dtype])


def check_pair(architecture: Architecture, device: torch.device) -> CachedPair:
    """The pair on which all contenders' inversions are compared."""
    return make_cached_pairs(architecture, [433], device, torch.float32, seed=11)[0]


def _cast(condition: Condition, dtype: torch.dtype) -> Condition:
    added = condition.added
    return Condition(
        condition.prompt.to(dtype), None if added is None else {name: value.to(dtype) for name, value in added.items()}
    )
