"""A run of four steps on a few pairs of the embedded world, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from smpo_fast import train
from smpo_fast.training.metrics import read_metrics

SMALL = [
    "data.max_pairs=24", "run.steps=4", "run.save_every=2", "batch.pairs_per_step=6", "batch.micro_pairs=2",
    "batch.inversion_pairs=4", "optim.warmup_steps=0", "optim.lr=1e-4", "eval.prompts=", "log.tensorboard=false",
    "model.export_dtype=float32",
]  # fmt: skip


def run(run_dir: Path, *words: str) -> int:
    return train.main([*SMALL, f"run.dir={run_dir}", *words])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run_dir / "export" / "unet").glob("*.safetensors")))


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The logged rows without what depends on the clock."""
    clock = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in read_metrics(run_dir)]
