"""The artefacts of tests/fixtures/formats: how they were made, and what is read from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from helpers import toy
from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config
from smpo_fast.data.cache.reader import CachedPairs
from smpo_fast.data.pairs import reader
from smpo_fast.data.pairs.pair import RawPair
from smpo_fast.engine import create
from smpo_fast.engine.protocol import Engine
from smpo_fast.training.run_log import read_metrics
from smpo_fast.training.trajectories import TrajectoryStore

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"


FACTS = {"seed": 3, "optim": {"lr": 1e-3}}  # of the toy's checkpoints


SAVED, LAST = 2, 5  # steps of a toy run: at the checkpoint, at the end


TOYS: dict[str, dict[str, Any]] = {  # checkpoints of a toy run, and their settings
    "adamw": {},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "lion8bit": {"optimizer": "lion8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "bf16": {"optimizer": "adamw8bit_aligned", "precision": "bf16", "master": "none"},  # without fp32 weights
    "two_ranks": {"optimizer": "adamw8bit_aligned"},  # of two processes with ZeRO stage 2, which cut a matrix in two
}


MEMORY_TABLE = "memory://formats/pairs.parquet"  # what was imported, at an address that every machine has


SCORE = ["score", "embedded", "scores", "--scorer", "embedded", "--max-pairs", "8", "--device", "cpu"]


LOGGED = ("train_loss", "grad_norm", "model_mse", "rewards/margins", "lr", "pairs_seen")


class Scaled(nn.Module):
    """Multiplies by a persistent buffer, which is another in the checkpoints."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.mean()


def toy_network(scale: float = 1.0) -> nn.Module:
    """For toy.batch, as small as a matrix can be whose states bitsandbytes quantises (4096 entries)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 22), Scaled(scale), nn.SiLU(), nn.Linear(22, 5))


def toy_engine(name: str, scale: float = 1.0) -> tuple[Engine, Config]:
    settings = toy.settings(pairs=4, **TOYS[name])
    return create.make_engine(toy_network(scale), settings, World(), settings.model.precision, None), settings


def toy_steps(
    trained: Engine, settings: Config, first: int, last: int, rank: int = 0, size: int = 1
) -> list[list[float]]:
    """Loss (of the rank) and gradient norm of some steps, at a rate that lets a lost optimizer state show."""
    steps = range(first, last)
    return [[toy.accumulate(trained, settings, i, rank, size), trained.step(2e-2).grad_norm] for i in steps]


def digest(tensors: Iterable[torch.Tensor | np.ndarray | bytes]) -> str:
    """sha256 of numbers as they lie in memory."""
    found = hashlib.sha256()
    for one in tensors:
        found.update(one if isinstance(one, bytes) else np.ascontiguousarray(one).tobytes())
    return found.hexdigest()


def state_digest(state: dict[str, torch.Tensor]) -> str:
    return digest(part for name in sorted(state) for part in (name.encode(), state[name]))


def cache_facts(cached: CachedPairs) -> dict[str, Any]:
    every = np.arange(len(cached))
    moments, prompts = cached.moments(every, np.zeros((len(every), 2), bool)), cached.prompts(cached.prompt_index)
    return {
        "rows": cached.rows.tolist(),
        "uids": cached.uids.tolist(),
        "rewards": cached.rewards.tolist(),
        "labels": cached.labels.tolist(),
        "texts": cached.texts.tolist(),
        "moments": digest(moments),
        "prompts": digest(part for part in prompts if part is not None),
    }


def table_facts(table: Path) -> list[list[Any]]:
    found = [pair for pair in reader.read_pairs(table) if isinstance(pair, RawPair)]
    return [[p.row, p.uid, p.prompt, p.label, p.rewards, digest(p.images)] for p in found]


def store_facts(store: TrajectoryStore, steps: int, pairs: int) -> list[str]:
    """A hash of what a store gives for each step."""
    found = []
    for step in range(steps):
        tau, errors = store.tau(step, range(pairs)), store.errors(step, range(pairs))
        assert tau is not None and errors is not None, f"step {step} is not stored"
        found.append(digest([tau, errors]))
    return found


def logged(run_dir: Path) -> list[list[float]]:
    return [[row[name] for name in LOGGED] for row in read_metrics(run_dir)]


def to_memory(table: bytes, created: str = "") -> None:
    """Put a table at MEMORY_TABLE, made at a moment: an import looks at sizes and times."""
    files = fsspec.filesystem("memory")
    path = files._strip_protocol(MEMORY_TABLE)
    files.pipe_file(path, table)
    if created:
        files.store[path].created = datetime.fromisoformat(created)


def nearly(values: list[list[float]], relative: float = 1e-3) -> list[Any]:
    return [pytest.approx(row, rel=relative, abs=1e-4) for row in values]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
