"""The learning rate of every optimizer step: warm-up, then a schedule, as a function of the step."""

from __future__ import annotations

import math

from smpo_fast.config.schema import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then constant, or falling to 0 at the end of a run of ``steps``."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    done = max(0.0, (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    decay = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[optim.schedule]
    return optim.lr * warm * decay
