"""The numbers of a step: statistics collected on the device and read once per step, and the seconds of its phases.

The pairs of all ranks end up in one table, so the numbers are the same for any number of ranks. Their names are those
of the released scripts (``train_loss``, ``implicit_acc``, ``model_mse``, ...).
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smpo_fast.common.runtime import World

COLUMNS = ("loss", "logit", "weight", "policy_w", "policy_l", "reference_w", "reference_l")
TIME_BINS = 5


@dataclass(frozen=True)
class StepTable:
    """The examples of a step on all ranks: ids and timesteps [P], and a column [P] float64 for each of COLUMNS."""

    ids: np.ndarray
    times: np.ndarray
    columns: Mapping[str, np.ndarray]

    def nonfinite_ids(self) -> list[int]:
        """Rows of the pair table whose loss is not finite."""
        return [int(i) for i in self.ids[~np.isfinite(self.columns["loss"])]]


class Meter:
    """Collects the numbers of a step on one rank; only ``flush`` reads device memory."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._columns: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}
        self._ids: list[int] = []
        self._times: list[int] = []
        self._marks: list[tuple[str, Any, Any]] = []

    def add(self, ids: Sequence[int], times: Sequence[int], **columns: Tensor) -> None:
        """Add B examples, with a tensor [B] for each of COLUMNS."""
        self._ids += ids
        self._times += times
        for name, rows in self._columns.items():
            rows.append(columns[name].detach())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the time of a phase without waiting for the device."""
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def flush(self) -> tuple[StepTable, dict[str, float]]:
        """The table of the step over all ranks, and this rank's seconds per phase; then start over. Collective."""
        head = torch.tensor([self._ids, self._times], dtype=torch.float64, device=self.world.device).T
        measured = torch.cat([row for rows in self._columns.values() for row in rows]).view(len(COLUMNS), -1)
        mine = torch.cat([head, measured.T], dim=1)  # float64, as the head
        table = self._gather(mine).cpu().numpy()
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._marks:
            seconds[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        self._columns, self._ids, self._times, self._marks = {name: [] for name in COLUMNS}, [], [], []
        columns = {name: table[:, 2 + i] for i, name in enumerate(COLUMNS)}
        return StepTable(table[:, 0].astype(int), table[:, 1].astype(int), columns), dict(seconds)

    def _gather(self, mine: Tensor) -> Tensor:
        if self.world.size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)  # by position: each rank has every R-th

    def _now(self) -> Any:
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def summarize(table: StepTable, beta: float, num_train_timesteps: int) -> dict[str, float]:
    """The numbers that are logged for a step.

    ``avg_win_diff_loss`` and ``avg_lose_diff_loss`` are the drifts of the policy's errors from the reference's,
    m_w - r_w and m_l - r_l; ``rewards/*`` are -(beta/2) times the drifts, unweighted; ``acc_t*`` is the implicit
    accuracy by timestep bin.
    """
    c = table.columns
    drift_w, drift_l = c["policy_w"] - c["reference_w"], c["policy_l"] - c["reference_l"]
    correct = (drift_w < drift_l).astype(float)
    values = {
        "train_loss": c["loss"].mean(),
        "implicit_acc": correct.mean(),
        "model_mse": (c["policy_w"] + c["policy_l"]).mean() / 2,
        "ref_mse": (c["reference_w"] + c["reference_l"]).mean() / 2,
        "model_mse_win": c["policy_w"].mean(),
        "model_mse_lose": c["policy_l"].mean(),
        "avg_win_diff_loss": drift_w.mean(),
        "avg_lose_diff_loss": drift_l.mean(),
        "logit": c["logit"].mean(),
        "logit_max": np.abs(c["logit"]).max(),
        "saturated": (np.abs(c["logit"]) > 5).mean(),
        "rewards/chosen": -0.5 * beta * drift_w.mean(),
        "rewards/rejected": -0.5 * beta * drift_l.mean(),
        "rewards/margins": -0.5 * beta * (drift_w - drift_l).mean(),
        "weight_mean": c["weight"].mean(),
        "weight_max": c["weight"].max(),
        "weight_zero": (c["weight"] == 0).mean(),
    }
    bins = table.times * TIME_BINS // num_train_timesteps
    for b in range(TIME_BINS):
        if (bins == b).any():
            low, high = (k * num_train_timesteps // TIME_BINS for k in (b, b + 1))
            values[f"acc_t{low:03d}-{high - 1:03d}"] = correct[bins == b].mean()
    return {name: float(value) for name, value in values.items()}


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): of the device on CUDA, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
