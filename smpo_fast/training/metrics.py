"""What a step reports: statistics kept on the device and fetched once per step, phase times, and the logs.

All pairs of a step, whichever rank trained them, end up in one table, so the numbers are the same for any number
of ranks. Names are those of the sibling scripts (``train_loss``, ``implicit_acc``, ``model_mse``, ...).
"""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from smpo_fast.common.runtime import World
from smpo_fast.config.schema import Config

COLUMNS = ("loss", "logit", "weight", "policy_w", "policy_l", "reference_w", "reference_l")
TIME_BINS = 5


@dataclass(frozen=True)
class StepTable:
    """Every pair of a step, all ranks: ids and timesteps [P], and a column [P] float64 for each of COLUMNS."""

    ids: np.ndarray
    times: np.ndarray
    columns: Mapping[str, np.ndarray]

    def nonfinite_ids(self) -> list[int]:
        """Rows of the pair table whose loss is not finite."""
        return [int(i) for i in self.ids[~np.isfinite(self.columns["loss"])]]


class Meter:
    """Collects one step on one rank; ``flush`` is the step's only read of device memory."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._rows: list[Tensor] = []
        self._ids: list[int] = []
        self._times: list[int] = []
        self._marks: list[tuple[str, Any, Any]] = []

    def add(self, ids: Sequence[int], times: Sequence[int], **columns: Tensor) -> None:
        """Add pairs: each of COLUMNS as [B]."""
        self._ids += ids
        self._times += times
        self._rows.append(torch.stack([columns[name].detach().double() for name in COLUMNS], dim=1))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase without stopping the device."""
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def flush(self) -> tuple[StepTable, dict[str, float]]:
        """The step's table over all ranks (collective) and this rank's seconds per phase; starts anew."""
        head = torch.tensor([self._ids, self._times], dtype=torch.float64, device=self.world.device).T
        mine = torch.cat([head, torch.cat(self._rows)], dim=1)
        table = self._gather(mine).cpu().numpy()
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in self._marks:
            seconds[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        self._rows, self._ids, self._times, self._marks = [], [], [], []
        columns = {name: table[:, 2 + i] for i, name in enumerate(COLUMNS)}
        return StepTable(table[:, 0].astype(int), table[:, 1].astype(int), columns), dict(seconds)

    def _gather(self, mine: Tensor) -> Tensor:
        if self.world.size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(parts, mine.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)  # in order of position: ranks take every R-th

    def _now(self) -> Any:
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def summarize(table: StepTable, beta: float, num_train_timesteps: int) -> dict[str, float]:
    """The numbers a step is logged with, from all its pairs.

    ``avg_win_diff_loss`` and ``avg_lose_diff_loss`` are the drifts m_w - r_w and m_l - r_l; ``rewards/*`` are
    -(beta/2) times the drifts, unweighted; ``acc_t*`` is the implicit accuracy by timestep bin.
    """
    c = table.columns
    drift_w, drift_l = c["policy_w"] - c["reference_w"], c["policy_l"] - c["reference_l"]
    right = (drift_w < drift_l).astype(float)
    values = {
        "train_loss": c["loss"].mean(),
        "implicit_acc": right.mean(),
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
            values[f"acc_t{low:03d}-{high - 1:03d}"] = right[bins == b].mean()
    return {name: float(value) for name, value in values.items()}


def memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): the device's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class _Sink(NamedTuple):
    write: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


class RunLog:
    """Rank 0's logs in the run's folder: metrics.jsonl always, the others as ``[log]`` says.

    Lines of steps from ``first_step`` on, left by a run that went further than its last checkpoint, are dropped:
    those steps will be logged again.
    """

    def __init__(self, run_dir: Path, config: Config, first_step: int, world: World) -> None:
        self.active = world.rank == 0
        self._sinks: list[_Sink] = []
        if not self.active:
            return
        self.file = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(run_dir) if row["step"] <= first_step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in kept))
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
            add = writer.add_scalar
            self._sinks.append(_Sink(lambda values, step: [add(k, v, step) for k, v in values.items()], writer.close))
        for module, project in (("wandb", config.log.wandb), ("trackio", config.log.trackio)):
            if project:
                self._sinks.append(_tracker(module, project, run_dir, config))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one step (1 is the first). Lists and texts go to metrics.jsonl only."""
        if not self.active:
            return
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        for sink in self._sinks:
            sink.write(numbers, step)

    def close(self) -> None:
        """Write out what the logs hold back."""
        for sink in self._sinks:
            sink.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first; a last line cut short by a crash is left out."""
    file = run_dir / "metrics.jsonl"
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tracker(module: str, project: str, run_dir: Path, config: Config) -> _Sink:
    """wandb and trackio share the three calls used here."""
    tracker = importlib.import_module(module)
    tracker.init(project=project, name=run_dir.name, config=config.model_dump())
    return _Sink(lambda values, step: tracker.log(dict(values), step=step), tracker.finish)
