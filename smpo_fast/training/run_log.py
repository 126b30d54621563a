"""The logs of a run: metrics.jsonl always, and TensorBoard, wandb and trackio where the settings name them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smpo_fast.common.runtime import World, warn0
from smpo_fast.common.storage import atomic_write
from smpo_fast.config.schema import Config


class _Sink(NamedTuple):
    write: Callable[[Mapping[str, float], int], object]
    close: Callable[[], object]


class RunLog:
    """The logs of rank 0 in the run folder; the other ranks write nothing.

    Rows after ``first_step``, left by a run that went further than its last checkpoint, are dropped: those steps will
    be logged again. So is a last line that a crash cut short. Other lines that are not rows are kept, with a warning.
    """

    def __init__(self, run_dir: Path, config: Config, first_step: int, world: World) -> None:
        self.active = world.rank == 0
        self._sinks: list[_Sink] = []
        if not self.active:
            return
        self.file = run_dir / "metrics.jsonl"
        lines = [(line, parse_row(line)) for line in log_lines(self.file) if line.endswith("\n")]
        if unreadable := sum(row is None for _, row in lines):
            warn0(
                f"{self.file}: {unreadable} of {len(lines)} lines are not rows of this log; they are kept, and ignored"
            )
        kept = "".join(line for line, row in lines if row is None or row["step"] <= first_step)
        with atomic_write(self.file) as draft:
            draft.write_text(kept, errors="surrogateescape")
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
            add = writer.add_scalar
            self._sinks.append(_Sink(lambda values, step: [add(k, v, step) for k, v in values.items()], writer.close))
        for module, project in (("wandb", config.log.wandb), ("trackio", config.log.trackio)):
            if project:
                self._sinks.append(_tracker(module, project, run_dir, config))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Log one step (1 is the first). Lists and strings go to metrics.jsonl only."""
        if not self.active:
            return
        with self.file.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        for sink in self._sinks:
            sink.write(numbers, step)

    def close(self) -> None:
        """Flush the logs."""
        for sink in self._sinks:
            sink.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first, without lines that are damaged."""
    rows = (parse_row(line) for line in log_lines(run_dir / "metrics.jsonl"))
    return [row for row in rows if row is not None]


def log_lines(file: Path) -> list[str]:
    """The lines of a log; none where there is no file."""
    if not file.exists():
        return []
    with file.open(errors="surrogateescape", newline="\n") as stream:
        return list(stream)


def parse_row(line: str) -> dict[str, Any] | None:
    """The row of a line; None for a line that is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _tracker(module: str, project: str, run_dir: Path, config: Config) -> _Sink:
    """wandb and trackio have the same three functions."""
    tracker = importlib.import_module(module)
    tracker.init(project=project, name=run_dir.name, config=config.model_dump())
    return _Sink(lambda values, step: tracker.log(dict(values), step=step), tracker.finish)
