"""The loop around the step: what counts as a failure."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from smpo_fast.common.runtime import World
from smpo_fast.config import loading
from smpo_fast.engine import checkpoint
from smpo_fast.engine.checkpoint import Progress
from smpo_fast.engine.protocol import StepResult
from smpo_fast.training import loop, metrics
from smpo_fast.training.run_log import RunLog


def engine(largest_weight: float) -> Any:
    return SimpleNamespace(largest_weight=lambda: largest_weight)


@pytest.mark.parametrize(
    "precision, losses, counted", [("fp16", [1.0], 0), ("fp16", [math.nan], 1), ("bf16", [1.0], 1)]
)
def test_steps_that_the_loss_scaling_skips_are_no_failures(
    precision: str, losses: list[float], counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp16 gradients overflow until the scale fits; a loss that is not finite is a failure in every precision."""
    settings = loading.from_dict({"run": {"steps": 1}})
    columns = {name: np.array(losses) for name in metrics.COLUMNS}
    table = metrics.StepTable(np.array([0]), np.array([0]), columns)
    trainer: Any = SimpleNamespace(
        engine=engine(1.0), schedule=range(1000),
        step=lambda step: (StepResult(False, math.inf), table, {}),
    )  # fmt: skip
    job: Any = SimpleNamespace(config=settings, world=World(), precision=precision, run_dir=tmp_path, facts={})
    monkeypatch.setattr(checkpoint, "save", lambda *_: None)
    log, bar = RunLog(tmp_path, settings, 0, World(rank=1)), tqdm(disable=True)
    assert loop.run_steps(job, trainer, Progress(), log, bar).skipped == counted


@pytest.mark.parametrize("largest", [math.nan, math.inf, 65536.0])
def test_weights_out_of_range_are_told_from_large_ones(largest: float, tmp_path: Path) -> None:
    job: Any = SimpleNamespace(config=loading.from_dict({}), run_dir=tmp_path)
    loop.check_weights(job, engine(65504.0), Progress())
    with pytest.raises(loop.TrainingFailed, match="training has diverged"):
        loop.check_weights(job, engine(largest), Progress())
